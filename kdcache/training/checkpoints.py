"""Checkpoints on their way to the disk: copied at the end of an epoch, written by a thread when due."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor

from kdcache.runs import Run
from kdcache_stores import UsageError

_SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Pace:
    """How often a training writes its checkpoint; the last epoch's is always written.

    Attributes:
        epochs: at most once in so many.
        seconds: at most once in so many.
    """

    epochs: int = 1
    seconds: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Pace:
        """From the command line: "10" (epochs), or a time such as "90s", "5m" or "1h".

        >>> Pace.parse("10"), Pace.parse("5m")
        (Pace(epochs=10, seconds=0.0), Pace(epochs=1, seconds=300.0))

        Raises:
            UsageError: neither.
        """
        match = re.fullmatch(r"(\d+)([smh]?)", text)
        if match is None or not int(match[1]):
            raise UsageError(
                f"--checkpoint-every {text}: expected a number of epochs such as 10, or a time such as "
                "90s, 5m or 1h."
            )
        number, unit = int(match[1]), match[2]
        return cls(seconds=float(number * _SECONDS[unit])) if unit else cls(epochs=number)


#: Each epoch, but at most once a minute.
PACE = "60s"


def _copied(value: Any) -> Any:
    """A copy that the training does not change: tensors on the CPU, containers of the same types."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        same = copy.copy(value)  # with its attributes: a module's state has versions in one
        for key, item in value.items():
            same[key] = _copied(item)
        return same
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)


class Checkpoints:
    """The newest state of a training, kept until it is written.

    While a thread writes, the training goes on. Left in any way, by Ctrl-C or an error too, this
    writes what it has; only a process that is killed loses epochs.

    Args:
        run: where they go.
        pace: how often.
    """

    def __init__(self, run: Run, pace: Pace) -> None:
        self.run, self.pace = run, pace
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kdcache-checkpoint")
        self._writing: Future[None] | None = None
        self._kept: Mapping[str, Any] | None = None
        self._since, self._written = 0, time.monotonic()

    def keep(self, state: Mapping[str, Any], epochs: int = 1) -> None:
        """So many more epochs are over: copy their state, and have it written if that is due.

        Raises:
            OSError: the one before could not be written.
        """
        self._kept = _copied(state)
        self._since += epochs
        if self._writing is not None:
            if not self._writing.done():
                return
            self._writing.result()
        if self._since >= self.pace.epochs and self._waited >= self.pace.seconds:
            state, self._kept, self._since = self._kept, None, 0
            self._written = time.monotonic()
            self._writing = self._writer.submit(self.run.save_checkpoint, state)

    @property
    def _waited(self) -> float:
        return time.monotonic() - self._written

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._writer:
            if self._writing is not None:
                self._writing.result()
            if self._kept is not None:
                self.run.save_checkpoint(self._kept)
