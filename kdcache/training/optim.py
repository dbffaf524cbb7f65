"""Optimizer and learning-rate schedule of a training, as the published recipes use them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

from kdcache_stores.errors import UnknownName, UsageError

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("step", "cosine", "one-cycle", "constant")


@dataclass(frozen=True)
class Optimization:
    """How long and with which steps a network is trained.

    The defaults are the CIFAR-100 recipe of the field: SGD, momentum 0.9 without Nesterov, weight decay
    5e-4, batches of 64, learning rate 0.05, a tenth of it after 62.5%, 75% and 87.5% of the epochs
    (150, 180 and 210 of 240).

    Attributes:
        milestones: fractions of the epochs after which the schedule "step" multiplies the rate by
            ``gamma``, rounded to whole epochs.
        warmup_epochs: the rate rises linearly from nearly 0 over so many epochs; with "one-cycle" the
            part of the cycle that rises (30% of the epochs if it is 0).
        clip: largest norm of the gradient over all parameters; None does not clip.
    """

    epochs: int = 240
    batch_size: int = 64
    lr: float = 0.05
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    lr_schedule: str = "step"
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise UnknownName("optimizer", self.optimizer, OPTIMIZERS)
        if self.lr_schedule not in SCHEDULES:
            raise UnknownName("learning-rate schedule", self.lr_schedule, SCHEDULES)
        limits = {"epochs": 1, "batch_size": 1, "lr": 0, "weight_decay": 0, "warmup_epochs": 0}
        for name, least in limits.items():
            if not getattr(self, name) >= least:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} must be at least {least}, not {getattr(self, name)}.")
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise UsageError(f"--warmup-epochs {self.warmup_epochs} leaves no epoch to train in.")
        if self.nesterov and not self.momentum:
            raise UsageError("--nesterov needs a --momentum above 0.")

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over ``parameters`` (those of the student, and of an objective that learns).

        One fused operation updates them all, five times faster than one after the other.
        """
        parameters = list(parameters)
        fused = all(parameter.is_floating_point() for parameter in parameters)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(
                parameters, lr=self.lr, weight_decay=self.weight_decay, fused=fused
            )
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=fused,
        )

    def make_scheduler(self, optimizer: torch.optim.Optimizer, total: int) -> LRScheduler:
        """The schedule; step it after every optimizer step.

        Args:
            total: optimizer steps in all epochs together.
        """
        rise = round(self.warmup_epochs * (total / self.epochs))
        if self.lr_schedule == "one-cycle":
            share = rise / total if rise else 0.3
            momentum = self.optimizer == "sgd" and self.momentum > 0
            return OneCycleLR(
                optimizer, self.lr, total_steps=total, pct_start=share, cycle_momentum=momentum
            )
        after: LRScheduler
        if self.lr_schedule == "cosine":
            after = CosineAnnealingLR(optimizer, T_max=total - rise)
        else:
            fractions = self.milestones if self.lr_schedule == "step" else ()
            ends = [round(fraction * self.epochs) * total // self.epochs for fraction in fractions]
            marks = [end - rise for end in ends]
            after = MultiStepLR(optimizer, marks, gamma=self.gamma)
        if not rise:
            return after
        before = LinearLR(optimizer, start_factor=1 / (rise + 1), total_iters=rise)
        return SequentialLR(optimizer, [before, after], milestones=[rise])
