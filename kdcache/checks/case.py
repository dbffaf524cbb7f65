"""What is checked: a loss, the stores that it reads, the samples that it reads them for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kdcache.checks.earlier_runs import Baseline, Fit, Pruned
from kdcache.checks.sample import Sample, draw
from kdcache.data.dataset import Rows
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.objective import Objective
from kdcache.methods.step import Step
from kdcache.teachers.trials import Trials
from kdcache_stores import Store

#: An epoch after every warm-up.
LATE = 10**6


@dataclass(frozen=True)
class Case:
    """A training that is about to begin, or a store alone; what is None is not known.

    Attributes:
        stores: of one plan; empty where the training reads no logits.
        objective: the loss; None checks the stores as for plain KD.
        labels: int64, of the student's samples, -1 where unlabelled; None: those of the stores' rows.
        rows: int64, rows of the stores that the student trains on; None: all.
        views: numbers of the stored views that it reads, in order; None: all.
        epochs: of the student.
        batch_size: samples per step.
        baseline: a student of this kind trained by cross-entropy alone.
        fit: how well a student fits these stores, from its run.
        prune: what went of the student in the training that `fit` is of.
        trials: what a live teacher predicts with other preprocessing.
    """

    stores: Sequence[Store] = ()
    objective: ObjectiveConfig | None = None
    labels: Rows | None = None
    rows: Rows | None = None
    views: range | None = None
    epochs: int | None = None
    batch_size: int | None = None
    baseline: Baseline | None = None
    fit: Fit | None = None
    prune: Pruned | None = None
    trials: Trials | None = None

    @property
    def first(self) -> Store:
        """The first store; there must be one."""
        return self.stores[0]

    @cached_property
    def loss(self) -> ObjectiveConfig:
        """The loss with every default filled in; plain KD where none is given."""
        return (self.objective or ObjectiveConfig(method="kd")).resolved()

    @cached_property
    def own_labels(self) -> Rows | None:
        """int64, the labels of the student's samples; None where nothing is known of them."""
        if self.labels is not None or not self.stores:
            return self.labels
        return self.first.labels if self.rows is None else self.first.labels[self.rows]

    @property
    def labelled(self) -> bool:
        """Whether any of the student's samples has a label; assumed where nothing is known of them."""
        return self.own_labels is None or bool((self.own_labels >= 0).any())

    @property
    def augmentation(self) -> str:
        """The name of the views' augmentation."""
        return str(self.first.plan.augmentation.get("name", ""))

    @property
    def mixed(self) -> bool:
        """Whether the views are of two samples each, so that one label is not the whole truth."""
        return self.augmentation in ("mixup", "cutmix")

    @property
    def used(self) -> range:
        """The views that the student reads."""
        stored = range(
            max(store.view_range.start for store in self.stores),
            min(store.view_range.stop for store in self.stores),
        )
        return stored if self.views is None else self.views

    def finished(self, fit: Fit, baseline: Baseline | None = None) -> Case:
        """The same with the student trained, and its baseline by now; what was read is not read again."""
        case = dataclasses.replace(self, fit=fit, baseline=baseline)
        for name in ("sample", "uniform"):
            if name in vars(self):
                vars(case)[name] = vars(self)[name]
        return case

    @cached_property
    def sample(self) -> Sample:
        """Logits to look at; read once, when a rule first needs it."""
        used = self.used
        if self.epochs is not None and len(used) > self.epochs:
            used = used[: self.epochs]
        if self.augmentation == "weak+strong":  # the weak views, which are of one distribution
            used = range(used.start + used.start % 2, used.stop, 2)
        return draw(self.stores, used, self.rows)

    def tensors(self) -> tuple[Tensor, ...]:
        """Per store float32 (V x R, K), the sample's logits, view after view."""
        return tuple(torch.from_numpy(z).flatten(0, 1) for z in self.sample.logits)

    @cached_property
    def uniform(self) -> dict[str, float] | None:
        """`uniform_at` an epoch when every warm-up is over."""
        return self.uniform_at(LATE)

    def uniform_at(self, epoch: int) -> dict[str, float] | None:
        """The parts of the loss in an epoch for a student with a uniform output: equal logits for all
        classes.

        As `Objective` returns them, noise left out; None where there is no such number: the method
        compares whole batches, trains its temperature, reads features, or lacks labels.
        """
        method = self.loss.record
        if method.whole_batch or self.loss.temperature is None:
            return None
        if self.loss.teacher_fields != ("logits",):
            return None
        if method.needs_labels and not self.known.all():
            return None
        options = dataclasses.replace(self.loss, noise=None, ablation="full")
        teachers = self.tensors()
        labels = torch.from_numpy(np.tile(self.sample.labels, len(self.sample.views)))
        with torch.no_grad():
            _, parts = Objective(options)(
                {"logits": torch.zeros_like(teachers[0])},
                [{"logits": teacher} for teacher in teachers],
                labels,
                Step(epoch=epoch),
            )
        return {name: float(value) for name, value in parts.items()}

    @cached_property
    def known(self) -> np.ndarray:
        """bool (R,): which rows of the sample have a label."""
        return self.sample.labels >= 0
