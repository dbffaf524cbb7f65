"""The losses between one student and one teacher: CE, KD and DKD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.methods.ablations import ablate
from kdcache.methods.scaling import (
    Reduction,
    Softened,
    Standardize,
    Temperature,
    check_shapes,
    divergence,
    full_precision,
    reduced,
    scaled,
)
from kdcache.methods.target import check_labels, others, target_or_not

Mix = tuple[Tensor, Tensor]
"""(partner labels (B,) int64, lam (B,) float32): lam of the image, 1 - lam of its partner."""


def ce(
    student: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    mix: Mix | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy with the labels: -log softmax(v)_y, at temperature 1, on raw logits.

    Samples with label -1 have no part in it: the mean is over the labelled ones (0 if there are
    none). For mixed images it is lam·CE(v, y) + (1 - lam)·CE(v, y').

    Args:
        student: (B, K) logits v, any floating dtype.
        labels: (B,) int64, -1 for unlabelled.
        label_smoothing: share of the target spread evenly over all classes.
        mix: partner labels and lam of mixup or cutmix.
        reduction: "mean", or "none" for one value per sample (0 for unlabelled ones).

    Returns:
        A 0-d tensor, or (B,) with reduction "none"; float32 (float64 for float64).
    """
    student = full_precision(student)

    def part(wanted: Tensor) -> Tensor:
        return F.cross_entropy(
            student, wanted, ignore_index=-1, label_smoothing=label_smoothing, reduction="none"
        )

    if mix is None:
        loss, share = part(labels), (labels >= 0).to(student.dtype)
    else:
        partner, lam = mix[0], mix[1].to(student.dtype)
        loss = lam * part(labels) + (1 - lam) * part(partner)
        share = lam * (labels >= 0) + (1 - lam) * (partner >= 0)
    if reduction != "mean":
        return reduced(loss, reduction)
    total = share.sum()
    return loss.sum() / torch.where(total > 0, total, torch.ones_like(total))


def kd(
    student: Tensor,
    teacher: Tensor | Softened,
    *,
    temperature: Temperature = 4.0,
    teacher_temperature: float | None = None,
    student_temperature: float | None = None,
    standardize: Standardize = False,
    reverse: bool = False,
    ablation: str = "full",
    labels: Tensor | None = None,
    order: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Knowledge distillation: T²·KL(softmax(z/T) ‖ softmax(v/T)), mean over the batch.

    T² keeps the size of the gradient as T grows. With two temperatures it becomes the product of
    both (a choice of kdcache; equal ones give T²).

    Args:
        student: (B, K) logits v, any floating dtype.
        teacher: (B, K) logits z, or several teachers as an `Ensemble`.
        temperature: T; τ when standardized. A tensor takes part in the gradient.
        teacher_temperature: instead of `temperature` on the teacher's side.
        student_temperature: instead of `temperature` on the student's side.
        standardize: Z-score both sides first, "unbiased" or "biased".
        reverse: KL(student ‖ teacher) instead.
        ablation: what of the teacher's answer is kept, see `ablate`.
        labels: (B,) int64, for ablations only.
        order: (B, K - 1) int64, for the permuted ablation only.
        reduction: "mean", or "none" for one value per sample.

    Returns:
        A 0-d tensor, or (B,) with reduction "none", in nats.

    Raises:
        DataError: if the shapes differ, or an ablation lacks labels.

    Source: Hinton et al. 2015, section 2; standardized: Sun et al., CVPR 2024, Algorithm 1.
    """
    check_shapes(student, teacher)
    hot = temperature if teacher_temperature is None else teacher_temperature
    own = temperature if student_temperature is None else student_temperature
    v, z = scaled(student, own, standardize), scaled(teacher, hot, standardize)
    v, z = ablate(v, z, labels, ablation, order)
    loss = divergence(z, v) if reverse else divergence(v, z)
    return reduced(hot * own * loss, reduction)


def tckd_nckd(
    student: Tensor,
    teacher: Tensor | Softened,
    labels: Tensor,
    *,
    temperature: Temperature = 4.0,
    teacher_temperature: float | None = None,
    student_temperature: float | None = None,
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
    hot = temperature if teacher_temperature is None else teacher_temperature
    own = temperature if student_temperature is None else student_temperature
    v, z = scaled(student, own, standardize), scaled(teacher, hot, standardize)
    target = hot * own * divergence(target_or_not(v, labels), target_or_not(z, labels))
    rest = hot * own * divergence(others(v, labels), others(z, labels))
    return reduced(target, reduction), reduced(rest, reduction)


def dkd(
    student: Tensor,
    teacher: Tensor | Softened,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: Temperature = 4.0,
    teacher_temperature: float | None = None,
    student_temperature: float | None = None,
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
