"""What is under way before the first row or step: named, counted and told to whoever watches.

A command watches; the library says what it does, however deep in it, and nobody need hand a callback
through. Without a watcher nothing happens::

    with watching(print_it):
        load_dataset("folder:photos")  # print_it(UnderWay("reading headers of folder:photos", "files", ...))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

#: A stage is told at its start and end, and in between at most so often, in seconds.
PACE = 0.1


@dataclass
class UnderWay:
    """Something that takes time.

    Attributes:
        what: it is, in a few words.
        unit: what is counted.
        total: of them, where that is known.
        done: so many so far.
        seconds: that it has taken so far.
        over: whether it has ended, in any way.
    """

    what: str
    unit: str = ""
    total: int | None = None
    done: int = 0
    seconds: float = 0.0
    over: bool = False
    _begun: float = field(default_factory=time.monotonic, repr=False)

    @property
    def rate(self) -> float:
        """Units per second; 0 before the first."""
        return self.done / self.seconds if self.seconds else 0.0


T = TypeVar("T")
Watcher = Callable[[UnderWay], None]
_watcher: ContextVar[Watcher | None] = ContextVar("kdcache_stages", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Have the stages of this thread told to a watcher, the same object each time that one is."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def stage(what: str, unit: str = "", total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Something begins that may take time; yields how to say that so many more units are done."""
    watcher = _watcher.get()
    if watcher is None:
        yield lambda more: None
        return
    now, told = UnderWay(what, unit, total), time.monotonic()
    watcher(now)

    def advance(more: int) -> None:
        nonlocal told
        now.done += more
        clock = time.monotonic()
        if clock - told >= PACE:
            now.seconds, told = clock - now._begun, clock
            watcher(now)

    try:
        yield advance
    finally:
        now.seconds, now.over = time.monotonic() - now._begun, True
        watcher(now)


def counted(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[T]:
    """The items, told one by one as a stage."""
    with stage(what, unit, total) as advance:
        for item in items:
            yield item
            advance(1)
