"""Reading ahead: a background thread that keeps a bounded number of results ready."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetched(work: Callable[[T], R], items: Iterable[T], ahead: int) -> Generator[R, None, None]:
    """`map(work, items)`, worked on by a thread, at most `ahead` results waiting.

    An exception in the thread is raised here, in its place. Closing the iterator ends the thread.
    """
    ready: queue.Queue[tuple[R | None, BaseException | None] | None] = queue.Queue(ahead)
    stop = threading.Event()

    def put(item: tuple[R | None, BaseException | None] | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.05)
            except queue.Full:
                continue
            return

    def run() -> None:
        try:
            for item in items:
                if stop.is_set():
                    return
                put((work(item), None))
            put(None)
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=run, name="kdcache-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            result, error = item
            if error is not None:
                raise error
            yield result  # type: ignore[misc]
            del item, result
    finally:
        stop.set()
        thread.join()
