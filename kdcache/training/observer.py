"""What a caller may watch of a training."""

from __future__ import annotations

from typing import Any, Protocol


class TrainingObserver(Protocol):
    """What a caller may watch of a training."""

    def note(self, text: str) -> None:
        """Something that a reader of the results should know, before the first step."""

    def step(self, epoch: int, done: int, total: int) -> None:
        """``done`` of ``total`` steps of the epoch (from 1) are through."""

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """An epoch ended with this record of ``metrics.jsonl``."""


class Unwatched:
    """Where nobody watches."""

    def note(self, text: str) -> None:
        """Ignore it."""

    def step(self, epoch: int, done: int, total: int) -> None:
        """Ignore it."""

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """Ignore it."""
