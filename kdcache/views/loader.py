"""Batches made by worker processes, in order, with errors that read like those of this process."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from kdcache.views.batches import ImageBatch, Pairs
from kdcache_stores.errors import DataError, MismatchError, UsageError

Render = Callable[..., ImageBatch]
_ERRORS = (DataError, MismatchError, UsageError)


class _Failure(NamedTuple):
    """An error of a worker, without the worker's traceback."""

    kind: int
    message: str


class _Rendered(torch.utils.data.Dataset[Any]):
    """The item of a pair (rows, views) is that whole batch."""

    def __init__(self, render: Render) -> None:
        self.render = render

    def __getitem__(self, pair: Pairs) -> Any:
        rows, views = pair
        try:
            batch = self.render(rows, views)
        except _ERRORS as error:
            kind = next(i for i, known in enumerate(_ERRORS) if isinstance(error, known))
            return _Failure(kind, str(error))
        return batch.images, batch.labels, batch.mix


class _Asked(torch.utils.data.Sampler[Any]):
    """The pairs of one stream, remembered as they are handed out; the next stream sets its own."""

    def __init__(self) -> None:
        self.pairs: Iterable[Pairs] = ()
        self.sent: deque[Pairs] = deque()

    def __iter__(self) -> Iterator[Pairs]:
        for pair in self.pairs:
            self.sent.append(pair)
            yield pair


class _Loader:
    """A DataLoader whose processes stay alive from one stream of batches to the next."""

    def __init__(self, render: Render, start_method: str | None, workers: int, pin: bool) -> None:
        self._asked = _Asked()
        self._loader = torch.utils.data.DataLoader(
            _Rendered(render),
            batch_size=None,
            sampler=self._asked,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=start_method if workers else None,
            pin_memory=pin,
            generator=torch.Generator(),  # or each start would advance the caller's random state
        )

    def stream(self, batches: Iterable[Pairs]) -> Iterator[ImageBatch]:
        self._asked.pairs, self._asked.sent = batches, deque()
        for item in self._loader:
            rows, views = self._asked.sent.popleft()
            if isinstance(item, _Failure):
                raise _ERRORS[int(item.kind)](item.message)
            images, labels, mix = item
            yield ImageBatch(rows, np.asarray(views), images, labels, mix and tuple(mix))


class Loaders:
    """Worker processes of one renderer, kept until this object goes.

    Starting processes takes seconds where they import torch; a training streams once an epoch.

    Args:
        render: from rows and views to a `ImageBatch`; pickled where workers do not fork.
        start_method: how the processes start; None: as usual.
    """

    def __init__(self, render: Render, start_method: str | None = None) -> None:
        self._render, self._start_method = render, start_method
        self._idle: dict[tuple[int, bool], _Loader] = {}
        self._lock = threading.Lock()

    def stream(
        self, batches: Iterable[Pairs], device: torch.device, workers: int
    ) -> Iterator[ImageBatch]:
        """Render batches in `workers` processes (0: this one) and move them to a device.

        Args:
            batches: rows and views of each; taken as processes are free for them, so it may be long.
            device: where they go.
            workers: number of processes; a stream beside another one has its own.

        Raises:
            DataError, MismatchError, UsageError: what `render` raised.
        """
        kind = (workers, device.type == "cuda")
        with self._lock:
            loader = self._idle.pop(kind, None)
        loader = loader or _Loader(self._render, self._start_method, *kind)
        try:
            for batch in loader.stream(batches):
                yield batch.to(device)
        finally:
            with self._lock:
                self._idle.setdefault(kind, loader)
