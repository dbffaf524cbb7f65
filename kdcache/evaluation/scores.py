"""Accuracy and calibration of a network on the clean images of a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.views.plan import ViewPlan
from kdcache_stores import DataError, UsageError

BATCH = 512
ECE_BINS = 15


def resized(side: int) -> int:
    """The shorter side of an image before its central crop of that side, as usual on ImageNet."""
    return round(side * 256 / 224)


class CleanImages:
    """The un-augmented images of some rows of a dataset, to be measured on any number of times.

    A dataset in memory goes to the device once; files are decoded at each use.

    Args:
        dataset: where they are.
        rows: int64 (N,), which of them, in this order (default: all).
        size: side that the networks were trained at, or height and width; images of another size
            are resized to 256/224 of the side and cropped centrally, as usual on ImageNet. None
            takes images as they are.
        device: where the networks are.
        workers: processes that decode.

    Raises:
        UsageError: the networks' images are not square, and these have another size.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: np.ndarray | None = None,
        size: int | tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        self.rows = np.arange(len(dataset)) if rows is None else rows
        self.device, self.workers = device, workers
        way = "none"
        size = None if dataset.item else size
        height, width = size if isinstance(size, tuple) else (size, size)
        shape = dataset.image_shape
        if (
            height is not None
            and width is not None
            and (shape is None or shape[1:] != (height, width))
        ):
            if height != width:
                raise UsageError(
                    f"the network was trained at {height}x{width} pixels (height x width), images of "
                    f"{dataset.name} ({dataset.split}) have "
                    f"{'several sizes' if shape is None else f'{shape[1]}x{shape[2]}'}: a central crop is "
                    "square, so give them that size"
                )
            way = f"center-crop:size={width},resize={resized(width)}"
        self.plan = ViewPlan(dataset, make_augmentation(way, dataset), seed=0)

    def batches(self, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
        """Uint8 images (B, C, H, W) and int64 labels (B,) on the device, at most ``size`` at a time."""
        rows = [(self.rows[i : i + size], 0) for i in range(0, len(self.rows), size)]
        for batch in self.plan.stream(rows, device=self.device, workers=self.workers):
            yield batch.images, batch.labels

    @torch.inference_mode()
    def logits_of(
        self, networks: Sequence[Callable[[Tensor], Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each network float32 (N, K) logits and int64 (N,) labels, on the device.

        Args:
            networks: uint8 images (B, C, H, W) -> logits (B, K), in eval mode.
        """
        logits: list[list[Tensor]] = [[] for _ in networks]
        labels = []
        for images, batch_labels in self.batches():
            labels.append(batch_labels)
            for network, parts in zip(networks, logits, strict=True):
                parts.append(network(images).float())
        return [(torch.cat(parts), torch.cat(labels)) for parts in logits]


def clean_logits(
    network: Callable[[Tensor], Tensor],
    dataset: Dataset,
    size: int | tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits and labels of a whole dataset; arguments, return and errors as of `CleanImages`."""
    return CleanImages(dataset, None, size, device, workers).logits_of([network])[0]


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
        DataError: no sample is labelled, a label is not among the K classes, or a logit is not finite.
    """
    known = labels >= 0
    logits, labels = logits[known].float(), labels[known]
    if not len(labels):
        raise DataError("none of the samples has a label, so there is no accuracy to measure.")
    if (highest := int(labels.max())) >= logits.shape[1]:
        raise DataError(
            f"the network has {logits.shape[1]} classes, numbered from 0, but a sample has the label "
            f"{highest}: evaluate it on the dataset that it was trained for."
        )
    if bad := int((~logits.isfinite()).any(1).sum()):
        raise DataError(
            f"the network's logits are not finite for {bad} of {len(logits)} samples: its training "
            "diverged, or its weights are damaged. Train with a lower --lr."
        )
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


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T > 0 that minimises the negative log-likelihood of logits / T (Guo et al. 2017, sec. 4.2).

    Found by bounded scalar minimisation over log T in float64, between T = 0.02 and 50. Unlabelled
    samples (-1) are left out.

    Args:
        logits: float (N, K).
        labels: int64 (N,).
    """
    known = labels >= 0
    wide, wanted = logits[known].double().cpu(), labels[known].cpu()

    def nll(log_temperature: float) -> float:
        return F.cross_entropy(wide / math.exp(log_temperature), wanted).item()

    bounds = (math.log(0.02), math.log(50))
    fitted = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(fitted.x)


def calibration(
    logits: Tensor,
    labels: Tensor,
    fit_logits: Tensor | None = None,
    fit_labels: Tensor | None = None,
) -> dict[str, float]:
    """NLL and ECE at a fitted temperature.

    Args:
        logits: float (N, K), measured.
        labels: int64 (N,).
        fit_logits: what the temperature is fitted to (default: the same as is measured).
        fit_labels: their labels.

    Returns:
        temperature, calibrated_nll and calibrated_ece.
    """
    if fit_logits is None or fit_labels is None:
        fit_logits, fit_labels = logits, labels
    temperature = fit_temperature(fit_logits, fit_labels)
    calibrated = scores(logits / temperature, labels)
    return {
        "temperature": temperature,
        "calibrated_nll": calibrated["nll"],
        "calibrated_ece": calibrated["ece"],
    }
