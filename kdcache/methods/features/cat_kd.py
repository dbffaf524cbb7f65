"""CAT-KD: class activation maps, where in the image each class is seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.fields.maps import averaged
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.target_fields import choose_last, last_at
from kdcache.methods.logits.ce import Mix
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.nets import Nets, Shapes
from kdcache.methods.step import Step
from kdcache.models.taps import head_of
from kdcache_stores.errors import DataError, UsageError


def cat_kd(student: Tensor, teacher: Tensor, *, size: int = 2, normalise: str = "none") -> Tensor:
    """Class attention transfer, per sample: the mean squared error of class activation maps.

    Args:
        student: (B, K, H, W), its last map through the weights of its head.
        teacher: (B, K, h, w), the same of the teacher, or averaged already.
        size: both are averaged to size x size first.
        normalise: "l2" gives the averaged map of each class unit length, "none" does not.

    Returns:
        (B,).

    Raises:
        DataError: another number of classes.

    Source: Guo et al., Class Attention Transfer Based Knowledge Distillation, CVPR 2023.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise DataError(
            f"cat-kd compares maps of the same classes, found {tuple(student.shape)} of the student and "
            f"{tuple(teacher.shape)} of the teacher"
        )
    maps = [averaged(m, size) for m in (student, teacher)]
    if normalise == "l2":
        maps = [F.normalize(m.flatten(2), dim=2) for m in maps]
    own, aim = maps
    return (own - aim).square().flatten(1).mean(1)


def activation_maps(last: Tensor, weight: Tensor) -> Tensor:
    """(B, D, H, W) through the head's weight (K, D), whose bias has no part: (B, K, H, W).

    A 1x1 convolution: averaging before it or after it gives the same.
    """
    return torch.einsum("kd,bdhw->bkhw", weight, last)


def without_bias(network: nn.Module, nets: Nets, options: Mapping[str, Any]) -> nn.Module:
    """The network with a head whose bias is and stays 0: its logits are the means of its activation maps."""
    head = head_of(network)
    if head is not None and head.bias is not None:
        nn.init.zeros_(head.bias)
        head.bias.requires_grad_(False)
    return network


class CATKD(Loss):
    """`cat_kd` with the teacher's maps made of its last one and its head."""

    head_weight: Tensor

    @classmethod
    def reads(cls, config: ObjectiveConfig, student: Shapes, held: Shapes) -> tuple[str, ...]:
        """The smallest last map that averages to the size of the comparison."""
        size = int(config.options["size"])
        if size > student["cam"][1]:
            raise UsageError(
                f"cat-kd compares maps of {size} x {size}, and the student's last is "
                f"{student['cam'][1]} high: give a smaller --cat-kd-size"
            )
        return (choose_last(held, size, "cat-kd"),)

    def build(self, nets: Nets) -> None:
        """Keep the weights of the teacher's head."""
        if nets.head is None:
            raise UsageError(
                "cat-kd needs the teacher's last layer, and its store keeps none: dump the field last of a "
                "network of the zoo, of torchvision or of timm, or name that layer `head`"
            )
        self.register_buffer("head_weight", nets.head[0], persistent=False)

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
        own, size = student["cam"], int(self.config.options["size"])
        maps = activation_maps(last_at(target, size, size), self.head_weight.to(own.dtype))
        return {"kd": cat_kd(own, maps, size=size, normalise=str(self.config.options["normalise"]))}
