"""DKD: the two parts of KD, of the label's class and among the others, with weights of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.logits.ce import Mix
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.scaling import (
    Reduction,
    SoftmaxTarget,
    Standardize,
    Temperature,
    check_shapes,
    divergence,
    reduced,
    scaled,
)
from kdcache.methods.step import Step
from kdcache.methods.target import check_labels, others, target_or_not


def tckd_nckd(
    student: Tensor,
    teacher: Tensor | SoftmaxTarget,
    labels: Tensor,
    *,
    temperature: Temperature = 4.0,
    teacher_temperature: Temperature | None = None,
    student_temperature: Temperature | None = None,
    standardize: Standardize = False,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor]:
    """The two parts of DKD, T² included: target-class and non-target-class distillation.

    TCKD = T²·KL of [p_y, 1 - p_y], NCKD = T²·KL among the K - 1 other classes. Without the T² of
    each, KD's KL is TCKD + (1 - p_y)·NCKD per sample. For two classes NCKD is 0. Arguments, return
    and errors as of `dkd`.
    """
    check_shapes(student, teacher)
    labels = check_labels(labels, "DKD")
    if teacher_temperature is None:
        teacher_temperature = temperature
    if student_temperature is None:
        student_temperature = temperature
    v = scaled(student, student_temperature, standardize)
    z = scaled(teacher, teacher_temperature, standardize)
    target = (
        teacher_temperature
        * student_temperature
        * divergence(target_or_not(v, labels), target_or_not(z, labels))
    )
    rest = (
        teacher_temperature * student_temperature * divergence(others(v, labels), others(z, labels))
    )
    return reduced(target, reduction), reduced(rest, reduction)


def dkd(
    student: Tensor,
    teacher: Tensor | SoftmaxTarget,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: Temperature = 4.0,
    teacher_temperature: Temperature | None = None,
    student_temperature: Temperature | None = None,
    standardize: Standardize = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """Decoupled distillation: alpha·TCKD + beta·NCKD, see `tckd_nckd`.

    CE and the warm-up are not in it; `dkd_warmup` gives the factor of an epoch.

    Args:
        student: (B, K) logits v, any floating dtype.
        teacher: (B, K) logits z, or several teachers as an `Ensemble`.
        labels: (B,) int64, all of them known.
        alpha: weight of the target part.
        beta: weight of the non-target part.
        temperature: T; τ when standardized.
        teacher_temperature: instead of `temperature` on the teacher's side.
        student_temperature: instead of `temperature` on the student's side.
        standardize: Z-score both sides first, "unbiased" or "biased".
        reduction: "mean", or "none" for one value per sample.

    Returns:
        A 0-d tensor, or (B,) with reduction "none", in nats.

    Raises:
        DataError: if the shapes differ, or for unlabelled samples.

    Source: Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, eq. 7.
    """
    target, rest = tckd_nckd(
        student,
        teacher,
        labels,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        student_temperature=student_temperature,
        standardize=standardize,
        reduction=reduction,
    )
    return alpha * target + beta * rest


def dkd_warmup(epoch: int, epochs: int = 20) -> float:
    """DKD's factor min((epoch + 1)/epochs, 1); `epoch` counts from 0, the published one from 1."""
    return min((epoch + 1) / epochs, 1.0) if epochs else 1.0


class DKD(Loss):
    """`dkd` with its warm-up, and on mixed images mixed as cross-entropy is (a choice of kdcache)."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        names = ("temperature", "teacher_temperature", "student_temperature", "standardize")
        self.scaling = {name: getattr(config, name) for name in names}
        self.alpha, self.beta, self.warmup = (
            config.options[name] for name in ("alpha", "beta", "warmup")
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
        """The term "kd", and its parts "tckd" and "nckd" before warm-up and weights, each (B,)."""
        v, z = student["logits"], target["logits"]
        tckd, nckd = tckd_nckd(v, z, labels, reduction="none", **self.scaling)
        if mix is not None:  # a mixed image has two target classes
            partner, lam = mix[0], mix[1].to(v.dtype)
            other = tckd_nckd(v, z, partner, reduction="none", **self.scaling)
            tckd, nckd = (lam * a + (1 - lam) * b for a, b in zip((tckd, nckd), other, strict=True))
        warmup = step.number("dkd warm-up", lambda epoch, _: dkd_warmup(epoch, self.warmup))
        return {"kd": warmup * (self.alpha * tckd + self.beta * nckd), "tckd": tckd, "nckd": nckd}
