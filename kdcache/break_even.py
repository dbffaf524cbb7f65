"""What a store saves: teacher forwards spent once against forwards that each student epoch would cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class BreakEven(NamedTuple):
    """The account of one store, in forward passes of its teacher.

    Attributes:
        spent: forwards that filled the store, once: views times samples.
        saved_per_epoch: forwards that an epoch of one student needs with the teacher in the loop.
        epochs: student epochs, over all students together, after which the store has paid for itself.
    """

    spent: int
    saved_per_epoch: int
    epochs: float

    def saving(self, epochs: int, students: int = 1) -> float:
        """Share of the online forwards saved by so many students of so many epochs; below 0: a loss."""
        return 1 - self.epochs / (epochs * students)

    def sentence(self, epochs: int = 240) -> str:
        """The account for people, for students of ``epochs`` epochs (240: the CIFAR-100 recipes)."""
        words = [f"pays off after {self.epochs:g} student epochs"]
        for students, name in ((1, "one student"), (3, "three students")):
            saved = self.saving(epochs, students)
            share = f"{saved:.1%} fewer" if saved >= 0 else f"{-saved:.1%} more"
            words.append(f"{name} of {epochs} epochs: {share} than online")
        return "; ".join(words)


def break_even(info: dict[str, Any]) -> BreakEven:
    """The account of the store that `describe` gives."""
    return account(int(info["samples"]), int(info["views"]), info["plan"]["augmentation"])


def account(samples: int, views: int, augmentation: Mapping[str, Any]) -> BreakEven:
    """The account of a store of so many views, whose plan describes its augmentation so.

    An epoch online takes one forward per sample, and two where views come in weak and strong pairs.
    """
    per_epoch = 2 if augmentation.get("name") == "weak+strong" else 1
    return BreakEven(views * samples, per_epoch * samples, views / per_epoch)
