"""Which sample is which, for losses that remember something of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdcache.methods.nets import Nets
from kdcache.methods.step import Step
from kdcache_stores.errors import DataError, UsageError


class Places(nn.Module):
    """The place of each sample, 0 to N - 1, by its key; the same on every rank and after a resume.

    Args:
        nets: with the keys of the samples.
        method: that needs them, for the message.

    Raises:
        UsageError: the keys are not known.
    """

    keys: Tensor

    def __init__(self, nets: Nets, method: str) -> None:
        super().__init__()
        if nets.keys is None:
            raise UsageError(
                f"{method} remembers something of each sample: Nets(keys=...) is needed"
            )
        self.register_buffer("keys", nets.keys.sort().values, persistent=False)

    def __len__(self) -> int:
        return len(self.keys)

    def of(self, step: Step) -> Tensor:
        """int64 (B,), for the samples of a step.

        Raises:
            UsageError: the step has no keys.
            DataError: on a CPU, for a sample that is not of the training.
        """
        if step.keys is None:
            raise UsageError(
                "this loss remembers something of each sample: expected Step(keys=...)"
            )
        keys = step.keys
        if keys.ndim == 2:
            keys = keys[:, 0] | keys[:, 1] << 32
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        if keys.device.type == "cpu" and not torch.equal(self.keys[places], keys):
            raise DataError(
                "a sample of this batch is not one of those that the training began with"
            )
        return places
