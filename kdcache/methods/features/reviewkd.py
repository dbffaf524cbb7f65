"""ReviewKD: every level of the teacher is met by the student's own and all deeper ones, fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.fields.maps import averaged
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.target_fields import field_of, stages_of
from kdcache.methods.logits.ce import Mix
from kdcache.methods.logits.dkd import dkd_warmup
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.nets import Nets, Shapes
from kdcache.methods.step import Step
from kdcache_stores.errors import UsageError


def reviewkd(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Hierarchical context loss, per sample, summed over levels.

    Of each level the mean squared error of the maps as they are, and averaged to 4 x 4, 2 x 2 and 1 x 1 as far
    as they are larger than that, with the weights 1, 1/2, 1/4, 1/8 over their sum.

    Args:
        student: maps (B, C, H, W), by level.
        teacher: maps of the same shapes.

    Returns:
        (B,).

    Source: Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021.
    """
    levels = []
    for own, aim in zip(student, teacher, strict=True):
        total, weight, weights = _error(own, aim), 1.0, 1.0
        for side in (4, 2, 1):
            if side < own.shape[2]:
                weight /= 2
                weights += weight
                total = total + weight * _error(averaged(own, side), averaged(aim, side))
        levels.append(total / weights)
    return torch.stack(levels).sum(0)


def _error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean((1, 2, 3))


class Fusion(nn.Module):
    """Attention-based fusion of a level with what came from the deeper ones.

    Args:
        inputs: channels of the student's level.
        middle: of what is fused.
        outputs: of the teacher's level.
        fuse: whether there is a deeper level.
    """

    def __init__(self, inputs: int, middle: int, outputs: int, fuse: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(
            nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle)
        )
        self.widen = nn.Sequential(
            nn.Conv2d(middle, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.gate = nn.Conv2d(2 * middle, 2, 1) if fuse else None
        for layers in (self.narrow, self.widen):
            conv = layers[0]
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, height: int) -> tuple[Tensor, Tensor]:
        """The level for the teacher's, (B, outputs, height, height), and what the next level takes."""
        x = self.narrow(x)
        if self.gate is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            gates = self.gate(torch.cat([x, deeper], 1)).sigmoid()
            x = x * gates[:, :1] + deeper * gates[:, 1:]
        if x.shape[3] != height:
            x = F.interpolate(x, (height, height), mode="nearest")
        return self.widen(x), x


class ReviewKD(Loss):
    """`reviewkd` of all stages and the pooled vector, the teacher's before their last ReLU, with a warm-up.

    The student's stages are those after their ReLU, or before it, as published for ImageNet.
    """

    @classmethod
    def reads(cls, config: ObjectiveConfig, student: Shapes, held: Shapes) -> tuple[str, ...]:
        """All stages before their ReLU, and the pooled vector."""
        own, its = stages_of(student, _ending(config)), stages_of(held, "_pre")
        if its and len(own) != len(its):
            raise UsageError(
                f"reviewkd compares stage by stage, and the student has {len(own)}, the teacher {len(its)}"
            )
        return (*(f"{name}_pre" for name in own), "pooled")

    def build(self, nets: Nets) -> None:
        """A fusion for each level."""
        self.ending = _ending(self.config)
        self.names = stages_of(nets.student, self.ending)
        own = [nets.student[name + self.ending] for name in self.names]
        own.append((*nets.student["pooled"], 1, 1))
        its = [
            *(nets.teacher[f"{name}_pre"] for name in self.names), (*nets.teacher["pooled"], 1, 1)
        ]  # fmt: skip
        middle = min(int(self.config.options["middle"]), own[-1][0])
        self.heights = [shape[1] for shape in its]
        self.fusions = nn.ModuleList(
            Fusion(inputs[0], middle, outputs[0], fuse=level < len(own) - 1)
            for level, (inputs, outputs) in enumerate(zip(own, its, strict=True))
        )

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
        own = [student[name + self.ending] for name in self.names]
        own.append(student["pooled"][:, :, None, None])
        its = [*(field_of(target, f"{name}_pre") for name in self.names)]
        its.append(field_of(target, "pooled")[:, :, None, None])
        deeper: Tensor | None = None
        levels: list[Tensor] = []
        for level in reversed(range(len(own))):
            fused, deeper = self.fusions[level](own[level], deeper, self.heights[level])
            levels.insert(0, fused)
        epochs = int(self.config.options["warmup"])
        warmup = step.number("reviewkd warm-up", lambda epoch, _: dkd_warmup(epoch, epochs))
        return {"kd": warmup * reviewkd(levels, its)}


def _ending(config: ObjectiveConfig) -> str:
    """How the fields of the student's stages end."""
    return "_pre" if config.options["relu"] == "before" else ""
