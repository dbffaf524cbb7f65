"""Packed rows are the reader's rows, whatever was stored and in whatever order they are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from kdcache.views.packed import PACKED, Packing
from kdcache.views.packed_codes import Columns, PackedCodes
from kdcache.views.window import ResidentFields, packed_bytes
from kdcache_stores import ENCODINGS, DataError, Plan, Samples, write_arrays
from kdcache_stores.encodings.encoding_names import make_encoding
from kdcache_stores.encodings.protocol import FittedEncoding
from kdcache_stores.format.header import Field

CPU = torch.device("cpu")
EXACT = [
    "float32",
    "float16",
    "quantized",
    "quantized:0.01",
    "topk:1",
    "topk:3",
    "topk:5",
    "channels",
]
Arrays = dict[str, np.ndarray]


@st.composite
def logits(draw: st.DrawFn, most: int = 9) -> np.ndarray:
    """float32 (views, rows, classes): wild or tame, with ties, constant rows and outliers."""
    views, rows, classes = draw(
        st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(6, most))
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    base = rng.normal(0, draw(st.sampled_from([1e-3, 1, 30])), (1, rows, classes))
    values = base + rng.normal(0, draw(st.sampled_from([0.0, 0.01, 1.0])), (views, rows, classes))
    if draw(st.booleans()):
        values = np.rint(values)  # ties
    if draw(st.booleans()):
        values[:, rng.integers(rows)] = rng.normal()  # no spread
    if draw(st.booleans()):
        values[:, rng.integers(rows), 1:] = 0.5  # a tail without a spread
    if draw(st.booleans()):
        values[rng.integers(views), rng.integers(rows), rng.integers(classes)] += 200
    return values.astype(np.float32)


def encoded(text: str, values: np.ndarray) -> tuple[Field, Arrays, list[Arrays], np.ndarray]:
    """The field, its arrays per store, those of each view, and the rows that they decode to."""
    encoding, shape = make_encoding(text), values.shape[2:]
    shared: Arrays = {}
    base: Arrays = {}
    labels = np.arange(values.shape[1]) % shape[-1]
    try:
        if isinstance(encoding, FittedEncoding):
            shared = encoding.fit(values[:2])
            base = encoding.base(values[0], shared)
        views = [{**encoding.encode(v, labels, {**shared, **base}), **base} for v in values]
    except DataError:
        reject()  # an encoding that is fitted cannot hold every row
    decoded = np.empty_like(values)
    for arrays, out in zip(views, decoded, strict=True):
        encoding.decode({**arrays, **shared}, out)
    return Field("logits", shape, encoding), shared, views, decoded


def taken(
    packing: Packing, views: list[Arrays], order: np.ndarray, cut: int, picks: Any
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """What `take` gives of picked rows, and which slots and rows these were.

    Args:
        order: the rows that there is memory for, in this order.
        cut: where the pieces that they come in part.
        picks: (B, 2), numbers that any slot and position are made of.
    """
    memory = packing.memory(len(views), len(order), CPU)
    for again in (False, True):  # a slot's next view takes the place of the last one
        for slot, arrays in enumerate(views if again else views[::-1]):
            parts = [slice(0, cut), np.arange(cut, len(order))]
            memory.load(
                slot,
                ((p, {name: values[order[p]] for name, values in arrays.items()}) for p in parts),
            )
    slots, positions = picks[:, 0] % len(views), picks[:, 1] % len(order)
    rows = memory.take(torch.from_numpy(slots * len(order) + positions))
    assert rows.is_contiguous()
    return rows, slots, order[positions]


def test_every_encoding_is_packed() -> None:
    assert PACKED.keys() == ENCODINGS.keys()
    assert {text.partition(":")[0] for text in [*EXACT, "compact"]} == ENCODINGS.keys()


PICKS = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=12)


@pytest.mark.parametrize("text", EXACT)
@given(st.data())
@settings(max_examples=25)
def test_packed_rows_are_bit_for_bit_those_of_the_reader(text: str, data: st.DataObject) -> None:
    values = data.draw(logits())
    field, shared, views, decoded = encoded(text, values)
    chosen = data.draw(st.permutations(range(values.shape[1])))
    order = np.array(chosen[: data.draw(st.integers(1, len(chosen)))])
    some = data.draw(st.integers(1, values.shape[1]))
    sample = {name: array[:some] for name, array in views[0].items()}
    rows, slots, positions = taken(
        Packing(field, shared, sample),
        views,
        order,
        data.draw(st.integers(0, len(order))),
        np.array(data.draw(PICKS)),
    )
    expected = decoded[slots, positions]
    assert rows.dtype == torch.float32
    assert np.array_equal(rows.numpy().view(np.int32), expected.view(np.int32))


def close(rows: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-5 of a row's std, with the same argmax; near ties may have changed places."""
    std = expected.astype(np.float64).std(axis=1, keepdims=True)
    unit = 1e-5 * std + 1e-6 * np.abs(expected.mean(axis=1, keepdims=True))
    assert (np.abs(np.sort(rows, 1) - np.sort(expected, 1)) <= unit).all()
    lead = np.take_along_axis(rows, expected.argmax(axis=1)[:, None], 1)
    assert (lead == rows.max(axis=1, keepdims=True)).all()


@given(st.data())
@settings(max_examples=60)
def test_packed_compact_rows_are_those_of_the_reader_to_rounding(data: st.DataObject) -> None:
    values = data.draw(logits(most=12))
    field, shared, views, decoded = encoded("compact:1e-3", values)
    order = np.array(data.draw(st.permutations(range(values.shape[1]))))
    rows, slots, positions = taken(
        Packing(field, shared, views[data.draw(st.integers(0, len(views) - 1))]),
        views,
        order,
        data.draw(st.integers(0, len(order))),
        np.array(data.draw(PICKS)),
    )
    close(rows.numpy(), decoded[slots, positions])


@given(
    st.integers(0, 2**32),
    st.integers(0, 40),
    st.sampled_from([1, 5, 200, 2**15]),
    st.booleans(),
)
@settings(max_examples=40)
def test_any_codes_fit_whatever_the_sample_was(
    seed: int, width: int, most: int, alike: bool
) -> None:
    """Beyond 8 bits, at the ends of int16, in columns that the sample shows constant, in any slot."""
    rng = np.random.default_rng(seed)
    views = rng.integers(-most, most, (3, 6, width)).astype(np.int16)
    views[:, :, rng.random(width) < 0.3] = 3
    packed = PackedCodes(views[0] if alike else np.zeros((2, width), np.int16), 3, 6, CPU)
    for slot, codes in [(1, views[2]), *enumerate(views)]:
        packed.clear(slot)
        packed.put(slot, np.arange(5, 2, -1), codes[:2:-1])
        packed.put(slot, slice(0, 3), codes[:3])
    places = rng.integers(0, 18, 30)
    rows = packed.take(torch.from_numpy(places))
    assert np.array_equal(rows.numpy(), views.reshape(18, width)[places])


def test_rows_wider_than_16_bits_can_count() -> None:
    codes = np.zeros((2, 2**15 + 3), np.int16)
    packed = PackedCodes(codes, 1, 2, CPU)
    codes[0, -1], codes[1] = -7, -(2**15)
    packed.put(0, slice(0, 2), codes)
    assert np.array_equal(packed.take(torch.tensor([1, 0])).numpy(), codes[::-1])


def test_columns_have_the_bits_that_they_need() -> None:
    """None where a column hardly changes, and about its codes wherever these lie."""
    rng = np.random.default_rng(0)
    spread = np.array([0, 1, 3, 15, 255, 4000])
    lowest = np.array([9, -7, 20, 300, -1000, -2000])
    codes = (rng.integers(0, spread + 1, (500, 6)) + lowest).astype(np.int16)
    codes[7, 0] = 12  # an exception
    columns = Columns.choose(codes)
    assert {bits: list(c) for bits, c in columns.groups.items()} == {
        0: [0], 1: [1], 2: [2], 4: [3], 8: [4], 16: [5]
    }  # fmt: skip
    assert columns.nbytes == 2 + 1 + 1 + 1 + 1
    assert np.argwhere(columns.pack(codes)[1]).tolist() == [[7, 0]]


@pytest.mark.parametrize("shape", [(6,), (4, 6), (3, 2, 5)])
def test_features_of_any_shape(shape: tuple[int, ...]) -> None:
    values = np.maximum(np.random.default_rng(1).normal(0, 3, (2, 9, *shape)), 0).astype(np.float32)
    for text in ("channels", "quantized", "float16"):
        field, shared, views, decoded = encoded(text, values)
        order, picks = np.arange(9)[::-1], np.random.default_rng(2).integers(0, 99, (20, 2))
        rows, slots, positions = taken(Packing(field, shared, views[1]), views, order, 4, picks)
        assert np.array_equal(rows.numpy(), decoded[slots, positions])


@pytest.mark.parametrize("encoding", ["float16", "quantized", "topk:3", "compact"])
def test_what_fits_is_told_by_the_bytes_that_it_takes(tmp_path: Path, encoding: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (1, 600, 20)) + rng.normal(0, 0.1, (5, 600, 20))
    samples = Samples([f"{i:03d}" for i in range(600)], np.arange(600) % 20)
    plan = Plan("toy", "train", 20, samples.fingerprint, {"name": "none"}, 0)
    with write_arrays(
        tmp_path / "s", logits, samples=samples, plan=plan, encoding=encoding
    ) as store:
        view, shared = packed_bytes([{"logits": store}], 600)
        resident = ResidentFields([{"logits": store}], np.arange(600), 5, 5, CPU)
        resident.window(0)
        resident.close()
    assert resident.nbytes == pytest.approx(5 * view + shared, rel=0.03)
    assert view / 600 < {"float16": 41, "quantized": 40, "topk:3": 22, "compact": 32}[encoding]
