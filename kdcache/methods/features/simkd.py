"""SimKD: the student's last map is projected onto the teacher's, whose head then classifies it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.fields.spelling import is_last
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.target_fields import choose_last, last_at
from kdcache.methods.logits.ce import Mix
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.nets import Nets, Shapes
from kdcache.methods.step import Step
from kdcache.models.projected import Projected
from kdcache_stores.errors import DataError, UsageError


def simkd(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared error of two maps, per sample.

    Args:
        student: (B, D, H, W), projected to the teacher's channels.
        teacher: (B, D, H, W).

    Returns:
        (B,).

    Raises:
        DataError: maps of other shapes.

    Source: Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022.
    """
    if student.shape != teacher.shape:
        raise DataError(
            f"simkd compares maps of one shape, found {tuple(student.shape)} of the student and "
            f"{tuple(teacher.shape)} of the teacher"
        )
    return (student - teacher).square().mean((1, 2, 3))


def with_projector(network: nn.Module, nets: Nets, options: Mapping[str, Any]) -> nn.Module:
    """The network that SimKD trains: with a projector and the teacher's head.

    Raises:
        UsageError: the teacher's head is not known.
    """
    if nets.head is None:
        raise UsageError(
            "simkd predicts with the teacher's last layer, and its store keeps none: dump the field last "
            "of a network of the zoo, of torchvision or of timm, or name that layer `head`"
        )
    weight, bias = nets.head
    inputs, height, _ = nets.student["last"]
    field = next(name for name in nets.teacher if is_last(name))
    channels, its_height, _ = nets.teacher[field]
    smaller = its_height if its_height < height else None
    projected = Projected(network, inputs, channels, len(bias), int(options["factor"]), smaller)
    with torch.no_grad():
        projected.head.weight.copy_(weight)
        projected.head.bias.copy_(bias)
    return projected


class SimKD(Loss):
    """`simkd` of the projected map and the teacher's last, at the smaller of the two sizes."""

    @classmethod
    def reads(cls, config: ObjectiveConfig, student: Shapes, held: Shapes) -> tuple[str, ...]:
        """The teacher's last map at the student's size, or whole where that is smaller."""
        return (choose_last(held, student["last"][1], "simkd"),)

    def forward(
        self,
        student: Fields,
        target: TargetFields,
        labels: Tensor,
        step: Step,
        mix: Mix | None,
        **shared: Any,
    ) -> Terms:
        """The term "kd", (B,)."""
        own = student["last"]
        return {"kd": simkd(own, last_at(target, own.shape[2], own.shape[3]))}
