"""The two networks and the samples that a loss with parts of its own is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each field per row."""


@dataclass(frozen=True)
class Nets:
    """What is known of student, teacher and samples before the first step.

    Attributes:
        student: the fields that are read of the student, by stored name.
        teacher: those that are read of each teacher; of the first teacher.
        head: weight (K, D) and bias (K,), float32, of the first teacher's last layer, if it is there.
        keys: int64 (N,), 64 bits of each sample's key, as `Step.keys`.
        labels: int64 (N,), -1 where unlabelled.
        norms: weight and bias (C,) of the batch norm before the ReLU of each stage of a teacher in the
            loop, by the field of that stage, as far as it has one.
    """

    student: Shapes
    teacher: Shapes
    head: tuple[Tensor, Tensor] | None = None
    keys: Tensor | None = None
    labels: Tensor | None = None
    norms: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
