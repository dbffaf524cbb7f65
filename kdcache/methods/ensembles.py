"""Several teachers: their weights and their combination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.methods.logits.ce import Mix, ce
from kdcache.methods.scaling import Standardize, Temperature, full_precision, scaled, standardize
from kdcache.methods.step import Step
from kdcache_stores.errors import UnknownName, UsageError

MEANS = ("mean-logits", "mean-zscores", "mean-probs")


@dataclass(frozen=True)
class Ensemble:
    """Teachers that make one target together; the losses take it in the place of a teacher.

    ============  =================================================================================
    mean-logits   Σ w_i·z_i: a normalised geometric mean of the distributions; teachers with large
                  logits dominate
    mean-zscores  Σ w_i·Z(z_i), each teacher standardized and their mean not standardized again;
                  needs a standardized loss
    mean-probs    Σ w_i·softmax(z_i/T), taken anew at each T; the student's gradient is that of the
                  mean of the losses. What is left is no logit, so a standardized loss is refused
    ============  =================================================================================

    Args:
        teachers: M tensors (B, ..., K) of logits.
        weights: one per teacher, a float or a tensor that broadcasts to (B, ..., 1), such as
            (B, 1); used as they are, so they should sum to 1 in each sample.
        combine: a name from the table.

    Raises:
        UnknownName: for another name.
        UsageError: for no teachers, or another number of weights than of teachers.
    """

    teachers: Sequence[Tensor]
    weights: Sequence[float | Tensor]
    combine: str = "mean-logits"

    def __post_init__(self) -> None:
        if self.combine not in MEANS:
            raise UnknownName("combination", self.combine, MEANS)
        if len(self.weights) != len(self.teachers) or not self.teachers:
            raise UsageError(
                f"expected a weight for each teacher, found {len(self.weights)} weights and "
                f"{len(self.teachers)} teachers"
            )

    def scaled(self, temperature: Temperature, convention: Standardize = False) -> Tensor:
        """(B, ..., K): what the softmax is taken of, at `temperature`.

        Raises:
            UsageError: for a mean of Z-scores not standardized, or of probabilities standardized.
        """
        pairs = list(zip(self.weights, self.teachers, strict=True))
        if self.combine == "mean-logits":
            return scaled(
                sum_of([w * full_precision(z) for w, z in pairs]), temperature, convention
            )
        if self.combine == "mean-zscores":
            if not convention:
                raise UsageError("a mean of Z-scores needs a standardized loss: add standardize")
            return sum_of([w * standardize(z, convention) for w, z in pairs]) / temperature
        if convention:
            raise UsageError("a mean of probabilities has no logits left to standardize")
        logs = [scaled(z, temperature).log_softmax(-1) + torch.as_tensor(w).log() for w, z in pairs]
        return torch.stack(logs).logsumexp(0)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, from first to last."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def shares(weights: Sequence[float] | None, teachers: int) -> list[float]:
    """Weights that sum to 1, equal ones for None.

    Raises:
        UsageError: for another number of weights than of teachers.
    """
    if weights is None:
        return [1 / teachers] * teachers
    if len(weights) != teachers:
        raise UsageError(
            f"expected a weight for each of {teachers} teachers, found {len(weights)}: "
            f"{', '.join(map(str, weights))}"
        )
    return [weight / sum(weights) for weight in weights]


def entropy_weights(teachers: Sequence[Tensor]) -> Tensor:
    """More weight to the teacher that is more confident of a sample: w_i ∝ 1 - H_i/ΣH.

    H is the entropy of softmax(z) at temperature 1. The weights of a sample sum to 1 (the published
    code of EBKD, in CA-MKD's repository, leaves them at (M - 1)/M in sum). Where every teacher is
    certain, H = 0 throughout, they are equal.

    Args:
        teachers: M tensors (B, ..., K) of logits.

    Returns:
        (M, B, ...) float32.

    Source: Kwon et al., Adaptive Knowledge Distillation Based on Entropy, ICASSP 2020.
    """
    if len(teachers) == 1:
        return torch.ones_like(full_precision(teachers[0])[..., 0])[None]
    logs = torch.stack([full_precision(z).log_softmax(-1) for z in teachers])
    entropy = -(logs.exp() * logs).sum(-1)
    total = entropy.sum(0)
    equal = torch.full_like(entropy, 1 / len(teachers))
    parts = torch.where(total > 0, entropy / torch.where(total > 0, total, 1), equal)
    return (1 - parts) / (len(teachers) - 1)


def confidence_weights(
    teachers: Sequence[Tensor], labels: Tensor, mix: Mix | None = None
) -> Tensor:
    """More weight to the teacher that is closer to the label: w_i = (1 - softmax_i(CE_i))/(M - 1).

    CE is at temperature 1 on raw logits. The weights of a sample sum to 1 (the published code
    divides them by M once more). Unlabelled samples (-1) weigh their teachers equally.

    Args:
        teachers: M tensors (B, ..., K) of logits.
        labels: (B,) int64.
        mix: partner labels and lam of mixup or cutmix.

    Returns:
        (M, B, ...) float32.

    Source: Zhang et al., Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022, eq. 3.
    """
    shape = teachers[0].shape[:-1]

    def spread(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (len(shape) - 1)).expand(shape).flatten()

    if mix is not None:
        mix = spread(mix[0]), spread(mix[1])
    if len(teachers) == 1:
        return torch.ones_like(full_precision(teachers[0])[..., 0])[None]
    losses = [ce(z.flatten(0, -2), spread(labels), mix=mix, reduction="none") for z in teachers]
    weights = (1 - torch.stack(losses).softmax(0)) / (len(teachers) - 1)
    return weights.view(len(teachers), *shape)


def choose(shares: Sequence[float], step: Step) -> int:
    """The teacher of this step, drawn with the given shares from (seed, epoch, step index)."""
    left = step.fraction("teacher")
    for teacher, share in enumerate(shares):
        left -= share
        if left < 0:
            return teacher
    return max(i for i, share in enumerate(shares) if share > 0)
