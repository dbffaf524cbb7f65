"""The metrics of a training as TensorBoard events, for who likes to watch them there."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from kdcache.training.observer import TrainingObserver
from kdcache_stores import UsageError


class TensorBoard:
    """An observer that writes every number of an epoch's record, and passes all on to another one.

    Args:
        folder: where the events go.
        watch: told of everything as well.

    Raises:
        UsageError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, watch: TrainingObserver) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "--tensorboard needs the package tensorboard: pip install 'kdcache[tensorboard]'"
            ) from None
        self._open, self.folder, self.watch = SummaryWriter, folder, watch
        self._writer: Any = None

    def note(self, text: str) -> None:
        """Pass it on."""
        self.watch.note(text)

    def step(self, epoch: int, done: int, total: int) -> None:
        """Pass it on."""
        self.watch.step(epoch, done, total)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """Write the record. A resumed training takes the place of what was written after it began."""
        if self._writer is None:
            self._writer = self._open(str(self.folder), purge_step=record["epoch"])
        for name, value in record.items():
            if name != "epoch":
                self._writer.add_scalar(name.replace("_", "/", 1), value, record["epoch"])
        self._writer.flush()
        self.watch.epoch(record, epochs)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()
