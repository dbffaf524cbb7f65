"""FitNet: one stage of the student, by a regressor, is the same stage of the teacher."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.target_fields import field_of
from kdcache.methods.logits.ce import Mix
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.nets import Nets, Shapes
from kdcache.methods.step import Step
from kdcache_stores.errors import DataError, UsageError


def fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared error of two maps of one shape (B, C, H, W), per sample: (B,).

    Raises:
        DataError: maps of other shapes.

    Source: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, in the one-stage form of the
    published benchmarks.
    """
    if student.shape != teacher.shape:
        raise DataError(
            f"fitnet compares maps of one shape, found {tuple(student.shape)} of the student and "
            f"{tuple(teacher.shape)} of the teacher"
        )
    return (student - teacher).square().mean((1, 2, 3))


class Regressor(nn.Module):
    """From the student's map (C, h, h) to the teacher's shape (C', H, H), with batch norm and ReLU.

    A 3x3 convolution of stride 2 where h = 2H, a transposed 4x4 one of stride 2 where 2h = H, one of
    1 + h - H where h >= H.

    Raises:
        UsageError: another ratio of the sides.
    """

    def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
        super().__init__()
        (inputs, h, _), (outputs, high, _) = student, teacher
        self.conv: nn.Module
        if h == 2 * high:
            self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        elif 2 * h == high:
            self.conv = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
        elif h >= high:
            self.conv = nn.Conv2d(inputs, outputs, 1 + h - high)
        else:
            raise UsageError(
                f"fitnet has no regressor from a map {h} high to one {high} high: choose another "
                "--fitnet-stage"
            )
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, h) -> (B, C', H, H)."""
        return F.relu(self.norm(self.conv(features)))


class FitNet(Loss):
    """`fitnet` of the student's stage through a regressor that is trained with it."""

    @property
    def name(self) -> str:
        """The field of both networks."""
        return _field(self.config)

    @classmethod
    def reads(cls, config: ObjectiveConfig, student: Shapes, held: Shapes) -> tuple[str, ...]:
        """The stage that is compared."""
        if _field(config) not in student:
            raise UsageError(
                f"fitnet compares stage {config.options['stage']}, and the student has the stages 1 to "
                f"{sum(name.startswith('stage_') for name in student)}: give another --fitnet-stage"
            )
        return (_field(config),)

    def build(self, nets: Nets) -> None:
        """The regressor."""
        self.regressor = Regressor(nets.student[self.name], nets.teacher[self.name])

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
        own = self.regressor(student[self.name])
        return {"kd": fitnet(own, field_of(target, self.name))}


def _field(config: ObjectiveConfig) -> str:
    return f"stage_{config.options['stage']}"
