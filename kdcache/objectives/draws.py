"""Random numbers of a training step, a pure function of what they are for."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdcache_stores.errors import UsageError


@dataclass(frozen=True)
class Step:
    """Where in the training a batch is, and which samples and views are in it.

    Args:
        epoch: the epoch, counted from 0.
        index: the step within the epoch, counted from 0.
        epochs: the number of epochs of the whole run.
        seed: the run's seed.
        keys: (B,) int64, a 64-bit hash of each sample's key, on the device of the logits.
        views: (B,) int64, the view of each sample; all 0 when absent.
    """

    epoch: int = 0
    index: int = 0
    epochs: int = 1
    seed: int = 0
    keys: Tensor | None = field(default=None, repr=False)
    views: Tensor | None = field(default=None, repr=False)

    def stream(self, *purpose: str | int) -> int:
        """64 bits that name the randomness for `purpose` in this seed and epoch."""
        name = repr((self.seed, self.epoch, *purpose)).encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")

    def uniform(self, n: int, *purpose: str | int) -> Tensor:
        """(B, n) float32 uniform on the open interval (0, 1), for each (seed, epoch, key, view)."""
        if self.keys is None:
            raise UsageError(
                "noise, permutations and random choices are seeded by sample: expected "
                "Step(keys=...), an int64 hash of each sample's key, found none"
            )
        views = torch.zeros_like(self.keys) if self.views is None else self.views.to(self.keys)
        return uniform(self.stream(*purpose), self.keys, views, n)

    def normal(self, n: int, *purpose: str | int) -> Tensor:
        """(B, n) float32 standard normal (Box and Muller 1958), seeded as `uniform`."""
        half = (n + 1) // 2
        radius, angle = self.uniform(2 * half, *purpose).chunk(2, -1)
        radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
        return torch.cat([radius * angle.cos(), radius * angle.sin()], -1)[:, :n]


_MASK = 0xFFFFFFFF


def uniform(stream: int, keys: Tensor, views: Tensor, n: int) -> Tensor:
    """(B, n) float32 in (0, 1) from Philox4x32-10, with one counter block per four numbers."""
    blocks = torch.arange((n + 3) // 4, device=keys.device)
    word = torch.zeros(len(keys), len(blocks), dtype=torch.int64, device=keys.device)
    a, b = word + (keys & _MASK)[:, None], word + ((keys >> 32) & _MASK)[:, None]
    c, d = word + (views & _MASK)[:, None], word + blocks
    k0, k1 = stream & _MASK, stream >> 32
    for _ in range(10):
        # 64-bit products wrap, and the arithmetic shift is masked: the bits are the unsigned ones.
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            ((second >> 32) & _MASK) ^ b ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ d ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    bits = torch.stack([a, b, c, d], -1).flatten(1)[:, :n]
    # 23 bits and a half are exact in float32, so neither 0 nor 1 can come out.
    return ((bits >> 9).float() + 0.5) * 2.0**-23
