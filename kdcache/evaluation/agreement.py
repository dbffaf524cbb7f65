"""How close a student's outputs are to its teacher's, on the same views."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from kdcache.augment.augmentation import Augmentation
from kdcache.data.dataset import Dataset
from kdcache.methods.logits.kd import kd
from kdcache.views.cached import CachedViews
from kdcache_stores import Store

TAU = 2.0  # the temperature of the Z-scored divergence, that of the published method


def rank_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Spearman's correlation over the classes of each sample, ties with their mean rank.

    Args:
        student: float (N, K).
        teacher: float (N, K).

    Returns:
        float64 (N,), NaN where one of the rows is constant.
    """
    ranks = (rankdata(np.asarray(logits.cpu()), axis=1) for logits in (student, teacher))
    a, b = (torch.from_numpy(rank - rank.mean(1, keepdims=True)) for rank in ranks)
    correlation: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return correlation


def agreement(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """A student's logits compared with its teacher's, sample by sample, then averaged.

    Args:
        student: float (N, K).
        teacher: float (N, K).

    Returns:
        kl: KL(teacher ‖ student) at T = 1, in nats; kl_standardized: the same of the Z-scores at
        tau = 2 (without the factor tau²); top1_agreement: share of samples with the same largest
        logit; rank_correlation: Spearman over classes, of the rows where it is defined; std_ratio: the
        student's standard deviation over classes divided by the teacher's.
    """
    zscored = kd(student, teacher, temperature=TAU, standardize="unbiased") / TAU**2
    return {
        "kl": kd(student, teacher, temperature=1.0).item(),
        "kl_standardized": zscored.item(),
        "top1_agreement": (student.argmax(1) == teacher.argmax(1)).float().mean().item(),
        "rank_correlation": rank_correlation(student, teacher).nanmean().item(),
        "std_ratio": (student.std(1) / teacher.std(1)).nanmean().item(),
    }


@torch.inference_mode()
def agreement_with_store(
    network: Callable[[Tensor], Tensor],
    dataset: Dataset,
    store: Store,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
    workers: int = 0,
    augmentation: Augmentation | None = None,
) -> dict[str, float]:
    """`agreement` over all views of a store that the dataset's samples have.

    Args:
        network: uint8 images (B, C, H, W) -> logits (B, K), in eval mode.
        augmentation: of the store, needed where it is a user's own.

    Raises:
        MismatchError: the store is of other samples, or its views do not replay.
    """
    student, teacher = [], []
    with CachedViews(
        dataset, [store], batch_size, augmentation=augmentation, device=device, workers=workers,
        subset=True,
    ) as views:  # fmt: skip
        for view in range(store.n_views):
            for batch in views.epoch(view):
                student.append(network(batch.images).float().cpu())
                teacher.append(batch.teachers[0]["logits"].cpu())
    result = agreement(torch.cat(student), torch.cat(teacher))
    return result | {"views": store.n_views, "samples": len(views.rows)}
