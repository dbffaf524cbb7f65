"""The processes of one dump, as torchrun starts them: they share the shards, one speaks for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kdcache_stores.errors import KDCacheError

T = TypeVar("T")

#: A rank that is done waits for the slowest one, however long that takes.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class DumpRanks:
    """This process among those of a dump.

    Attributes:
        rank: from 0; rank 0 seals, and alone prints.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def first(self, function: Callable[[], T]) -> T:
        """What a function gives on rank 0, told to all; its error stops all.

        Raises:
            KDCacheError: on the other ranks, if the function failed on rank 0.
        """
        if self.world == 1:
            return function()
        box: list[Any] = [None]
        if self.rank > 0:
            dist.broadcast_object_list(box, src=0)
            result, error = box[0]
            if error is not None:
                raise KDCacheError(f"stopped together with rank 0, which says: {error}")
            return result  # type: ignore[no-any-return]
        try:
            result = function()
        except Exception as error:
            dist.broadcast_object_list([(None, str(error))], src=0)
            raise
        dist.broadcast_object_list([(result, None)], src=0)
        return result

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def join_dump(device: str) -> Iterator[tuple[DumpRanks, str]]:
    """Take a place among the processes that torchrun started; alone if it did not.

    Ranks exchange a few words about the shards and no tensors, so gloo serves on GPUs too.

    Yields:
        The ranks and this process's device, a GPU of its own with "cuda".
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield DumpRanks(), device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield DumpRanks(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
