"""RKD: distances between the samples of a batch, and angles of every three of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.methods.features.target_fields import field_of
from kdcache.methods.logits.ce import Mix
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.step import Step
from kdcache_stores.errors import DataError

LEAST_SQUARE = 1e-12
"""A squared distance is at least this, as in the published code."""


def rkd(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Relational distillation: distance·D + angle·A, each a smooth L1 of student and teacher.

    D compares the Euclidean distances of all pairs, over the mean distance of the batch; A the cosines
    of the angles at the middle sample of all triplets. Scale and dimension of the vectors have no part
    in either. A pair of equal vectors has the angle's cosine 0.

    >>> corner = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    >>> line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    >>> rkd(2 * corner, corner).item()
    0.0
    >>> f"{rkd(line, corner, angle=0):.4f} {rkd(line, corner, distance=0):.4f}"
    '1.7925 6.4815'

    Args:
        student: (B, D) vectors, any floating dtype.
        teacher: (B, D') vectors.
        distance: weight of D.
        angle: weight of A.

    Returns:
        A 0-d tensor: samples are compared with each other.

    Raises:
        DataError: not a vector per sample, or of another number of samples.

    Source: Park et al., Relational Knowledge Distillation, CVPR 2019.
    """
    for vectors, whose in ((student, "the student"), (teacher, "the teacher")):
        if vectors.ndim != 2 or len(vectors) != len(student):
            raise DataError(
                f"rkd compares a vector per sample, ({len(student)}, D), found "
                f"{tuple(vectors.shape)} of {whose}"
            )
    (d, a), (e, b) = relations(student), relations(teacher)
    return distance * F.smooth_l1_loss(d, e) + angle * F.smooth_l1_loss(a, b)


def relations(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Distances over their mean, (B, B), and cosines, (B, B, B): at the first sample, of the other two."""
    differences = vectors[None] - vectors[:, None]
    distances = differences.square().sum(-1).clamp(min=LEAST_SQUARE).sqrt()
    count = len(vectors)
    others = 1 - torch.eye(count, dtype=vectors.dtype, device=vectors.device)
    distances = distances * others
    mean = distances.sum() / max(count * (count - 1), 1)
    directions = F.normalize(differences, dim=-1)
    return distances / mean.clamp(min=LEAST_SQUARE), directions @ directions.mT


class RKD(Loss):
    """`rkd` of the pooled vectors."""

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
        return {"kd": rkd(student["pooled"], field_of(target, "pooled"), **self.config.options)}
