"""AT: where the stages of the two networks are active."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.fields.maps import attention, averaged
from kdcache.fields.spelling import tap_of
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.target_fields import field_of
from kdcache.methods.logits.ce import Mix
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.nets import Shapes
from kdcache.methods.step import Step
from kdcache_stores.errors import DataError, UsageError


def at(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Attention transfer, per sample: the mean squared difference of two attention maps, summed over stages.

    The larger feature map of a pair is averaged to the smaller one before it is squared, which is why the
    teacher's attention is given at the size that fits (`kdcache.fields.maps.attention_at`).

    Args:
        student: per stage the feature map (B, C, H, W).
        teacher: per stage the attention (B, h, w) of unit length, h at most H.

    Returns:
        (B,).

    Raises:
        DataError: a stage of the teacher is larger than the student's.

    Source: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, in the form of the
    published benchmarks (mdistiller).
    """
    terms = []
    for features, aim in zip(student, teacher, strict=True):
        if aim.shape[1] > features.shape[2]:
            raise DataError(
                f"at compares a stage {features.shape[2]} high with attention {aim.shape[1]} high: give "
                "the teacher's at the student's size"
            )
        own = attention(averaged(features, *aim.shape[1:]))
        terms.append((own - aim).square().mean((1, 2)))
    return torch.stack(terms).sum(0)


def pairs_of(student: Shapes, held: Shapes) -> list[tuple[str, str, int]]:
    """(field of the student, field of the teacher, its index) for each pair of stages.

    Stage i of the student is compared with stage i of the teacher, as long as both have one, at the smaller
    of their sizes. `attention_R` holds the stages that are at least R high, from the first on.

    Raises:
        UsageError: the teacher's attention is not held at a size that this needs.
    """
    heights = sorted((number_of(name) for name in held if _is_attention(name)), reverse=True)
    pairs = []
    for index, name in enumerate(name for name in student if name.startswith("stage_")):
        own = student[name][1]
        # The teacher's stage is as high as the highest field that holds it.
        of_stage = [height for height in heights if held[f"attention_{height}"][0] > index]
        if not of_stage:
            break
        height = min(own, of_stage[0])
        if height not in of_stage:
            raise UsageError(
                f"at compares stage {index + 1} at {height} x {height}, and the teacher's attention is held "
                f"at {', '.join(map(str, of_stage))}: dump it again, --fields attention for all sizes, or "
                f"--fields attention@{height}"
            )
        pairs.append((name, f"attention_{height}", index))
    if not pairs:
        raise UsageError(
            f"at reads attention of the teacher, found {', '.join(held) or 'no field'}: dump-teacher "
            "--fields attention, about 3,600 bytes a view of 32 x 32 pixels as float16"
        )
    return pairs


def _is_attention(name: str) -> bool:
    tap = tap_of(name)
    return tap is not None and tap.kind == "attention" and tap.number is not None


def number_of(name: str) -> int:
    """R of `attention_R`."""
    tap = tap_of(name)
    assert tap is not None
    assert tap.number is not None
    return tap.number


class AT(Loss):
    """`at` of the stages that both networks have, by their place."""

    @classmethod
    def reads(cls, config: ObjectiveConfig, student: Shapes, held: Shapes) -> tuple[str, ...]:
        """The attention at the sizes of the pairs."""
        return tuple(dict.fromkeys(field for _, field, _ in pairs_of(student, held)))

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
        shapes, held = (
            {n: tuple(v.shape[1:]) for n, v in f.items() if isinstance(v, Tensor)}
            for f in (student, target)
        )
        pairs = pairs_of(shapes, held)
        maps = [student[name] for name, _, _ in pairs]
        return {"kd": at(maps, [field_of(target, field)[:, index] for _, field, index in pairs])}
