"""DIST: the correlation of probabilities, over the classes of a sample and over the samples of a class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.methods.logits.ce import Mix
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.scaling import FLOOR, SoftmaxTarget, Temperature, check_shapes, scaled
from kdcache.methods.step import Step

EPSILON = 1e-8
"""Added to the product of the two norms, as in the published code."""


def dist(
    student: Tensor,
    teacher: Tensor | SoftmaxTarget,
    *,
    temperature: Temperature = 4.0,
    beta: float = 2.0,
    gamma: float = 2.0,
) -> Tensor:
    """Distillation from a stronger teacher: T²·(beta·inter + gamma·intra), on softmax(·/T).

    inter is the mean over samples of 1 - ρ over the classes, intra the mean over classes of 1 - ρ
    over the samples of the batch, with ρ Pearson's correlation of student and teacher: it
    compares the order of preference, not the probabilities. Both lie between 0 and 2.

    A constant row or column has ρ = 0, and one that varies by less than a hundredth of its mean is
    flat (see `correlation`): a zero-initialised head has a gradient of the usual size.

    Args:
        student: (B, K) logits v, any floating dtype.
        teacher: (B, K) logits z, or several teachers as an `Ensemble`.
        temperature: T.
        beta: weight of inter.
        gamma: weight of intra.

    Returns:
        A 0-d tensor: samples are compared with each other, so there is no value of one of them.

    Raises:
        DataError: if the shapes differ.

    Source: Huang et al., Knowledge Distillation from a Stronger Teacher, NeurIPS 2022, and its code
    with the settings of CIFAR-100.
    """
    check_shapes(student, teacher)
    q, p = (scaled(logits, temperature).softmax(-1) for logits in (student, teacher))
    inter, intra = 1 - correlation(q, p).mean(), 1 - correlation(q.mT, p.mT).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation along the last axis: two (N, M) of probabilities -> (N,).

    Flat rows, of a deviation below `FLOOR` times their mean, are treated as `standardize` treats flat
    logits (to first order softmax(v/T) varies by std(v)/T of its mean): divided by that instead, so
    the correlation goes to 0 with the deviation, with the gradient of a row that varies by its mean.
    """
    (a, norm), (b, other) = centred(a), centred(b)
    return (a * b).sum(-1) / (norm * other + EPSILON)


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, M) less their mean, and what they are divided by, (N,): their norm, if not flat."""
    mean = x.mean(-1, keepdim=True)
    x, floor = x - mean, FLOOR * x.shape[-1] ** 0.5 * mean.detach().abs().squeeze(-1)
    norm = x.norm(dim=-1)
    flat = norm < floor
    value = x.detach()
    gentle = torch.where(flat[..., None], value + FLOOR * (x - value), x)
    return gentle, torch.where(flat, floor, norm)


class DIST(Loss):
    """`dist` with the objective's temperature, beta and gamma."""

    def forward(
        self,
        student: Fields,
        target: TargetFields,
        labels: Tensor,
        step: Step,
        mix: Mix | None,
        **shared: Any,
    ) -> Terms:
        """The term "kd", 0-d."""
        temperature = self.config.temperature
        assert temperature is not None
        v, z = student["logits"], target["logits"]
        return {"kd": dist(v, z, temperature=temperature, **self.config.options)}
