"""From logits to scaled logits: float32, standardization, temperature.

A *scaled* tensor is what a softmax is taken of: logits divided by a temperature, Z-scores divided
by a temperature, or log-probabilities. Every loss of this package is a function of scaled tensors.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from kdcache_stores.errors import DataError, UsageError

Convention = Literal["unbiased", "biased"]
Standardize = Literal[False, "unbiased", "biased"]
Temperature = float | Tensor
Reduction = Literal["mean", "none"]

EPSILON = 1e-7
"""Added to the standard deviation, as in the published code of logit standardization."""

FLOOR = 1e-2
"""A row whose standard deviation is below this is flat: it has no spread that could be divided by.

Rows of teachers have 2 to 4, of fresh networks .1 to 1, of students under standardization .2 to .5.
Below a hundredth are zero-initialised heads (0, or 5e-4 where a head is scaled by .001), collapsed
students, and constant rows, whose spread is rounding.
"""


class SoftmaxTarget(Protocol):
    """Teachers combined in a way that depends on the temperature (see `Ensemble`)."""

    def scaled(self, temperature: Temperature, convention: Standardize) -> Tensor:
        """Scaled values (..., K) of the combination at `temperature`."""
        ...


def full_precision(logits: Tensor) -> Tensor:
    """`logits` in float32; float64 stays float64.

    In float16 the 1e-7 of the standardization is a subnormal and its reciprocal overflows, so half
    precision is never computed in.
    """
    return logits if logits.dtype == torch.float64 else logits.float()


def standardize(logits: Tensor, convention: Convention = "unbiased") -> Tensor:
    """Z-scores of each row: zero mean, unit standard deviation, the same order.

    The toy case of logit standardization: plain KD at temperature 1 prefers the student with the
    wrong prediction because its logits are close to the teacher's; on Z-scores the student that is a
    scaled copy of the teacher has no loss at all.

    >>> import torch
    >>> from kdcache.methods import kd, standardize
    >>> teacher = torch.tensor([[1.0, 4.0, 3.0, 2.0]])  # cat, dog, bird, frog: a dog
    >>> wrong = torch.tensor([[1.0, 2.8, 3.0, 2.0]])  # a bird
    >>> right = torch.tensor([[0.1, 0.4, 0.3, 0.2]])  # a dog
    >>> print(*(f"{kd(student, teacher, temperature=1):.4f}" for student in (wrong, right)))
    0.1749 0.3457
    >>> print(*(f"{z:.3f}" for z in standardize(teacher)[0].tolist()))
    -1.162 1.162 0.387 -0.387
    >>> print(*(f"{z:.3f}" for z in standardize(wrong)[0].tolist()))
    -1.320 0.660 0.880 -0.220
    >>> kd(wrong, teacher, temperature=1, standardize="unbiased").item()  # doctest: +ELLIPSIS
    0.0995...
    >>> kd(right, teacher, temperature=1, standardize="unbiased").item() < 1e-6
    True

    Args:
        logits: (..., K), any floating dtype.
        convention: "unbiased" divides by the standard deviation with K - 1 (the published code),
            "biased" by that with K (the paper). 1e-7 is added to either, as published.

    Flat rows, of a deviation below `FLOOR`, are divided by `FLOOR` instead, so the Z-scores go to 0
    with the deviation, without a jump, and rounding in a constant row is no target. Their gradient is
    that of the centred logits themselves, as in plain distillation: it points to the teacher and
    never exceeds it in size. (Divided by 1e-7 or by `FLOOR` it would be up to 1e7 or 100 times that;
    with the first the first step of a zero-initialised head gives logits in the hundred thousands.)

    Returns:
        (..., K) float32 (float64 for float64).

    Raises:
        UsageError: for another convention.

    Source: Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, Algorithm 1; the
    unbiased form and the 1e-7 are those of its published code. Mean and deviation are part of the
    graph, as there.
    """
    if convention not in ("unbiased", "biased"):
        raise UsageError(f"expected 'unbiased' or 'biased' standardization, found {convention!r}")
    logits = full_precision(logits)
    deviation = logits.std(-1, correction=int(convention == "unbiased"), keepdim=True)
    scores = (logits - logits.mean(-1, keepdim=True)) / (deviation.clamp(min=FLOOR) + EPSILON)
    value = scores.detach()
    return torch.where(deviation < FLOOR, value + FLOOR * (scores - value), scores)


def scaled(
    logits: Tensor | SoftmaxTarget, temperature: Temperature, convention: Standardize = False
) -> Tensor:
    """`logits` (..., K), standardized if a convention is given, divided by `temperature`."""
    if not isinstance(logits, Tensor):
        return logits.scaled(temperature, convention)
    if convention:
        return standardize(logits, convention) / temperature
    return full_precision(logits) / temperature


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) in nats along the last axis: (..., K) -> (...).

    All in log space: a probability that underflows contributes exactly zero, and the gradient with
    respect to either side (a learned temperature is in both) stays finite.
    """
    target = teacher.log_softmax(-1)
    return (target.exp() * (target - student.log_softmax(-1))).sum(-1)


def reduced(per_sample: Tensor, reduction: Reduction) -> Tensor:
    """The mean over samples, or the samples as they are."""
    if reduction not in ("mean", "none"):
        raise UsageError(f"expected reduction 'mean' or 'none', found {reduction!r}")
    return per_sample.mean() if reduction == "mean" else per_sample


def check_shapes(student: Tensor, teacher: Tensor | SoftmaxTarget) -> None:
    """Refuse a student and a teacher whose logits cannot be compared row by row."""
    if isinstance(teacher, Tensor) and teacher.shape != student.shape:
        raise DataError(
            "expected student and teacher logits of one shape (samples, classes), found "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}. Check that the student has as "
            "many outputs as the teacher has classes."
        )
