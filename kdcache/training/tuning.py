"""What a training asks of its process and device: TF32, cuDNN's choice of algorithms, the allocator.

**TF32.** A float32 network on a GPU computes its convolutions in TF32 (a mantissa of 10 bits; torch's own
default, and how the published numbers came about) unless a training says otherwise; matrix products are
computed as the process has it set, in full float32 where nothing was set. Losses are never convolutions.

**The allocator.** glibc gives memory at the top of its heap back to the system, and maps large blocks one
by one, so that a training step faults the same pages in again and again: of resnet8 3,200 and of resnet20
9,000 a step of 64 CIFAR images, where none are needed. What that costs depends on the machine, on a busy
two-core Xeon about 4% of resnet20's processor time; the peak of the memory does not change.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kdcache.training.settings import Training

#: Numbers and values of glibc's mallopt(3): trim above 1 GiB, map blocks above 32 MiB, its largest value.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = (-1, 1 << 30), (-3, 32 << 20)
#: Whoever sets these has chosen.
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def hold_freed_memory() -> bool:
    """Have this process keep up to 1 GiB of freed memory for itself, until it ends.

    Returns:
        Whether it does now: on Linux with glibc, unless the environment sets its thresholds.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _CHOSEN):
        return False
    library = ctypes.CDLL(None)
    return all([library.mallopt(*_TRIM_THRESHOLD), library.mallopt(*_MMAP_THRESHOLD)])


@contextmanager
def tuned(training: Training) -> Iterator[None]:
    """cuDNN as a training asks for it, until the end of the block; nothing without a GPU."""
    if torch.device(training.device).type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32 = True, training.tf32
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before


def computing(training: Training) -> dict[str, Any]:
    """What a training computes with, for its run: it may change between a start and its resume."""
    device = torch.device(training.device)
    facts: dict[str, Any] = {
        "torch": str(torch.__version__),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "graph": training.graph,
    }
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "tf32_convolutions": training.tf32,
            "cudnn_benchmark": True,
        }
    return facts
