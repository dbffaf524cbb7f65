"""Counter-based random numbers: Philox4x32-10, vectorised, the same for NumPy and torch.

A number is a pure function of (seed, sample key, view, operation, draw): no state, no order. The
key of the cipher is the 64-bit seed. Its counter is made of four 32-bit words:

    word 0, 1   first 8 bytes of the SHA-256 of the sample key (UTF-8), little endian, low word
    first word 2      view
    word 3      operation << 16 | block; a block yields four 32-bit words

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache_stores.errors import UsageError

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10

Words = NDArray[np.int64]
DISTRIBUTIONS = ("gaussian", "uniform", "laplace")


def philox4x32(counter: Sequence[Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Encrypt counters with Philox4x32-10.

    Args:
        counter: four int64 arrays or four int64 tensors (any device), broadcastable, at least
            one-dimensional, every value in [0, 2^32).
        key: two words in [0, 2^32), integers or 0-d int64 tensors.

    Returns:
        Four int64 arrays or tensors with values in [0, 2^32).

    One code serves both libraries: the product of two 32-bit words fills 64 bits, wraps around in a
    signed int64 and keeps its bits, so the high word is an arithmetic shift and a mask.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0 = (k0 + _WEYL[0]) & _LOW
        k1 = (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def key_words(key_hashes: Sequence[bytes]) -> Words:
    """The two counter words of each sample: int64 (N, 2) from the SHA-256 of its key (32 bytes)."""
    joined = b"".join(digest[:8] for digest in key_hashes)
    return np.frombuffer(joined, dtype="<u4").reshape(-1, 2).astype(np.int64)


def split_seed(seed: int) -> tuple[int, int]:
    """A 64-bit seed as two words, low word first; raises `UsageError` outside [0, 2^64)."""
    if not 0 <= seed < 1 << 64:
        raise UsageError(f"a seed must be in [0, 2^64), found {seed}")
    return seed & _LOW, seed >> 32


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Another 64-bit seed for another purpose: the first 8 bytes of SHA-256 of seed and purpose."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


@dataclass(frozen=True)
class Draws:
    """The random numbers of B (sample, view) pairs for one operation, in float64.

    Args:
        words: int64 (B, 2), rows of `key_words`.
        views: int64 (B,), in [0, 2^32).
        seed: the plan's seed.
        operation: which operation of the augmentation draws, in [0, 2^16).
    """

    words: Words
    views: NDArray[np.int64]
    seed: int
    operation: int = 0

    def __len__(self) -> int:
        return len(self.words)

    def part(self, index: int) -> Draws:
        """The draws of part `index` (0 to 14) of this operation: disjoint from all others."""
        operation = self.operation * 16 + index + 1
        if not (0 <= index < 15 and operation < 1 << 16):
            raise UsageError("augmentations are nested too deeply: at most 15 parts, 4 levels")
        return replace(self, operation=operation)

    def blocks(self, block: NDArray[np.int64]) -> tuple[Words, Words, Words, Words]:
        """Raw words of the given blocks: `block` is int64 (n,) or (B, n), values in [0, 2^16)."""
        counter = (
            self.words[:, :1],
            self.words[:, 1:],
            self.views[:, None],
            np.atleast_2d(block) | (self.operation << 16),
        )
        shape = np.broadcast_shapes(*(word.shape for word in counter))
        return philox4x32([np.broadcast_to(word, shape) for word in counter], split_seed(self.seed))

    def uniform(self, count: int, start: int = 0) -> NDArray[np.float64]:
        """`count` numbers of 53 bits in [0, 1) per pair: float64 (B, count).

        Numbers `start`, `start` + 1, ... of this operation; a block makes two of them.
        """
        first = start // 2
        w0, w1, w2, w3 = self.blocks(np.arange(first, (start + count + 1) // 2))
        doubles = np.stack((_double(w0, w1), _double(w2, w3)), axis=-1).reshape(len(self), -1)
        result: NDArray[np.float64] = doubles[:, start - 2 * first : start - 2 * first + count]
        return result


def _double(high: Words, low: Words) -> NDArray[np.float64]:
    return ((high >> 5) * 67108864.0 + (low >> 6)) * 2.0**-53


def below(uniform: NDArray[np.float64], bound: Any) -> NDArray[np.int64]:
    """Integers in [0, bound) from uniform numbers in [0, 1): the floor of their product."""
    result: NDArray[np.int64] = np.minimum(np.floor(uniform * bound), np.asarray(bound) - 1).astype(
        np.int64
    )
    return result


def exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """e^x for |x| <= 3 by its power series, from additions, products and one power of 2 alone.

    IEEE 754 fixes every bit of these, while the last bit of a library's `exp` differs between
    processors; relative error below 1e-15.
    """
    small = x / 8
    result = np.ones_like(small)
    for n in range(20, 0, -1):
        result = 1 + result * small / n
    for _ in range(3):
        result = result * result
    return result


def noise_key(seed: int, *purpose: str | int) -> tuple[int, int]:
    """The key of `noise` for a run's seed and what else the noise depends on: epoch, teacher, ..."""
    return split_seed(derive_seed(seed, "noise", *purpose))


def noise(
    distribution: str,
    words: torch.Tensor,
    views: torch.Tensor,
    count: int,
    key: tuple[Any, Any],
) -> torch.Tensor:
    """Noise of mean 0 and standard deviation 1, drawn on the device of `words`.

    Args:
        distribution: "gaussian", "uniform" (on +-sqrt 3) or "laplace" (scale 1 / sqrt 2).
        words: int64 (B, 2), rows of `key_words`.
        views: int64 (B,).
        count: numbers per pair, e.g. the number of classes.
        key: of `noise_key`, as integers or as 0-d int64 tensors on the device.

    Returns:
        float32 (B, count): a pure function of its arguments. The underlying words are bit-equal on
        all devices and uniform noise is too; gaussian and laplace noise can differ between
        implementations in the last bits, as `log` and `cos` do.
    """
    if distribution not in DISTRIBUTIONS:
        raise UsageError(f"unknown noise {distribution!r}: there is {', '.join(DISTRIBUTIONS)}")
    block = torch.arange((count + 3) // 4, device=words.device)
    if len(block) > 1 << 16:
        raise UsageError(f"noise has at most {4 << 16} numbers per sample, asked for {count}")
    parts = torch.broadcast_tensors(words[:, :1], words[:, 1:], views[:, None], block)
    drawn = philox4x32(parts, key)
    # The upper 23 bits and a half: exact in float32, never 0 or 1.
    u0, u1, u2, u3 = (((word >> 9).to(torch.float32) + 0.5) * 2.0**-23 for word in drawn)
    values: tuple[torch.Tensor, ...]
    if distribution == "gaussian":  # Box and Muller
        r0, r1 = (torch.sqrt(-2 * torch.log(u)) for u in (u0, u2))
        a0, a1 = 2 * math.pi * u1, 2 * math.pi * u3
        values = (r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1))
    elif distribution == "uniform":
        values = tuple((u - 0.5) * (2 * math.sqrt(3)) for u in (u0, u1, u2, u3))
    else:  # the inverse of the distribution function
        values = tuple(
            torch.sign(0.5 - u) * torch.log(1 - 2 * (u - 0.5).abs()) / math.sqrt(2)
            for u in (u0, u1, u2, u3)
        )
    return torch.stack(values, dim=-1).flatten(1)[:, :count]
