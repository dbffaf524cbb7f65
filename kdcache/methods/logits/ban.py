"""BAN: born-again networks, each taught by its own kind of the generation before."""

from __future__ import annotations

from torch import Tensor

from kdcache.methods.logits.kd import KD, kd
from kdcache.methods.scaling import Reduction, SoftmaxTarget


def ban(
    student: Tensor,
    teacher: Tensor | SoftmaxTarget,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The divergence from the teacher's probabilities as they are, added to cross-entropy in equal parts.

    Args:
        student: (B, K) logits, any floating dtype.
        teacher: (B, K) logits of the generation before.
        temperature: T, published 1.
        reduction: "mean", or "none" for one value per sample.

    Returns:
        A 0-d tensor, or (B,) with reduction "none", in nats.

    Source: Furlanello et al., Born-Again Neural Networks, ICML 2018.
    """
    return kd(student, teacher, temperature=temperature, reduction=reduction)


class BAN(KD):
    """`ban` at the objective's temperature."""
