"""Philox: published vectors, NumPy and torch alike, a function of its arguments alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.philox import (
    DISTRIBUTIONS,
    Draws,
    below,
    derive_seed,
    exp,
    key_words,
    noise,
    noise_key,
    philox4x32,
    split_seed,
)
from kdcache_stores.errors import UsageError

# Random123, tests/kat_vectors: counter, key, result of philox4x32 with 10 rounds.
ZEROS, ONES, PI = (
    ("00000000 " * 4, "00000000 " * 2),
    ("ffffffff " * 4, "ffffffff " * 2),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
    ),
)
VECTORS = [
    (*ZEROS, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (*ONES, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (*PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
word = st.integers(0, 2**32 - 1)


def words(text: str) -> list[int]:
    return [int(part, 16) for part in text.split()]


def sample_words(count: int) -> np.ndarray:
    return key_words([hashlib.sha256(f"key {i}".encode()).digest() for i in range(count)])


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_known_answers(counter: str, key: str, result: str) -> None:
    k0, k1 = words(key)
    for make in (lambda w: np.array([w], dtype=np.int64), lambda w: torch.tensor([w])):
        found = philox4x32([make(w) for w in words(counter)], (k0, k1))
        assert [int(w[0]) for w in found] == words(result)


@settings(max_examples=30)
@given(st.lists(st.tuples(word, word, word, word), min_size=1, max_size=20), word, word)
def test_numpy_and_torch_agree(counters: list[tuple[int, ...]], k0: int, k1: int) -> None:
    columns = np.array(counters, dtype=np.int64).T
    with_numpy = philox4x32(list(columns), (k0, k1))
    with_torch = philox4x32(list(torch.from_numpy(columns)), (k0, k1))
    for a, b in zip(with_numpy, with_torch, strict=True):
        np.testing.assert_array_equal(a, b.numpy())


def test_counter_layout() -> None:
    """The layout that the module states, assembled by hand."""
    digest = hashlib.sha256(b"train/00042").digest()
    low, high = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    seed = 0x0123456789ABCDEF
    counter = [np.array([w]) for w in (low, high, 7, 3 << 16 | 1)]
    expected = philox4x32(counter, (0x89ABCDEF, 0x01234567))
    draws = Draws(key_words([digest]), np.array([7]), seed, operation=3)
    found = draws.blocks(np.arange(2))
    for a, b in zip(expected, found, strict=True):
        assert int(a[0]) == int(b[0, 1])
    first = (int(expected[0][0]) >> 5) * 2**26 + (int(expected[1][0]) >> 6)
    assert draws.uniform(1, start=2)[0, 0] == first / 2**53


def test_a_pair_draws_the_same_in_any_company() -> None:
    everyone = Draws(sample_words(50), np.arange(50) % 7, seed=1)
    together = everyone.uniform(5)
    alone = np.concatenate([
        Draws(everyone.words[i : i + 1], everyone.views[i : i + 1], seed=1).uniform(5)
        for i in range(50)
    ])  # fmt: skip
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together[:, 3:], everyone.uniform(2, start=3))


def test_other_seed_key_view_operation_draw_something_else() -> None:
    base = Draws(sample_words(1), np.array([0]), seed=1)
    others = [
        Draws(sample_words(2)[1:], np.array([0]), seed=1),
        Draws(sample_words(1), np.array([1]), seed=1),
        Draws(sample_words(1), np.array([0]), seed=2),
        Draws(sample_words(1), np.array([0]), seed=1 + 2**32),
        base.part(0),
        base.part(1),
        base.part(0).part(0),
    ]
    drawn = [tuple(draws.uniform(4)[0]) for draws in (base, *others)]
    assert len(set(drawn)) == len(drawn)


def test_uniform_is_uniform() -> None:
    drawn = Draws(sample_words(2000), np.arange(2000), seed=9).uniform(10)
    assert 0 <= drawn.min() < 0.001
    assert 0.999 < drawn.max() < 1
    counts = np.bincount(below(drawn.ravel(), 10), minlength=10)
    chi_square = ((counts - 2000.0) ** 2 / 2000).sum()
    assert chi_square < 27.9  # 0.1% of a chi-square of 9 degrees of freedom


def test_bad_seeds_are_refused() -> None:
    for seed in (-1, 2**64):
        with pytest.raises(UsageError, match="seed must be in"):
            split_seed(seed)


def test_parts_do_not_overlap_and_end() -> None:
    draws = Draws(sample_words(1), np.array([0]), seed=1)
    with pytest.raises(UsageError, match="nested too deeply"):
        draws.part(15)
    with pytest.raises(UsageError, match="nested too deeply"):
        draws.part(14).part(14).part(14).part(14).part(14)


def test_derived_seeds_differ_by_purpose() -> None:
    assert (
        len({derive_seed(1), derive_seed(1, "a"), derive_seed(1, "a", 1), derive_seed(2, "a")}) == 4
    )


@given(st.floats(-3, 3))
def test_exp(x: float) -> None:
    assert exp(np.array([x]))[0] == pytest.approx(float(np.exp(x)), rel=2e-15)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_noise_has_mean_0_and_deviation_1(distribution: str) -> None:
    key = torch.from_numpy(sample_words(500))
    drawn = noise(
        distribution, key, torch.zeros(500, dtype=torch.int64), 201, noise_key(1, "epoch", 0)
    )
    assert drawn.shape == (500, 201)
    assert drawn.dtype == torch.float32
    assert torch.isfinite(drawn).all()
    assert abs(float(drawn.mean())) < 5 / np.sqrt(drawn.numel())
    assert abs(float(drawn.std()) - 1) < 0.02
    fourth = float((drawn**4).mean())
    assert fourth == pytest.approx(
        {"gaussian": 3, "uniform": 1.8, "laplace": 6}[distribution], rel=0.1
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_noise_depends_on_sample_view_and_purpose_alone(distribution: str) -> None:
    key = torch.from_numpy(sample_words(8))
    view = torch.arange(8)
    whole = noise(distribution, key, view, 10, noise_key(1, "epoch", 0))
    part = noise(distribution, key[3:5], view[3:5], 10, noise_key(1, "epoch", 0))
    torch.testing.assert_close(part, whole[3:5], rtol=0, atol=1e-6)
    for other in (
        noise(distribution, key, view, 10, noise_key(1, "epoch", 1)),
        noise(distribution, key, view, 10, noise_key(2, "epoch", 0)),
        noise(distribution, key, view + 1, 10, noise_key(1, "epoch", 0)),
        noise(distribution, key.roll(1, 0), view, 10, noise_key(1, "epoch", 0)),
    ):
        assert not torch.isclose(whole, other).any(dim=1).all()


def test_unknown_noise() -> None:
    with pytest.raises(UsageError, match="unknown noise 'cauchy'"):
        noise(
            "cauchy",
            torch.zeros(1, 2, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            1,
            (0, 1),
        )
