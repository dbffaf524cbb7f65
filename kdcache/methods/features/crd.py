"""CRD: the student's embedding of a sample belongs to the teacher's of the same, among many others."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.target_fields import field_of
from kdcache.methods.logits.ce import Mix
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.nets import Nets
from kdcache.methods.samples import Places
from kdcache.methods.step import Step
from kdcache.philox import derive_seed
from kdcache_stores.errors import DataError, UsageError

EPSILON = 1e-7
WHOLE_BANK = 16
"""A bank of up to so many times the negatives is multiplied whole, and the scores are picked from that:
one matrix product instead of a copy of 16,384 rows for each sample."""


def crd(scores: Tensor, samples: int) -> Tensor:
    """Noise-contrastive estimation, per sample: -[log P/(P + K/N) + sum over negatives log (K/N)/(P' + K/N)].

    Args:
        scores: (B, 1 + K), exp(similarity / T) / Z of the positive, then of K negatives.
        samples: N, of the training; a negative is drawn with probability 1/N.

    Returns:
        (B,).

    Source: Tian et al., Contrastive Representation Distillation, ICLR 2020, eq. 18, in the form and with the
    1e-7 of the published code.
    """
    noise = (scores.shape[1] - 1) / samples
    positive, negatives = scores[:, 0], scores[:, 1:]
    log_positive = (positive / (positive + noise + EPSILON)).log()
    log_negatives = (noise / (negatives + noise + EPSILON)).log()
    return -(log_positive + log_negatives.sum(1))


def similarities(vectors: Tensor, bank: Tensor, places: Tensor) -> Tensor:
    """Products of vectors (B, D) with the rows of a bank (N, D) at some places (B, M): (B, M)."""
    if len(bank) <= WHOLE_BANK * places.shape[1]:
        return (vectors @ bank.mT).gather(1, places)
    return torch.einsum("bd,bmd->bm", vectors, bank[places])


class CRD(Loss):
    """`crd` both ways: the student's embedding in the teacher's memory bank, and the other way round.

    Both embeddings are trained, a linear layer to unit length each. A bank remembers the embedding of every
    sample, a moving average over epochs, and is part of the checkpoint. Negatives are samples of other
    classes, drawn with replacement (the published code draws without), by (seed, epoch, step). Z is fixed at
    the first step.
    """

    remembers = True
    of_student: Tensor
    of_teacher: Tensor
    scale: Tensor
    by_class: Tensor
    first: Tensor
    count: Tensor

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        names = ("negatives", "momentum", "dim")
        self.negatives, self.momentum, self.dim = (config.options[name] for name in names)
        self.contrast_temperature = config.options["temperature"]

    def build(self, nets: Nets) -> None:
        """Embeddings, banks, and the samples by class."""
        self.places = Places(nets, "crd")
        assert nets.keys is not None
        if nets.labels is None:
            raise UsageError("crd draws negatives of other classes: Nets(labels=...) is needed")
        labels = nets.labels[nets.keys.argsort()]
        if int(labels.min()) < 0:
            raise DataError("crd draws negatives of other classes: every sample needs its label")
        if int(labels.min()) == int(labels.max()):
            raise DataError(
                "crd draws negatives of other classes, and all samples are of one class"
            )
        count = torch.bincount(labels)
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("count", count, persistent=False)
        self.register_buffer("first", count.cumsum(0) - count, persistent=False)
        self.embed_student = nn.Linear(nets.student["pooled"][0], self.dim)
        self.embed_teacher = nn.Linear(nets.teacher["pooled"][0], self.dim)
        bound = 1 / math.sqrt(self.dim / 3)
        for name in ("of_student", "of_teacher"):
            bank = torch.empty(len(self.places), self.dim).uniform_(-bound, bound)
            self.register_buffer(name, bank)
        self.register_buffer("scale", torch.full((2,), -1.0))

    def draw(self, places: Tensor, labels: Tensor, step: Step) -> Tensor:
        """(B, 1 + K): the place of each sample, then those of its negatives."""
        generator = torch.Generator(places.device)
        generator.manual_seed(derive_seed(step.seed, "negatives", step.epoch, step.index))
        numbers = torch.randint(
            2**62, (len(places), self.negatives), generator=generator, device=places.device
        )
        own = self.count[labels][:, None]
        index = numbers % (len(self.places) - own)
        index = index + own * (index >= self.first[labels][:, None])
        return torch.cat([places[:, None], self.by_class[index]], 1)

    def forward(
        self,
        student: Fields,
        target: TargetFields,
        labels: Tensor,
        step: Step,
        mix: Mix | None,
        **shared: Any,
    ) -> Terms:
        """The term "kd", (B,). In training mode the banks take in the embeddings."""
        places = self.places.of(step)
        chosen = self.draw(places, labels, step)
        own = F.normalize(self.embed_student(student["pooled"].to(self.of_student.dtype)), dim=1)
        aim = F.normalize(self.embed_teacher(field_of(target, "pooled").to(own.dtype)), dim=1)
        scores = [
            (similarities(vectors, bank, chosen) / self.contrast_temperature).exp()
            for vectors, bank in ((own, self.of_teacher), (aim, self.of_student))
        ]
        count = len(self.places)
        means = torch.stack([part.detach().mean() for part in scores]) * count
        scale = torch.where(self.scale < 0, means, self.scale)
        if self.training:
            self.scale = scale
            self.of_student = self._remember(self.of_student, places, own)
            self.of_teacher = self._remember(self.of_teacher, places, aim)
        return {"kd": crd(scores[0] / scale[0], count) + crd(scores[1] / scale[1], count)}

    @torch.no_grad()
    def _remember(self, bank: Tensor, places: Tensor, vectors: Tensor) -> Tensor:
        """Another bank: this one is part of the graph of the step."""
        mean = self.momentum * bank[places] + (1 - self.momentum) * vectors
        return bank.index_copy(0, places, F.normalize(mean, dim=1))
