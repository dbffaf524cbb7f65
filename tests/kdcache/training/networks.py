"""Networks for the tests, named as MODULE:FUNCTION."""

from __future__ import annotations

import torch
from torch import nn


def plain(classes: int, channels: int, size: int) -> nn.Module:
    """Without batch norm: what one sample gives does not depend on its neighbours."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * size * size, 32), nn.Tanh(), nn.Linear(32, classes),
    )  # fmt: skip


class Pooling(nn.Module):
    """Gives what its head sees beside its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        *body, self.head = network.children()
        self.body = nn.Sequential(*body)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = self.body(images)
        return {"logits": self.head(pooled), "pooled": pooled}


def pooling(classes: int, channels: int, size: int) -> nn.Module:
    """`plain` with the field pooled."""
    return Pooling(plain(classes, channels, size))


def with_dropout(classes: int, channels: int, size: int) -> nn.Module:
    """With randomness of its own, drawn from torch's generator."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(channels * size * size, 32), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(32, classes),
    )  # fmt: skip


def explosive(classes: int, channels: int, size: int) -> nn.Module:
    """Must never be called."""
    raise AssertionError("imported and called without leave")


class Frozen(nn.Module):
    """Logits that do not depend on the image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.new_zeros(len(images), 10)


def zero_head(classes: int, channels: int, size: int) -> nn.Module:
    """`plain` with its last layer at zero, as vision transformers are initialised."""
    network = plain(classes, channels, size)
    for parameter in network[-1].parameters():  # type: ignore[index]
        nn.init.zeros_(parameter)
    return network
