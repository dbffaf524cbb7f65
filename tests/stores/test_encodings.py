from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcache_stores import (
    ENCODINGS,
    CorruptStore,
    DataError,
    FieldSpec,
    FormatError,
    UnknownName,
    UsageError,
    describe,
    open_store,
    verify,
)
from kdcache_stores.encodings.encoding_names import (
    encoding_from_dict,
    encoding_to_dict,
    make_encoding,
)
from kdcache_stores.encodings.fidelity import measure
from kdcache_stores.encodings.topk import TopK
from kdcache_stores.format.layout import choose_shard_rows

from .conftest import CLASSES, dump, make_logits

TEXTS = ["float32", "float16", "quantized", "quantized:0.25", "topk:3", "topk:9"]
LABELS = np.array([0, 3, -1, 9, 5, -1, 1, 2])


def rows(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, (8, CLASSES), elements=elements)


def round_trip(text: str, values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    encoding = make_encoding(text)
    encoded = encoding.encode(values, labels)
    specs = {spec.name: spec for spec in encoding.arrays(values.shape[1:])}
    assert encoded.keys() == specs.keys()
    for name, spec in specs.items():
        assert encoded[name].dtype == np.dtype(spec.dtype)
        assert encoded[name].shape == (len(values), *spec.shape)
    out = np.full_like(values, np.nan)
    encoding.decode(encoded, out)
    return out


@pytest.mark.parametrize("text", TEXTS)
def test_a_row_decodes_the_same_in_any_company(text: str) -> None:
    values, labels = make_logits(0), np.arange(50) % CLASSES
    whole = round_trip(text, values, labels)
    single = np.concatenate(
        [round_trip(text, values[i : i + 1], labels[i : i + 1]) for i in range(50)]
    )
    assert np.array_equal(whole, single)


@given(rows(st.floats(-60000, 60000, width=32)))
def test_float16_is_within_half_a_unit_in_the_last_place(values: np.ndarray) -> None:
    assert np.array_equal(round_trip("float16", values, LABELS), values.astype("f2").astype("f4"))
    assert np.array_equal(round_trip("float32", values, LABELS), values)


@given(rows(st.floats(-1e4, 1e4, width=32)), st.sampled_from([0.02, 0.05, 0.25]))
def test_quantized_is_within_half_a_step(values: np.ndarray, step: float) -> None:
    decoded = round_trip(f"quantized:{step}", values, LABELS)
    std = values.std(axis=1, keepdims=True, dtype=np.float64)
    slack = 1e-5 * (np.abs(values).max() + 1)
    assert (np.abs(decoded.astype(np.float64) - values) <= std * step / 2 * 1.001 + slack).all()


@given(rows(st.floats(-100, 100, width=16)), st.integers(1, 8))
@settings(max_examples=200)
def test_topk_keeps_entries_label_and_statistics(values: np.ndarray, k: int) -> None:
    encoded = TopK(k).encode(values, LABELS)
    decoded = np.empty_like(values)
    TopK(k).decode(encoded, decoded)
    exact = values.astype(np.float64)
    largest = np.argsort(-values, axis=1, kind="stable")[:, :k]
    assert np.array_equal(encoded["ids"][:, :k], largest)
    for row, label in enumerate(LABELS):
        assert len(set(encoded["ids"][row])) == k + 1
        if label >= 0:
            assert label in encoded["ids"][row]
    kept = encoded["ids"].astype(np.int64)
    assert np.array_equal(
        np.take_along_axis(decoded, kept, axis=1), np.take_along_axis(values, kept, axis=1)
    )
    scale = np.abs(exact).max() + 1
    assert np.allclose(encoded["mean"], exact.mean(axis=1), atol=1e-6 * scale)
    assert np.allclose(encoded["std"], exact.std(axis=1), atol=1e-6 * scale)
    logsumexp = np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1)) + exact.max(1)
    assert np.allclose(encoded["logsumexp"], logsumexp, atol=1e-6 * scale)
    # the filled row has the stored statistics, and nothing in its tail exceeds the K largest
    assert np.allclose(decoded.mean(axis=1, dtype="f8"), encoded["mean"], atol=1e-5 * scale)
    if CLASSES - k - 1 != 1:
        assert np.allclose(decoded.std(axis=1, dtype="f8"), encoded["std"], atol=2e-3 * scale)
    smallest = np.take_along_axis(decoded, largest[:, -1:].astype(np.int64), axis=1)
    tail = np.ones(values.shape, bool)
    np.put_along_axis(tail, kept, False, axis=1)
    assert (decoded <= smallest + 2e-3 * scale)[tail].all()


def test_topk_reproduces_real_looking_statistics_closely() -> None:
    values = np.random.default_rng(0).normal(0, 3, (2000, 100)).astype(np.float32)
    decoded = round_trip("topk:10", values, np.arange(2000) % 100)
    assert np.abs(decoded.mean(1, dtype="f8") - values.mean(1, dtype="f8")).max() < 1e-6
    assert np.abs(decoded.std(1, dtype="f8") / values.std(1, dtype="f8") - 1).max() < 1e-6


@pytest.mark.parametrize(("classes", "dtype"), [(255, "uint8"), (256, "uint16"), (70000, "uint32")])
def test_topk_ids_are_wide_enough_for_classes_and_fill(classes: int, dtype: str) -> None:
    ids = TopK(2).arrays((classes,))[1]
    assert ids.dtype == dtype
    assert ids.fill >= classes


@pytest.mark.parametrize("text", TEXTS)
def test_constant_rows(text: str) -> None:
    values = np.full((8, CLASSES), 2.5, np.float32)
    assert np.array_equal(round_trip(text, values, LABELS), values)


@pytest.mark.parametrize("text", TEXTS)
def test_fill_values_never_decode_to_a_number(text: str) -> None:
    encoding = make_encoding(text)
    encoded = encoding.encode(make_logits(0)[:8], LABELS)
    for spec in encoding.arrays((CLASSES,)):
        if spec.name == "logsumexp" or (text == "topk:9" and spec.name in ("mean", "std")):
            continue  # for readers of the arrays; the filled row does not need it
        damaged = {name: values.copy() for name, values in encoded.items()}
        damaged[spec.name][3] = spec.fill
        out = np.zeros((8, CLASSES), np.float32)
        try:
            encoding.decode(damaged, out)
        except CorruptStore:
            continue
        assert np.isnan(out[3]).any()
        assert np.isfinite(out[2]).all()


@pytest.mark.parametrize("text", TEXTS)
def test_stores_of_each_encoding(tmp_path: Path, text: str) -> None:
    store = open_store(dump(tmp_path / "store", views=2, encoding=text))
    labels = np.arange(50) % CLASSES
    for view in range(2):
        expected = round_trip(text, make_logits(view), labels)
        assert np.array_equal(store.read(view), expected)
        assert np.array_equal(store.read(view, [40, 3, 21, 3]), expected[[40, 3, 21, 3]])
        assert np.array_equal(store.read(view, slice(7, 33)), expected[7:33])
    assert verify(store).ok
    info = describe(store)["fields"]["logits"]
    hits = [(make_logits(view).argmax(1) == labels).mean() for view in range(2)]
    assert info["top1"] == pytest.approx(np.mean(hits))
    assert info["fidelity"]["rows"] == 100
    live = np.concatenate([make_logits(view) for view in range(2)])
    decoded = np.concatenate([store.read(view) for view in range(2)])
    assert info["fidelity"]["kl_z_mean"] == pytest.approx(measure(live, decoded)["kl_z_mean"], 1e-4)


def test_encodings_survive_their_metadata() -> None:
    for text in [*TEXTS, "compact", "compact:2.5e-5", "channels", "channels:0.02"]:
        encoding = make_encoding(text)
        assert encoding_from_dict(encoding_to_dict(encoding), "here") == encoding
    assert {*(text.split(":")[0] for text in TEXTS), "compact", "channels"} == set(ENCODINGS)


@pytest.mark.parametrize(
    "text",
    ["float16:2", "quantized:0", "quantized:x", "quantized:nan", "topk", "topk:0", "topk:-1"],
)
def test_wrong_parameters(text: str) -> None:
    with pytest.raises(UsageError):
        make_encoding(text)


def test_unknown_encodings() -> None:
    with pytest.raises(UnknownName, match="did you mean 'float16'"):
        make_encoding("float61")
    with pytest.raises(FormatError, match="a newer version may read it"):
        encoding_from_dict({"name": "compact2"}, "here")
    for value in ({}, [], {"name": 3}, {"name": "topk"}, {"name": "topk", "k": "3"}):
        with pytest.raises(FormatError):
            encoding_from_dict(value, "here")


def test_what_an_encoding_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="more than 10 logits"):
        dump(tmp_path / "a", encoding="topk:10")
    with pytest.raises(UsageError, match="topk"):
        dump(tmp_path / "b", fields={"maps": FieldSpec((2, 3, 3), "topk:2")})
    with pytest.raises(DataError, match="beyond float16"):
        make_encoding("float16").encode(np.full((1, 2), 1e6, np.float32), np.array([0]))


def test_shards_of_sparse_rows_stay_small_when_dense() -> None:
    specs = make_encoding("topk:64").arrays((150_000,))
    rows = choose_shard_rows(10**7, specs, 150_000)
    assert rows * 150_000 * 4 <= 256 * 2**20
    assert choose_shard_rows(1_281_167, make_encoding("float16").arrays((1000,)), 1000) > 32_000


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_shards_of_narrow_rows_have_grain(classes: int) -> None:
    """A view of ImageNet's size keeps 20 processes busy, however few classes it has."""
    specs = make_encoding("float16").arrays((classes,))
    rows = choose_shard_rows(1_281_167, specs, classes)
    assert 32_000 < rows <= 65_536
    assert rows * 2 * classes <= 64 * 2**20
    assert choose_shard_rows(1_281_167, specs, classes, 1000) <= 1000
    assert -(-50_000 // choose_shard_rows(50_000, specs, classes)) == (2 if classes == 1000 else 1)


@pytest.mark.parametrize("text", ["topk:3", "quantized"])
def test_a_standard_deviation_below_zero_is_refused(text: str) -> None:
    encoding = make_encoding(text)
    encoded = encoding.encode(make_logits(0)[:8], LABELS)
    encoded["std"][2] *= -1
    with pytest.raises(CorruptStore, match="standard deviation of -"):
        encoding.decode(encoded, np.zeros((8, CLASSES), np.float32))


def test_entries_of_one_class_twice_are_refused() -> None:
    encoded = TopK(3).encode(make_logits(0)[:8], LABELS)
    encoded["ids"][5, 3] = encoded["ids"][5, 0]
    with pytest.raises(CorruptStore, match="named twice"):
        TopK(3).decode(encoded, np.zeros((8, CLASSES), np.float32))


@pytest.mark.parametrize("text", [*TEXTS, "compact:1e-3", "channels"])
def test_rows_as_they_are_stored_decode_to_those_that_are_read(tmp_path: Path, text: str) -> None:
    with open_store(dump(tmp_path / "store", encoding=text)) as store:
        item = store.fields["logits"]
        specs = {spec.name: spec for spec in item.encoding.arrays(item.shape)}
        rows = np.array([49, 3, 3, 18, -1, 20])
        for chosen in (rows, slice(5, 33), None):
            encoded = store.read_encoded(2, chosen)
            shared = store.shared_arrays()
            assert encoded.keys() | shared.keys() == specs.keys()
            expected = store.read(2, chosen)
            for name, array in encoded.items():
                assert array.dtype == specs[name].dtype
                assert array.shape == (len(expected), *specs[name].shape)
            out = np.empty_like(expected)
            item.encoding.decode({**encoded, **shared}, out)
            np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5 if shared else 0)
        with pytest.raises(UnknownName, match="pooled"):
            store.read_encoded(0, field="pooled")
        with pytest.raises(UsageError, match="has views 0 to 2, asked for 3"):
            store.read_encoded(3)
