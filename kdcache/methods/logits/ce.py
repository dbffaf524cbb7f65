"""Cross-entropy with the labels, of single and of mixed images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.methods.scaling import Reduction, full_precision, reduced

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
