"""Noise on the teacher's logits: its distribution, its seeds, and what its expectation is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdcache.methods.noise import Noise
from kdcache.methods.step import Step
from kdcache_stores.errors import DataError, UnknownName, UsageError


def a_step(b: int = 8, **options: int) -> Step:
    keys = torch.arange(1, b + 1) * 0x1234567890ABCDE
    return Step(keys=keys, views=torch.zeros(b, dtype=torch.int64), **options)


@pytest.mark.parametrize(
    ("family", "distribution"),
    [
        ("gaussian", stats.norm()),
        ("uniform", stats.uniform(-math.sqrt(3), 2 * math.sqrt(3))),
        ("laplace", stats.laplace(scale=1 / math.sqrt(2))),
    ],
)
def test_families_have_their_distribution(family: str, distribution: stats.rv_continuous) -> None:
    draws = a_step(200).draw(family, 500).flatten().double()
    assert stats.kstest(draws.numpy(), distribution.cdf).pvalue > 1e-4
    assert draws.mean().item() == pytest.approx(0, abs=0.02)
    assert draws.std().item() == pytest.approx(1, abs=0.02)
    assert draws.isfinite().all()


def test_draws_are_of_seed_epoch_key_view_teacher_and_copy() -> None:
    noise, z = Noise(), torch.zeros(8, 10)
    step = a_step(epoch=3, seed=5)
    first = noise(z, step)
    assert torch.equal(noise(z, a_step(epoch=3, seed=5, index=9, epochs=50)), first)
    assert step.keys is not None
    views = torch.ones(8, dtype=torch.int64)
    for other in (
        noise(z, a_step(epoch=4, seed=5)),
        noise(z, a_step(epoch=3, seed=6)),
        noise(z, Step(3, seed=5, keys=step.keys + (1 << 40), views=step.views)),
        noise(z, Step(3, seed=5, keys=step.keys, views=views)),
        noise(z, step, teacher=1),
        noise(z, step, copy=1),
    ):
        assert (other != first).all(-1).all()
    # One 64-bit key, or its two words.
    words = torch.stack([step.keys & 0xFFFFFFFF, (step.keys >> 32) & 0xFFFFFFFF], 1)
    assert torch.equal(noise(z, Step(3, seed=5, keys=words, views=step.views)), first)
    assert torch.equal(noise(z, Step(3, seed=5, keys=words)), first)  # view 0 when absent
    # Row by row, whatever else is in the batch and in which order.
    order = torch.tensor([6, 2, 5])
    part = Step(3, seed=5, keys=step.keys[order], views=step.views[order])
    assert torch.equal(noise(z[:3], part), first[order])
    assert len(first.unique()) == first.numel()


def test_sizes_modes_and_schedules() -> None:
    step = a_step(epoch=1, epochs=4)
    z = torch.linspace(-3, 5, 80).view(8, 10)
    numbers = step.draw("gaussian", 10, "noise", 0, 0)
    torch.testing.assert_close(Noise(scale=0.5)(z, step), z + 0.5 * numbers)
    torch.testing.assert_close(
        Noise(scale=0.5, relative=True)(z, step), z + 0.5 * numbers * z.std(-1, keepdim=True)
    )
    torch.testing.assert_close(
        Noise(scale=0.5, mode="multiplicative")(z, step), z * (1 + 0.5 * numbers)
    )
    assert torch.equal(Noise(scale=0)(z, step), z)
    assert Noise(scale=2).scale_at(step.epoch, step.epochs) == 2
    assert Noise(scale=2, schedule="linear").scale_at(step.epoch, step.epochs) == 2 * 0.75
    cosine = Noise(scale=2, schedule="cosine").scale_at(step.epoch, step.epochs)
    assert cosine == pytest.approx(1 + math.cos(math.pi / 4))


def test_noise_of_half_precision_and_of_pairs() -> None:
    step = a_step()
    noisy = Noise()(torch.ones(8, 10, dtype=torch.float16), step)
    assert noisy.dtype == torch.float32
    pair = Noise()(torch.zeros(8, 2, 10), step)
    assert pair.shape == (8, 2, 10)
    assert (pair[:, 0] != pair[:, 1]).all()


@given(
    st.builds(
        Noise,
        family=st.sampled_from(["gaussian", "uniform", "laplace"]),
        scale=st.floats(0, 1e6),
        relative=st.booleans(),
        schedule=st.sampled_from(["constant", "linear", "cosine"]),
        copies=st.integers(1, 99),
    )
    | st.builds(Noise, mode=st.just("multiplicative"))
)
def test_text_and_noise_are_inverse(noise: Noise) -> None:
    assert Noise.parse(str(noise)) == noise


@pytest.mark.parametrize(
    "text",
    [
        *("gaussian", "gaussian:", "gaussian:x", "gaussian:-1", "gaussian:nan", "gaussian:0.1,"),
        *("gaussian:0.1,copies=0", "gaussian:0.1,copies=x", "gaussian:0.1,relativ"),
        "gaussian:0.1,relative,multiplicative",
    ],
)
def test_bad_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Noise.parse(text)


def test_unknown_names_and_missing_keys_say_what_there_is() -> None:
    with pytest.raises(UnknownName, match="did you mean 'gaussian'"):
        Noise.parse("gausian:0.1")
    with pytest.raises(UnknownName, match="cosine"):
        Noise(schedule="cos")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"Step\(keys="):
        Noise()(torch.zeros(2, 3), Step())
    with pytest.raises(DataError, match=r"shape \(2, 3\)"):
        Step(keys=torch.zeros(2, 3, dtype=torch.int64))
