"""BYOT: a network's deepest classifier teaches exits that leave it after its shallower stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdcache.methods.features.target_fields import stages_of
from kdcache.methods.logits.ce import Mix, ce
from kdcache.methods.logits.kd import kd
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.nets import Nets
from kdcache.methods.step import Step
from kdcache_stores.errors import UsageError


class Exit(nn.Module):
    """From the map of a stage to a vector of the deepest one's size, and the logits made of it.

    Convolutions of stride 2 until the map is as small as the last, a 1x1 convolution to its channels, the
    mean, a linear layer.

    Args:
        shape: (C, H, W) of the stage's map.
        last: (H, W) of the last stage's.
        features: of the vector that the network's own head sees.
        classes: of the logits.
    """

    def __init__(
        self, shape: tuple[int, ...], last: tuple[int, ...], features: int, classes: int
    ) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        while height > last[0] or width > last[1]:
            layers += [
                nn.Conv2d(channels, channels, 3, 2, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            height, width = (height + 1) // 2, (width + 1) // 2
        layers += [
            nn.Conv2d(channels, features, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
        ]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(features, classes)

    def forward(self, stage: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> the vector (B, D) and the logits (B, K)."""
        features = self.layers(stage).mean((2, 3))
        return features, self.head(features)


def byot(
    deepest: tuple[Tensor, Tensor],
    exits: list[tuple[Tensor, Tensor]],
    labels: Tensor,
    *,
    alpha: float,
    temperature: float,
    hint: float,
    mix: Mix | None = None,
) -> Terms:
    """What the exits learn of the labels and of the deepest classifier, per sample.

    The sum over exits i of (1 - alpha) CE_i + alpha T²·KL(deepest ‖ i) + hint ‖F_i - F‖².

    Args:
        deepest: (B, D) and (B, K), features and logits of the network; no gradient reaches them.
        exits: those of each exit.
        labels: (B,) int64.
        alpha: share of the divergence.
        temperature: T.
        hint: weight of the squared distances.
        mix: partner labels and lam of mixup or cutmix.

    Returns:
        "kd", the sum, and its three parts without their weights, "exits_ce", "exits_kl" and
        "exits_hint", (B,) each.

    Source: Zhang et al., Be Your Own Teacher, ICCV 2019, section 3.2.
    """
    features, logits = (values.detach() for values in deepest)
    labelled = torch.stack([ce(v, labels, mix=mix, reduction="none") for _, v in exits]).sum(0)
    divergences = torch.stack(
        [kd(v, logits, temperature=temperature, reduction="none") for _, v in exits]
    ).sum(0)
    hinted = torch.stack([(f - features).square().sum(1) for f, _ in exits]).sum(0)
    total = (1 - alpha) * labelled + alpha * divergences + hint * hinted
    return {"kd": total, "exits_ce": labelled, "exits_kl": divergences, "exits_hint": hinted}


class BYOT(Loss):
    """`byot` of an exit after each stage but the last; the exits are trained with the network.

    They are no part of the network that is measured and exported.
    """

    def build(self, nets: Nets) -> None:
        """The exits."""
        *self.names, last = stages_of(nets.student)
        if not self.names:
            raise UsageError(
                "byot leaves the network after its shallower stages, and it has one: use another student"
            )
        (features,), (classes,) = nets.student["pooled"], nets.student["logits"]
        size = nets.student[last][1:]
        self.exits = nn.ModuleList(
            Exit(nets.student[name], size, features, classes) for name in self.names
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
        """The terms of `byot`, (B,) each."""
        exits = [leave(student[name]) for name, leave in zip(self.names, self.exits, strict=True)]
        options = self.config.options
        return byot(
            (student["pooled"], student["logits"]),
            exits,
            labels,
            alpha=options["alpha"],
            temperature=options["temperature"],
            hint=options["hint"],
            mix=mix,
        )
