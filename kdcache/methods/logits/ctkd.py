"""CTKD: a temperature that is trained against the student."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.logits.ce import Mix
from kdcache.methods.logits.kd import KD, kd
from kdcache.methods.loss import Fields, TargetFields, Terms
from kdcache.methods.scaling import SoftmaxTarget
from kdcache.methods.step import Number, Step


def reversal(epoch: int, ramp: int = 10) -> float:
    """λ_e = -(1 - cos(π·min(e, E)/E))/2: from 0 down to -1 in the first E = `ramp` epochs.

    `epoch` counts from 0, the published e = epoch + 1 from 1. A ramp of 0 is -1 from the start.
    """
    share = min((epoch + 1) / ramp, 1.0) if ramp else 1.0
    return -(1 - math.cos(math.pi * share)) / 2


def learned_temperature(
    theta: Tensor, *, strength: Number = -1.0, start: float = 1.0, end: float = 20.0
) -> Tensor:
    """T = start + end·σ(θ), with the gradient of θ multiplied by `strength`.

    A negative strength reverses it: the optimizer that lowers the student's loss raises it in θ, so
    one optimizer plays both sides. The value does not depend on `strength`.
    """
    reversed_ = theta.detach() + strength * (theta - theta.detach())
    return start + end * reversed_.sigmoid()


def ctkd(
    student: Tensor,
    teacher: Tensor | SoftmaxTarget,
    theta: Tensor,
    *,
    strength: float = -1.0,
    start: float = 1.0,
    end: float = 20.0,
    **options: Any,
) -> Tensor:
    """Curriculum temperature: KD at a learned T, which is in both softmaxes and in T².

    Args:
        student: (B, K) logits v, any floating dtype.
        teacher: (B, K) logits z, or several teachers as an `Ensemble`.
        theta: 0-d parameter θ, published start 1 (T = 15.62), in the same optimizer as the student
            with its learning rate and weight decay.
        strength: λ_e of the epoch, see `reversal`.
        start: smallest temperature; 2 with standardization.
        end: range of temperatures above it.
        options: as of `kd`, but its temperatures.

    Returns:
        A 0-d tensor, or (B,) with reduction "none", in nats.

    Source: Li et al., Curriculum Temperature for Knowledge Distillation, AAAI 2023; the global
    variant, which is the official setting.
    """
    temperature = learned_temperature(theta, strength=strength, start=start, end=end)
    return kd(student, teacher, temperature=temperature, **options)


class CTKD(KD):
    """KD at `learned_temperature` of θ, whose gradient is reversed more and more over the first epochs."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self.start, self.end, self.ramp = (
            config.options[name] for name in ("start", "end", "ramp")
        )
        self.theta = nn.Parameter(torch.ones(()))

    def shared(self, student: Fields, step: Step) -> dict[str, Any]:
        """The temperature of the step, as of `KD` besides."""
        strength = step.number("ctkd strength", lambda epoch, _: reversal(epoch, self.ramp))
        temperature = learned_temperature(
            self.theta, strength=strength, start=self.start, end=self.end
        )
        return super().shared(student, step) | {"temperature": temperature}

    def forward(
        self,
        student: Fields,
        target: TargetFields,
        labels: Tensor,
        step: Step,
        mix: Mix | None,
        **shared: Any,
    ) -> Terms:
        """The term "kd", (B,), and the "temperature", 0-d."""
        terms = super().forward(student, target, labels, step, mix, **shared)
        return terms | {"temperature": shared["temperature"]}
