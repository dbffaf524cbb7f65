"""Where in the training a batch is, and the random numbers that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdcache import philox
from kdcache_stores.errors import DataError, UsageError


@dataclass(frozen=True)
class Step:
    """Where in the training a batch is, and which samples and views are in it.

    Args:
        epoch: the epoch, counted from 0.
        index: the step within the epoch, counted from 0.
        epochs: the number of epochs of the whole run.
        seed: the run's seed.
        keys: int64, (B,) 64-bit hashes of the sample keys or (B, 2) their lower and upper words
            (rows of `kdcache.philox.key_words`), on the device of the logits.
        views: (B,) int64, the view of each sample; all 0 when absent.

    Raises:
        DataError: for keys of another shape.
    """

    epoch: int = 0
    index: int = 0
    epochs: int = 1
    seed: int = 0
    keys: Tensor | None = field(default=None, repr=False)
    views: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.keys is not None and self.keys.ndim != 1 and self.keys.shape[1:] != (2,):
            raise DataError(
                "expected one 64-bit key (B,) or two 32-bit words (B, 2) per sample, found keys of "
                f"shape {tuple(self.keys.shape)}"
            )

    def draw(self, family: str, n: int, *purpose: str | int) -> Tensor:
        """(B, n) float32 of mean 0 and standard deviation 1, for each (seed, epoch, key, view).

        The same for any batch size, order and number of ranks; the step's index has no part in it.

        Args:
            family: "gaussian", "uniform" or "laplace".
            n: numbers per sample.
            purpose: what they are for; another purpose gives other numbers.

        Raises:
            UsageError: when the step has no keys.
        """
        if self.keys is None:
            raise UsageError(
                "noise and permutations are seeded by sample: expected Step(keys=...), an int64 "
                "hash of each sample's key, found none"
            )
        low, high = (
            (self.keys & 0xFFFFFFFF, (self.keys >> 32) & 0xFFFFFFFF)
            if self.keys.ndim == 1
            else self.keys.unbind(1)
        )
        views = torch.zeros_like(low) if self.views is None else self.views.to(low)
        words = torch.stack([low, high], 1)
        return philox.noise(family, words, views, n, self.seed, self.epoch, *purpose)

    def fraction(self, *purpose: str | int) -> float:
        """A number from 0 to 1 for the whole step, for each (seed, epoch, index).

        Drawn on the CPU, so that all ranks of a run get the same and no device is waited for.
        """
        return philox.derive_seed(self.seed, self.epoch, self.index, *purpose) / 2**64
