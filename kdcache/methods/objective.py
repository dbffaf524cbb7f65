"""The whole loss of a training step, from student logits and the teachers' cached ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.methods.ablations import permutation
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.curriculum import learned_temperature, reversal
from kdcache.methods.ensembles import (
    Ensemble,
    choose,
    confidence_weights,
    entropy_weights,
    shares,
)
from kdcache.methods.losses import Mix, ce, dkd_warmup, kd, tckd_nckd
from kdcache.methods.multilevel import mlkd
from kdcache.methods.scaling import Softened, full_precision
from kdcache.methods.step import Step
from kdcache_stores.errors import DataError, UsageError

Terms = dict[str, Tensor]


class Objective(nn.Module):
    """ce_weight·CE + kd_weight·D, where D is the distillation term of a method.

    The teachers' logits take one way, in this order: noise per teacher; the teacher's transform
    (none, Z-score or probabilities, by `combine`); the combination; standardization of what is
    still a logit, on both sides; the loss. With `copies` of the noise, D is the mean over them.
    Everything is computed in float32, with autocast off.

    CTKD's θ is a parameter of this module: give `objective.parameters()` to the optimizer beside
    the student's, keep `objective.state_dict()` in checkpoints, and average its gradient over ranks
    as the student's. The other methods have no parameters.

    Args:
        config: an `ObjectiveConfig`, or nothing and its fields as keywords.

    >>> objective = Objective(method="kd", standardize="unbiased")
    >>> objective.config.temperature, objective.config.kd_weight
    (2.0, 9.0)

    Attributes:
        config: the configuration with every published default filled in.
        needs_teacher: whether teacher logits are used (all but ce).
        needs_pair: whether logits are (B, 2, K), of a weak and a strong view (MLKD).
        needs_labels: whether a sample without a label is refused (ce, DKD, ablations).
        needs_keys: whether `Step.keys` are used (noise, permuted ablation).
    """

    def __init__(self, config: ObjectiveConfig | None = None, **options: Any) -> None:
        super().__init__()
        if config is not None and options:
            raise UsageError(f"expected a config or options, found both: {', '.join(options)}")
        self.config = (config or ObjectiveConfig(**options)).resolved()
        method, ablated = self.config.method, self.config.ablation != "full"
        self.needs_teacher = method != "ce"
        self.needs_pair = method == "mlkd"
        self.needs_labels = method in ("ce", "dkd") or ablated
        self.needs_keys = (
            self.config.noise is not None or self.config.ablation == "non-target-permuted"
        )
        if method == "ctkd":
            self.theta = nn.Parameter(torch.ones(()))

    def check(self, labels: np.ndarray | Tensor, teachers: int = 1) -> None:
        """Refuse before the first step what no step could use; call it once, with all labels.

        Args:
            labels: (N,) integers, -1 for unlabelled.
            teachers: number of teachers.

        Raises:
            DataError: for unlabelled samples where the method needs labels.
            UsageError: for no teacher, or another number of weights than of teachers.
        """
        labels = np.asarray(labels)
        missing = int((labels < 0).sum())
        if self.needs_labels and missing:
            raise DataError(
                f"{self._name()} needs the label of each sample, found {missing} of {labels.size} "
                "unlabelled (-1). Leave those out, or use kd, mlkd or ctkd without ablation."
            )
        if self.needs_teacher and not teachers:
            raise UsageError(f"{self._name()} needs at least one teacher, found none")
        if self.needs_teacher and not isinstance(self.config.weights, str):
            shares(self.config.weights, teachers)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Sequence[Tensor],
        labels: Tensor,
        step: Step | None = None,
        mix: Mix | None = None,
    ) -> tuple[Tensor, Terms]:
        """The loss and its parts.

        Args:
            student_logits: (B, K), any floating dtype; (B, 2, K), weak then strong, for MLKD.
            teacher_logits: for each teacher a tensor of the same shape; empty for ce.
            labels: (B,) int64, -1 for unlabelled.
            step: where in the training this is; seeds noise, permutation and choice, and is the
                clock of DKD's warm-up, CTKD's ramp and the noise's schedule.
            mix: partner labels and lam of mixup or cutmix, when the images are mixed.

        Returns:
            The loss, 0-d, and detached 0-d tensors on its device: "ce", "ce_weighted" and, but for
            ce, "kd" (the distillation term as it enters, warm-up included), "kd_weighted",
            "kd_share" (of the loss); "tckd" and "nckd" for DKD, "temperature" for CTKD. A weight of
            0 leaves "ce" out of the graph, not out of the parts.

        Raises:
            DataError: for shapes that do not fit, or labels that are needed and absent.
            UsageError: for a wrong number of teachers, a step without keys where noise needs them,
                or an ablation on mixed images.
        """
        step = Step() if step is None else step
        with torch.autocast(student_logits.device.type, enabled=False):
            student = full_precision(student_logits)
            self._check_batch(student, teacher_logits, labels, mix)
            ce_weight, kd_weight = self.config.ce_weight, self.config.kd_weight
            assert ce_weight is not None
            assert kd_weight is not None
            parts: Terms = {"ce": self._cross_entropy(student, labels, mix)}
            loss = parts["ce_weighted"] = ce_weight * parts["ce"]
            if self.needs_teacher:
                parts |= self._distillation(student, teacher_logits, labels, step, mix)
                parts["kd_weighted"] = kd_weight * parts["kd"]
                loss = loss + parts["kd_weighted"]
            parts = {name: part.detach() for name, part in parts.items()}
            if self.needs_teacher:
                # Of a loss of 0 it is 0: a student equal to its teacher, without labels.
                whole = loss.detach()
                parts["kd_share"] = torch.where(whole == 0, whole, parts["kd_weighted"] / whole)
            return loss, parts

    def _name(self) -> str:
        ablation = self.config.ablation
        return self.config.method + ("" if ablation == "full" else f" with ablation {ablation!r}")

    def _check_batch(
        self, student: Tensor, teachers: Sequence[Tensor], labels: Tensor, mix: Mix | None
    ) -> None:
        expected = 3 if self.needs_pair else 2
        if student.ndim != expected or len(student) != len(labels):
            shape = "(samples, 2, classes)" if self.needs_pair else "(samples, classes)"
            raise DataError(
                f"{self._name()} expects student logits {shape} with one label each, found "
                f"{tuple(student.shape)} and {tuple(labels.shape)} labels"
            )
        if student.shape[-1] < 2:
            raise DataError(f"expected logits of at least 2 classes, found {student.shape[-1]}")
        if self.needs_teacher and not teachers:
            raise UsageError(f"{self._name()} needs the logits of at least one teacher, found none")
        for number, teacher in enumerate(teachers if self.needs_teacher else ()):
            if teacher.shape != student.shape:
                raise DataError(
                    f"expected logits of teacher {number} (counted from 0) of the student's shape "
                    f"{tuple(student.shape)}, found {tuple(teacher.shape)}"
                )
        if self.config.ablation != "full" and mix is not None:
            raise UsageError(
                f"the ablation {self.config.ablation!r} needs one label per image, and mixed "
                "images have two: use an augmentation without mixup and cutmix"
            )
        if self.needs_labels and labels.device.type == "cpu":
            self.check(labels, len(teachers))

    def _cross_entropy(self, student: Tensor, labels: Tensor, mix: Mix | None) -> Tensor:
        views = student.unbind(1) if self.needs_pair else (student,)
        smoothing = self.config.label_smoothing
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.ce_weight != 0):
            losses = [ce(view, labels, label_smoothing=smoothing, mix=mix) for view in views]
            return torch.stack(losses).sum()

    def _distillation(
        self,
        student: Tensor,
        teachers: Sequence[Tensor],
        labels: Tensor,
        step: Step,
        mix: Mix | None,
    ) -> Terms:
        noise = self.config.noise
        copies = 1 if noise is None else noise.copies
        options = self._options(student, step)
        total: Terms = {}
        for copy in range(copies):
            noisy = [
                full_precision(z) if noise is None else noise(z, step, teacher, copy)
                for teacher, z in enumerate(z.detach() for z in teachers)
            ]
            for weight, target in self._targets(noisy, labels, step, mix):
                for name, term in self._terms(student, target, labels, step, mix, options).items():
                    part = (weight * term).mean() / copies
                    total[name] = total[name] + part if name in total else part
        if self.config.method == "ctkd":
            total["temperature"] = options["temperature"]
        return total

    def _targets(
        self, teachers: Sequence[Tensor], labels: Tensor, step: Step, mix: Mix | None
    ) -> Iterator[tuple[float | Tensor, Tensor | Softened]]:
        """(weight of the loss, what it compares with): one pair, or one per teacher."""
        combine, weights = self.config.combine, self.config.weights
        if len(teachers) == 1:
            if not isinstance(weights, str):
                shares(weights, 1)
            yield 1.0, teachers[0]
        elif isinstance(weights, str):
            per_sample = (
                entropy_weights(teachers)
                if weights == "entropy"
                else confidence_weights(teachers, labels, mix)
            )
            if combine == "mean-losses":
                yield from zip(per_sample, teachers, strict=True)
            else:
                yield 1.0, Ensemble(teachers, list(per_sample[..., None]), combine)
        else:
            fixed = shares(weights, len(teachers))
            if combine == "mean-losses":
                yield from zip(fixed, teachers, strict=True)
            elif combine == "random":
                yield 1.0, teachers[choose(fixed, step)]
            else:
                yield 1.0, Ensemble(teachers, fixed, combine)

    def _options(self, student: Tensor, step: Step) -> dict[str, Any]:
        """Keywords of the method's loss, the same for all copies and teachers."""
        config = self.config
        options: dict[str, Any] = {
            "temperature": config.temperature,
            "standardize": config.standardize,
        }
        if config.method in ("kd", "dkd"):
            options["teacher_temperature"] = config.teacher_temperature
            options["student_temperature"] = config.student_temperature
        if config.method in ("kd", "ctkd"):
            options |= {"reverse": config.reverse, "ablation": config.ablation}
            if config.ablation == "non-target-permuted":
                options["order"] = permutation(step, student.shape[-1])
        if config.method == "ctkd":
            assert config.ctkd_start is not None
            options["temperature"] = learned_temperature(
                self.theta,
                strength=reversal(step.epoch, config.ctkd_ramp),
                start=config.ctkd_start,
                end=config.ctkd_end,
            )
        if config.method == "mlkd":
            options["variant"] = config.mlkd_variant
        return options

    def _terms(
        self,
        student: Tensor,
        target: Tensor | Softened,
        labels: Tensor,
        step: Step,
        mix: Mix | None,
        options: dict[str, Any],
    ) -> Terms:
        """The method's term against one target, per sample, or 0-d for MLKD."""
        if self.config.method == "mlkd":
            return {"kd": mlkd(student, target, **options)}
        if self.config.method != "dkd":
            return {"kd": kd(student, target, labels=labels, reduction="none", **options)}
        config = self.config
        tckd, nckd = tckd_nckd(student, target, labels, reduction="none", **options)
        if mix is not None:
            # A mixed image has two target classes; DKD is mixed as CE is (a choice of kdcache).
            partner, lam = mix[0], mix[1].to(student.dtype)
            other = tckd_nckd(student, target, partner, reduction="none", **options)
            tckd, nckd = (lam * a + (1 - lam) * b for a, b in zip((tckd, nckd), other, strict=True))
        warmup = dkd_warmup(step.epoch, config.dkd_warmup)
        whole = warmup * (config.dkd_alpha * tckd + config.dkd_beta * nckd)
        return {"kd": whole, "tckd": tckd, "nckd": nckd}
