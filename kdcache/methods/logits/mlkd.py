"""MLKD: distillation at the level of instances, batches and classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.logits.ce import Mix
from kdcache.methods.logits.kd import kd
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.scaling import (
    SoftmaxTarget,
    Standardize,
    check_shapes,
    full_precision,
    reduced,
    scaled,
)
from kdcache.methods.step import Step
from kdcache_stores.errors import DataError, UnknownName, UsageError

VARIANTS = ("as-coded", "as-described")


def mlkd(
    student: Tensor,
    teacher: Tensor | SoftmaxTarget,
    *,
    temperature: float = 4.0,
    standardize: Standardize = False,
    variant: str = "as-coded",
) -> Tensor:
    """Multi-level logit distillation on a weak and a strong view of the same images, without CE.

    With KD(T) = T²·KL, batch(T) = ‖P_s·P_sᵀ - P_t·P_tᵀ‖²/B and class(T) = ‖P_sᵀ·P_s - P_tᵀ·P_t‖²/K
    (squared Frobenius norms, P = softmax(·/T) of shape (B, K)), over the five temperatures
    {`temperature`, 3, 5, 2, 6}:

    - "as-described", the paper: the sum of KD + batch + class over both views and all temperatures.
    - "as-coded", what the published code computes and its published numbers come from:
      m·Σ KD_weak(T) + KD_strong(T₀) + KD_strong(3) + KD_strong(5) + KD_weak(2) + KD_weak(6)
      + c·Σ class_weak(T) + m·Σ batch_weak(T). Its masks, of samples on which the teacher is no more
      confident than on the batch's median (m) and of classes with no more than the median of its
      probability (c), meet losses that are sums already; only their means are left, about 1/2.

    Standardized, T₀ is τ; "as-coded" takes Z-scores in KD alone, "as-described" at all levels.

    Args:
        student: (B, 2, K) logits, [:, 0] of the weak view and [:, 1] of the strong one.
        teacher: (B, 2, K) logits likewise, or several teachers as an `Ensemble`.
        temperature: T₀.
        standardize: Z-score both sides first, "unbiased" or "biased".
        variant: "as-coded" or "as-described".

    Returns:
        A 0-d tensor.

    Raises:
        DataError: for other shapes.
        UnknownName: for another variant.

    Source: Jin et al., Multi-Level Logit Distillation, CVPR 2023, section 3, and its code.
    """
    if variant not in VARIANTS:
        raise UnknownName("MLKD variant", variant, VARIANTS)
    if student.ndim != 3 or student.shape[1] != 2:
        raise DataError(
            "MLKD needs a weak and a strong view of each image: expected student logits (samples, "
            f"2, classes), found {tuple(student.shape)}. Use a store of a weak + strong plan."
        )
    check_shapes(student, teacher)
    temperatures = (temperature, 3.0, 5.0, 2.0, 6.0)
    # Matrix products in half precision would round each probability to 3 digits.
    with torch.autocast(student.device.type, enabled=False):
        instance = [kd_per_view(student, teacher, t, standardize) for t in temperatures]
        if variant == "as-described":
            levels = [level_terms(student, teacher, t, standardize) for t in temperatures]
            return torch.stack([*instance, *(b + c for b, c in levels)]).sum()
        levels = [level_terms(student, teacher, t, False, views=1) for t in temperatures]
        m, c = mask_means(scaled(teacher, 1.0)[:, 0])
        weak, strong = torch.stack(instance).unbind(1)
        batch, classes = (torch.stack(terms).sum() for terms in zip(*levels, strict=True))
        mixed = strong[:3].sum() + weak[3:].sum()
        return m * weak.sum() + mixed + c * classes + m * batch


def kd_per_view(
    student: Tensor, teacher: Tensor | SoftmaxTarget, temperature: float, standardize: Standardize
) -> Tensor:
    """(2,) KD of the weak and of the strong view, each a mean over the batch."""
    loss = kd(student, teacher, temperature=temperature, standardize=standardize, reduction="none")
    return loss.mean(0)


def level_terms(
    student: Tensor,
    teacher: Tensor | SoftmaxTarget,
    temperature: float,
    standardize: Standardize,
    views: int = 2,
) -> tuple[Tensor, Tensor]:
    """Batch-level and class-level terms, each (views,): of the weak view, and of the strong one."""
    # (views, B, K), for batched products.
    q, p = (
        scaled(logits, temperature, standardize)[:, :views].softmax(-1).transpose(0, 1)
        for logits in (student, teacher)
    )
    batch = (q @ q.mT - p @ p.mT).square().sum((-1, -2)) / q.shape[1]
    classes = (q.mT @ q - p.mT @ p).square().sum((-1, -2)) / q.shape[2]
    return batch, classes


def mask_means(teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Means m and c of the sample mask and of the class mask, from weak logits (B, K) at T = 1."""
    p = full_precision(teacher).softmax(-1)
    largest, mass = p.amax(-1), p.sum(0)
    m, c = ((values <= values.median()).to(p.dtype) for values in (largest, mass))
    return reduced(m, "mean"), reduced(c, "mean")


class MLKD(Loss):
    """`mlkd` in the variant of the objective."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self.variant = config.options["variant"]
        if config.combine == "mean-zscores" and self.variant == "as-coded":
            raise UsageError(
                "MLKD as coded compares raw logits of batches and classes, which a mean of Z-scores "
                "has not: combine 'mean-logits' or 'mean-losses', or take the variant 'as-described'"
            )

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
        config = self.config
        assert config.temperature is not None
        term = mlkd(
            student["logits"],
            target["logits"],
            temperature=config.temperature,
            standardize=config.standardize,
            variant=self.variant,
        )
        return {"kd": term}
