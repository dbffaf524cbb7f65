"""Rules about the softmax targets: do they hold more than the labels, and do they count in the loss?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdcache.checks.case import Case
from kdcache.checks.finding import Finding, percent
from kdcache.checks.rules.loss_settings import loss_settings, setting
from kdcache.methods.scaling import scaled

#: Least share of plain KD in the loss of a student with a uniform output. On the logits of a resnet20 for
#: CIFAR-100 published settings have 43% (0.5 CE + 0.5 KL at T = 1) to 94% (0.1 CE + 0.9 KL at T = 4). As the
#: published upper end is above any useful bound, too much KD is reported by the rules about weights and
#: temperature (`loss_settings`), and the share is held against its lower end alone.
SHARE = 0.3

#: Mean entropy in nats below which targets hardly differ from labels: less than 1% of the mass is beside the
#: top class, so the gradient of KD differs from that of cross-entropy by less than that.
ENTROPY = 0.05


def share_of_loss(case: Case) -> Iterator[Finding]:
    """Plain KD with sound weights and still hardly a part of the loss: the logits are too small."""
    mine = setting(case.loss)
    total = mine.ce_weight + mine.kd_weight
    if not case.loss.record.plain_kl or mine.standardized or not case.labelled:
        return
    if any(loss_settings(case.loss, labelled=True)):
        return  # its weights or its temperature are the reason
    if case.uniform is None:
        return
    share = case.uniform["kd_share"]
    if share < SHARE:
        spread = max(float(z.std(1).mean()) for z in case.tensors())
        yield Finding(
            "kd-share",
            f"Distillation begins with {percent(share)} of the loss, less than {percent(SHARE)}, though "
            f"its weight is {percent(mine.kd_weight / total)}: the teacher's logits spread by {spread:.2g} "
            f"alone, so that at T = {mine.temperature:g} its targets are nearly uniform. Networks "
            "trained from standardized logits have such small ones.",
            "--standardize, which makes every teacher's spread the same.",
        )


def confident_targets(case: Case) -> Iterator[Finding]:
    """A teacher that is confident of every training sample gives what the labels give already."""
    loss = case.loss
    temperature = loss.teacher_temperature or loss.temperature
    if temperature is None:
        return
    teachers = case.tensors()
    nats = entropy([scaled(z, temperature, loss.standardize) for z in teachers])
    if nats >= ENTROPY:
        return
    softer = [t for t in (2.0, 3.0, 4.0, 5.0) if t > temperature]
    enough = [t for t in softer if entropy([scaled(z, t, False) for z in teachers]) >= ENTROPY]
    hotter = f"--temperature {enough[0]:g}, or " if enough and not loss.standardize else ""
    sign = "tau" if loss.standardize else "T"
    yield Finding(
        "certain-targets",
        f"The targets have an entropy of {nats:.2g} nats on average at {sign} = {temperature:g}: the "
        "teacher is so confident of the training samples that its targets are their labels, with little "
        "of what the classes have in common.",
        f"{hotter}--standardize." if not loss.standardize else "a higher --temperature.",
    )


def entropy(targets: Sequence[Tensor]) -> float:
    """Mean entropy of softmax over rows and teachers, nats; each (N, K), divided by T already."""
    logs = [log.log_softmax(-1) for log in targets]
    return float(torch.stack([-(log.exp() * log).sum(-1).mean() for log in logs]).mean())
