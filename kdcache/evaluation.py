"""Accuracy and calibration of a network on the clean images of a split."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.datasets import Dataset
from kdcache.views import ViewPlan, make_augmentation
from kdcache_stores import DataError

BATCH = 512
ECE_BINS = 15


@torch.inference_mode()
def clean_logits(
    network: Callable[[Tensor], Tensor],
    dataset: Dataset,
    rows: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits of the un-augmented images, in the order of ``rows`` (default: all).

    Args:
        network: uint8 images (B, C, H, W) -> logits (B, K), in eval mode.

    Returns:
        float32 (N, K) logits and int64 (N,) labels, on ``device``.
    """
    rows = np.arange(len(dataset)) if rows is None else rows
    plan = ViewPlan(dataset, make_augmentation("none", dataset), seed=0)
    batches = [(rows[i : i + BATCH], 0) for i in range(0, len(rows), BATCH)]
    logits, labels = [], []
    for batch in plan.stream(batches, device=device, workers=workers):
        logits.append(network(batch.images).float())
        labels.append(batch.labels)
    return torch.cat(logits), torch.cat(labels)


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and calibration of logits against labels; unlabelled samples (-1) are left out.

    Args:
        logits: float (N, K).
        labels: int64 (N,).

    Returns:
        top1, top5: in [0, 1] (top5 is over min(5, K) classes); nll: mean negative log-likelihood in
        nats; ece: expected calibration error over 15 equal-width bins of the confidence (Guo et al.
        2017, eq. 3), in [0, 1].

    Raises:
        DataError: no sample is labelled.
    """
    known = labels >= 0
    logits, labels = logits[known].float(), labels[known]
    if not len(labels):
        raise DataError("none of the samples has a label, so there is no accuracy to measure.")
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hit = best == labels[:, None]
    confidence, correct = logits.softmax(1).max(1).values, hit[:, 0].float()
    bins = (confidence * ECE_BINS).long().clamp_(max=ECE_BINS - 1)
    gap = torch.zeros(ECE_BINS, device=logits.device).index_add_(0, bins, confidence - correct)
    return {
        "top1": hit[:, 0].float().mean().item(),
        "top5": hit.any(1).float().mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": (gap.abs().sum() / len(labels)).item(),
    }
