"""The processes of one dump or one training, as ``torchrun`` starts them; alone without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdcache_stores.errors import KDCacheError, UsageError

T = TypeVar("T")

#: A rank of a dump that is done waits for the slowest one, however long that takes.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank: from 0; rank 0 alone prints, writes a run and seals stores.
        world: how many there are.
        neighbours: how many of them are on this machine.
    """

    rank: int = 0
    world: int = 1
    neighbours: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def on_first(self, function: Callable[[], T]) -> T:
        """What a function gives on rank 0, sent to all; its error stops all.

        Raises:
            KDCacheError: on the other ranks, if the function failed on rank 0.
        """
        if self.world == 1:
            return function()
        box: list[Any] = [None]
        if not self.is_first:
            dist.broadcast_object_list(box, src=0)
            result: T
            result, error = box[0]
            if error is not None:
                raise KDCacheError(f"stopped together with rank 0, whose error is: {error}")
            return result
        try:
            result = function()
        except Exception as error:
            dist.broadcast_object_list([(None, str(error))], src=0)
            raise
        dist.broadcast_object_list([(result, None)], src=0)
        return result

    def part(self, total: int) -> slice:
        """This rank's part of ``total`` samples; parts differ by one sample at most."""
        return slice(self.rank * total // self.world, (self.rank + 1) * total // self.world)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def lowest(self, value: int) -> int:
        """The smallest of the ranks' values, on all of them."""
        values: list[int] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return min(values)

    def share_buffers(self, module: nn.Module) -> None:
        """Give all ranks the buffers of rank 0 (running means of batch norm)."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def gather(self, tensors: Sequence[Tensor], total: int) -> list[Tensor]:
        """What all ranks have, in the order of the samples, bit for bit, in one exchange.

        Args:
            tensors: of any dtypes, each (samples of this rank's `part`, ...).
            total: samples of all ranks together.

        Returns:
            Each tensor as (total, ...), without a gradient.
        """
        if self.world == 1:
            return [tensor.detach() for tensor in tensors]
        flat = [t.detach().contiguous().view(len(t), -1).view(torch.uint8) for t in tensors]
        packed = torch.cat(flat, 1)
        most = -(-total // self.world)
        sent = packed.new_zeros((most, packed.shape[1]))
        sent[: len(packed)] = packed
        received = sent.new_empty((self.world * most, packed.shape[1]))
        dist.all_gather_into_tensor(received, sent)
        parts = [replace(self, rank=rank).part(total) for rank in range(self.world)]
        rows = [received[i * most :][: p.stop - p.start] for i, p in enumerate(parts)]
        columns = torch.split(torch.cat(rows), [part.shape[1] for part in flat], 1)
        return [
            column.clone(memory_format=torch.contiguous_format)
            .view(tensor.dtype)
            .view(total, *tensor.shape[1:])
            for column, tensor in zip(columns, tensors, strict=True)
        ]

    def wrap(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module with its gradients averaged over the ranks."""
        if self.world == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        where = [device] if device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=where, gradient_as_bucket_view=True)

    def require_divisible(self, samples: int, batch_size: int) -> None:
        """Refuse batches that would leave a rank without a sample.

        Raises:
            UsageError: naming the batch and what to change.
        """
        last = samples % batch_size or batch_size
        if min(last, samples) < self.world:
            raise UsageError(
                f"{samples} samples in batches of {batch_size} end with a batch of {last}, which cannot "
                f"be divided among {self.world} ranks: use fewer ranks, another --batch-size, or "
                f"--train-samples {samples - last}."
            )


@contextmanager
def join(
    device: str, backend: str | None = None, timeout: timedelta | None = None
) -> Iterator[tuple[Ranks, str]]:
    """Take a place among the processes that ``torchrun`` started; alone if it did not.

    Args:
        device: asked for; "cuda" gives each process of a machine a GPU of its own.
        backend: None: nccl on GPUs, else gloo. Ranks that exchange no tensors need gloo alone.
        timeout: how long a rank waits for another; None: as torch does.

    Yields:
        The ranks and this process's device.
    """
    if not dist.is_torchelastic_launched() or os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks(), device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        automatic = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend or automatic, timeout=timeout)
    try:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield Ranks(dist.get_rank(), dist.get_world_size(), neighbours), device
    finally:
        if ours:
            dist.destroy_process_group()
