"""Where in the training a batch is, and the random numbers that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdcache import philox
from kdcache_stores.errors import DataError, UsageError

Number = float | Tensor
Words = tuple[int, int] | tuple[Tensor, Tensor]


class Clock:
    """What follows from the epoch alone, in tensors that stay where they are while the epochs pass.

    A step that was compiled, or captured, reads the numbers of the current epoch from them. They are
    made when a step first asks for them.

    Args:
        seed: the run's.
        epochs: of the whole run.
        device: of the tensors.
    """

    def __init__(self, seed: int, epochs: int, device: torch.device) -> None:
        self.seed, self.epochs, self.device, self.epoch = seed, epochs, device, 0
        self.numbers: dict[str, Tensor] = {}
        self.words: dict[tuple[str | int, ...], tuple[Tensor, Tensor]] = {}
        self._functions: dict[str, Callable[[int, int], float]] = {}

    def set(self, epoch: int) -> None:
        """Refill the tensors for an epoch, counted from 0."""
        self.epoch = epoch
        step = Step(epoch=epoch, epochs=self.epochs, seed=self.seed)
        for name, function in self._functions.items():
            self.numbers[name].fill_(step.number(name, function))
        for purpose, words in self.words.items():
            low, high = step.words(*purpose)
            words[0].fill_(low)
            words[1].fill_(high)

    def number(self, name: str, function: Callable[[int, int], float]) -> Tensor:
        """float32, 0-d: the function of (epoch, epochs), by a name that no other has."""
        if name not in self.numbers:
            value = function(self.epoch, self.epochs)
            self.numbers[name] = torch.tensor(value, dtype=torch.float32, device=self.device)
            self._functions[name] = function
        return self.numbers[name]

    def words_of(self, *purpose: str | int) -> tuple[Tensor, Tensor]:
        """int64, 0-d: the two words that seed noise for a purpose in this epoch."""
        if purpose not in self.words:
            step = Step(epoch=self.epoch, seed=self.seed)
            low, high = (torch.tensor(w, device=self.device) for w in step.words(*purpose))
            self.words[purpose] = low, high
        return self.words[purpose]


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
        clock: where the numbers of the epoch are read from, instead of made from ``epoch``.

    Raises:
        DataError: for keys of another shape.
    """

    epoch: int = 0
    index: int = 0
    epochs: int = 1
    seed: int = 0
    keys: Tensor | None = field(default=None, repr=False)
    views: Tensor | None = field(default=None, repr=False)
    clock: Clock | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.keys is not None and self.keys.ndim != 1 and self.keys.shape[1:] != (2,):
            raise DataError(
                "expected one 64-bit key (B,) or two 32-bit words (B, 2) per sample, found keys of "
                f"shape {tuple(self.keys.shape)}"
            )

    def number(self, name: str, function: Callable[[int, int], float]) -> Number:
        """The function of (epoch, epochs): a float, or the clock's tensor of that name."""
        if self.clock is not None:
            return self.clock.number(name, function)
        return function(self.epoch, self.epochs)

    def words(self, *purpose: str | int) -> Words:
        """The two 32-bit words that seed noise for a purpose, of (seed, epoch, purpose)."""
        if self.clock is not None:
            return self.clock.words_of(*purpose)
        return philox.noise_key(self.seed, self.epoch, *purpose)

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
        return philox.noise(family, words, views, n, self.words(*purpose))

    def fraction(self, *purpose: str | int) -> float:
        """A number from 0 to 1 for the whole step, for each (seed, epoch, index).

        Drawn on the CPU, so that all ranks of a run get the same and no device is waited for.
        """
        return philox.derive_seed(self.seed, self.epoch, self.index, *purpose) / 2**64
