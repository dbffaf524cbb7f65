"""Fields beside the logits, `channels`, and the head: written, measured, damaged, repaired, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from kdcache_stores import (
    CorruptStore,
    DataError,
    FieldSpec,
    FormatError,
    KDCacheError,
    MismatchError,
    Store,
    StoreWriter,
    UnfinishedStore,
    UnknownName,
    UsageError,
    describe,
    item_digest,
    make_probe,
    open_store,
    reopen,
    verify,
    write_arrays,
)
from kdcache_stores.encodings.channels import Channels
from kdcache_stores.format.head import head_layouts
from kdcache_stores.format.manifest import Entry
from kdcache_stores.format.shards import encode_shard
from kdcache_stores.share.compare import compare_stores
from kdcache_stores.share.pull import pull_store
from kdcache_stores.share.push import push_store
from kdcache_stores.write.importing import read_npz

from .conftest import (
    CLASSES,
    SAMPLES,
    make_logits,
    make_plan,
    make_samples,
    open_writer,
    tree,
)
from .hostile import put, reseal

WIDTH = 6
SHAPES = {"pooled": (WIDTH,), "tokens": (4, WIDTH), "maps": (WIDTH, 3, 3),
          "last_4": (WIDTH, 4, 4), "stage_3": (WIDTH, 2, 2)}  # fmt: skip
LABELS = np.zeros(0, np.int64)


def features(view: int, shape: tuple[int, ...], n: int = SAMPLES) -> np.ndarray:
    """What a ReLU leaves, float32 (n, *shape): half zeros, channels of very different size."""
    rng = np.random.default_rng([view, *shape])
    size = 2.0 ** np.arange(-2, WIDTH - 2)
    along = size[:, None, None] if len(shape) == 3 else size
    return np.maximum(rng.normal(size=(n, *shape)) * along, 0).astype(np.float32)


def head() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return rng.normal(size=(CLASSES, WIDTH)).astype("f4"), rng.normal(size=CLASSES).astype("f4")


def outputs(view: int, names: list[str]) -> dict[str, np.ndarray]:
    return {
        name: make_logits(view) if name == "logits" else features(view, SHAPES[name])
        for name in names
    }


def fill(writer: StoreWriter, limit: int | None = None) -> None:
    names = list(writer.header.fields)
    for name, rows in writer.calibration_rows.items():
        writer.fit({name: np.stack([outputs(view, [name])[name][rows] for view in (0, 1)])})
    for shard in writer.pending()[:limit]:
        live = outputs(shard.view, names)
        writer.write(shard, {name: rows[shard.start : shard.stop] for name, rows in live.items()})


def opened(path: Path, encodings: dict[str, str] | None = None, **changes: Any) -> StoreWriter:
    encodings = encodings or {"logits": "float16", "pooled": "channels:0.02"}
    fields = {
        name: FieldSpec(SHAPES.get(name, (CLASSES,)), text) for name, text in encodings.items()
    }
    return open_writer(path, **{"views": 2, "fields": fields, "head": head(), **changes})


def dump(path: Path, encodings: dict[str, str] | None = None, **changes: Any) -> Store:
    with opened(path, encodings, **changes) as writer:
        fill(writer)
        writer.seal()
    return open_store(path)


# ---- fields by their spec --------------------------------------------------------------------------


def test_only_logits_have_a_top1_and_a_fidelity_in_nats(tmp_path: Path) -> None:
    rows = np.stack([make_logits(view) for view in range(2)])
    arrays = {"logits": rows, "auxiliary": rows + 1, "exact": rows}
    encoding = {"auxiliary": "quantized", "exact": "float32"}
    plan = make_plan(make_samples())
    store = write_arrays(tmp_path, arrays, samples=make_samples(), plan=plan, encoding=encoding)
    fields = describe(store)["fields"]
    for name in ("auxiliary", "exact"):  # of shape (K,), as logits are
        assert [fields[name][key] for key in ("labelled", "top1", "fidelity")] == [None] * 3
    assert fields["logits"]["fidelity"]["rows"] == 2 * SAMPLES
    assert fields["logits"]["error"] is fields["exact"]["error"] is None
    off = store.read(0, field="auxiliary").astype("f8") - arrays["auxiliary"][0]
    error = (off**2).sum(1) / (arrays["auxiliary"][0].astype("f8") ** 2).sum(1)
    assert fields["auxiliary"]["error"] == pytest.approx(error.mean(), rel=0.2)


@pytest.mark.parametrize(
    ("encodings", "minor"),
    [
        ({"logits": "quantized", "pooled": "float16"}, 0),
        ({"logits": "float16", "pooled": "quantized"}, 1),
        ({"logits": "channels", "pooled": "float32"}, 1),
    ],
)
def test_a_store_is_of_the_oldest_format_that_holds_it(
    tmp_path: Path, encodings: dict[str, str], minor: int
) -> None:
    store = dump(tmp_path / "without", encodings, head=None)
    assert store.header.format == (1, minor)
    assert ("error" in zarr_free_columns(tmp_path / "without")) == (
        "quantized" in encodings["pooled"]
    )
    assert dump(tmp_path / "with", encodings).header.format == (1, 1)


def zarr_free_columns(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    names: list[str] = pq.read_schema(path / "manifest.parquet").names
    return names


def test_an_error_of_several_shards_is_that_of_all_rows(tmp_path: Path) -> None:
    one = dump(tmp_path / "one", shard_rows=50)
    several = dump(tmp_path / "several", shard_rows=7)
    errors = [describe(store)["fields"]["pooled"]["error"] for store in (one, several)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert 0 < errors[0] < 1e-3


def test_the_logits_that_a_head_makes_are_measured(tmp_path: Path) -> None:
    encodings = {"logits": "float16", "pooled": "channels:0.02", "last_4": "channels:0.05",
                 "stage_3": "channels:0.05"}  # fmt: skip
    store = dump(tmp_path / "store", encodings, shard_rows=7)
    weight, bias = (values.astype("f8") for values in head())

    def log_softmax(v: np.ndarray) -> np.ndarray:
        v = v - v.max(1, keepdims=True)
        return v - np.log(np.exp(v).sum(1, keepdims=True))

    for name in ("pooled", "last_4"):
        found = []
        for view in range(2):
            live, stored = (
                log_softmax(rows.reshape(SAMPLES, WIDTH, -1).astype("f8").mean(2) @ weight.T + bias)
                for rows in (features(view, SHAPES[name]), store.read(view, field=name))
            )
            found.append((np.exp(live) * (live - stored)).sum(1).mean())
        described = describe(store)["fields"][name]
        assert described["head_kl"] == pytest.approx(np.mean(found), rel=1e-4)
        assert described["error"] > 0
    assert describe(store)["fields"]["stage_3"]["head_kl"] is None
    assert describe(store)["fields"]["logits"]["head_kl"] is None


def test_a_store_without_a_head_has_no_such_column(tmp_path: Path) -> None:
    store = dump(tmp_path / "store", head=None)
    assert describe(store)["fields"]["pooled"]["head_kl"] is None
    assert "head_kl" not in zarr_free_columns(tmp_path / "store")


def test_a_field_that_a_store_needs_itself_is_refused(tmp_path: Path) -> None:
    for name in ("head", "records", "probes", "once", "Logits"):
        with pytest.raises(UsageError, match="field"):
            open_writer(tmp_path, fields={name: FieldSpec((3,))})
    with pytest.raises(UsageError, match=r"logits must have shape \(10,\)"):
        open_writer(tmp_path, fields={"logits": FieldSpec((9,))})


def test_arrays_of_any_fields_are_imported(tmp_path: Path) -> None:
    samples, plan = make_samples(), make_plan(make_samples())
    one = {"logits": make_logits(0), "pooled": features(0, (WIDTH,))}
    store = write_arrays(
        tmp_path / "one", one, samples=samples, encoding={"pooled": "float32"}, head=head()
    )
    assert np.array_equal(store.read(0, field="pooled"), one["pooled"])
    assert store.head is not None
    alone = {"tokens": np.stack([features(v, SHAPES["tokens"]) for v in range(2)])}
    kept = write_arrays(
        tmp_path / "two", alone, samples=samples, plan=plan, encoding="channels:0.02"
    )
    assert kept.fields.keys() == {"tokens"}
    with pytest.raises(UsageError, match="need a plan"):
        write_arrays(tmp_path / "three", alone, samples=samples)
    with pytest.raises(DataError, match="as many views"):
        write_arrays(tmp_path / "four", {**alone, "pooled": one["pooled"][None]}, samples=samples)
    with pytest.raises(UnknownName, match="field"):
        write_arrays(tmp_path / "five", one, samples=samples, encoding={"pool": "float32"})


def test_an_archive_may_hold_more_than_logits(tmp_path: Path) -> None:
    file, keys = tmp_path / "outputs.npz", np.array(make_samples().keys)
    np.savez(file, keys=keys, logits=make_logits(0), pooled=features(0, (WIDTH,)))
    arrays, _, labels = read_npz(file)
    assert arrays.keys() == {"logits", "pooled"}
    assert labels is None
    np.savez(file, keys=keys, logits=make_logits(0), pooled=features(0, (WIDTH,))[:-1])
    with pytest.raises(DataError, match="pooled must be floats"):
        read_npz(file)


# ---- channels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pooled", "tokens", "maps"])
@pytest.mark.parametrize("step", [0.02, 0.5])
def test_channels_are_within_half_a_step_of_their_spread(
    tmp_path: Path, name: str, step: float
) -> None:
    store = dump(tmp_path, {"logits": "float16", name: f"channels:{step}"})
    spread = zarr.open_array(tmp_path / name / "spread", mode="r")[0, 0]
    along = spread[:, None, None] if name == "maps" else spread
    for view in range(2):
        live, decoded = features(view, SHAPES[name]), store.read(view, field=name)
        assert (np.abs(decoded - live) <= 0.5001 * step * along).all()
        assert (decoded[live == 0] == 0).all()
    assert verify(store).ok
    fitted = describe(store)["fields"][name]["fitted"]
    assert fitted["channels"] == WIDTH
    assert fitted["least"] <= fitted["median"] <= fitted["most"] == pytest.approx(spread.max())


@given(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.integers(0, 20),
    st.sampled_from([0.005, 0.05, 1.0]),
)
def test_channels_hold_what_they_were_fitted_to(offset: float, power: int, step: float) -> None:
    rng = np.random.default_rng(power)
    rows = (offset + 10.0**power * rng.normal(size=(1, 40, 5))).astype(np.float32)
    rows[..., 3] = offset
    encoding = Channels(step)
    shared = encoding.fit(rows)
    decoded = np.empty_like(rows[0])
    encoding.decode({**encoding.encode(rows[0], LABELS, shared), **shared}, decoded)
    room = 0.5001 * step * shared["spread"] + 1e-6 * np.abs(rows[0])
    assert (np.abs(decoded - rows[0]) <= room).all()


def test_channels_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not \(2, 2, 2, 2\)"):
        Channels().arrays((2, 2, 2, 2))
    for text in ("channels:0", "channels:2", "channels:x"):
        with pytest.raises(UsageError, match="step of channels"):
            opened(tmp_path, {"pooled": text})
    shared = Channels(0.05).fit(features(0, (WIDTH,))[None])
    far = features(1, (WIDTH,))
    far[7, 2] = 1e9
    with pytest.raises(DataError, match=r"1e\+09 at \(2,\) is .* use a larger step, or float16"):
        Channels(0.05).encode(far, LABELS, shared)
    with pytest.raises(DataError, match="beyond float32"):
        Channels().fit(np.full((1, 4, 2), 1e-44, np.float32))
    constant = Channels().fit(np.zeros((1, 4, 2), np.float32))
    assert (constant["spread"] == 1).all()


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_spreads_that_no_writer_writes(tmp_path: Path, value: float) -> None:
    store = dump(tmp_path)
    layout = next(a for a in store.layouts["pooled"] if a.spec.name == "spread")
    spread = np.ones((1, WIDTH), np.float32)
    spread[0, 2] = value
    (tmp_path / layout.key(0, 0)).write_bytes(encode_shard(layout, spread))
    reseal(tmp_path)
    with pytest.raises(CorruptStore, match="spreads from"):
        open_store(tmp_path).read(0, field="pooled")


def test_fields_with_nothing_per_sample_are_written_in_any_order(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        assert not writer.needs_view_0
        assert len(writer.calibration_rows["pooled"]) == SAMPLES
        last = writer.pending()[-1]
        fill(writer, 0)
        live = outputs(last.view, ["logits", "pooled"])
        writer.write(last, {name: rows[last.start : last.stop] for name, rows in live.items()})
        fill(writer)
        writer.seal()
    assert verify(open_store(tmp_path)).ok


def test_resumed_and_grown_stores_end_the_same(tmp_path: Path) -> None:
    dump(tmp_path / "whole", views=3)
    for _ in range(4):
        with opened(tmp_path / "parts", views=3) as writer:
            fill(writer, 2)
            if writer.pending():
                with pytest.raises(UnfinishedStore):
                    writer.seal()
    with reopen(tmp_path / "parts") as writer:
        fill(writer)
        writer.seal()
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    dump(tmp_path / "grown", views=2)
    grown = dump(tmp_path / "grown", views=3)
    assert grown.digest == open_store(tmp_path / "whole").digest
    assert grown.head is not None


# ---- head ------------------------------------------------------------------------------------------


def test_a_damaged_head_loses_no_shard(tmp_path: Path) -> None:
    store = dump(tmp_path)
    whole = tree(tmp_path)
    for layout in head_layouts((CLASSES, WIDTH)):
        file = tmp_path / layout.key(0, 0)
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        report = verify(open_store(tmp_path))
        assert [problem.key for problem in report.problems] == [layout.key(0, 0)]
        assert report.rewrite == []
        with pytest.raises(CorruptStore, match="head/"):
            open_store(tmp_path).head  # noqa: B018
        assert np.array_equal(open_store(tmp_path).read(1), store.read(1))
        with opened(tmp_path, repair=True) as writer:
            assert not writer.pending()
            writer.seal()
        assert tree(tmp_path) == whole


def test_a_head_is_no_part_of_any_digest(tmp_path: Path) -> None:
    with_head = dump(tmp_path / "with")
    without = dump(tmp_path / "without", head=None)
    assert with_head.digest == without.digest
    assert without.head is None
    comparison = compare_stores(with_head, without)
    assert comparison.same_content
    assert not comparison.same_head


def test_a_head_must_fit_the_teacher(tmp_path: Path) -> None:
    weight, bias = head()
    wrong: list[tuple[Any, Any, str]] = [
        (weight.T, bias, "head must be a weight"),
        (weight, bias[:-1], "head must be a weight"),
        (weight.astype(int), bias, "head must hold floats"),
        (np.full_like(weight, np.nan), bias, "finite"),
        (weight.astype("f8") * 1e300, bias, "finite"),
    ]
    for w, b, message in wrong:
        with pytest.raises(DataError, match=message):
            opened(tmp_path / "x", head=(w, b))
    with pytest.raises(UsageError, match="is not kept"):
        opened(tmp_path / "x", head=(np.broadcast_to(np.float32(1), (CLASSES, 2**26)), bias))
    assert not (tmp_path / "x").exists()
    with opened(tmp_path / "y") as writer:
        fill(writer, 1)
    with pytest.raises(MismatchError, match="another head"):
        opened(tmp_path / "y", head=(weight + 1, bias))
    with pytest.raises(MismatchError, match="head"):
        opened(tmp_path / "y", head=None)
    dump(tmp_path / "y")


def _bad_head(path: Path, which: int, values: np.ndarray) -> None:
    layout = head_layouts((CLASSES, WIDTH))[which]
    (path / layout.key(0, 0)).write_bytes(encode_shard(layout, values[None]))


def test_heads_that_break_the_format(tmp_path: Path) -> None:
    dump(tmp_path / "whole")
    root = json.loads((tmp_path / "whole/zarr.json").read_bytes())
    weight = json.loads((tmp_path / "whole/head/weight/zarr.json").read_bytes())
    path = tmp_path / "store"

    def wrong(key: str, data: bytes) -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", path)
        (path / key).write_bytes(data)
        reseal(path)
        with pytest.raises(FormatError):
            open_store(path)

    place = "attributes.kdcache.head"
    for value in (
        [9, 6],
        [10],
        [10, 7],
        [10, 0],
        [10, -6],
        [10, 2**40],
        [10, 2**31],
        "10",
        [True, 6],
    ):
        wrong("zarr.json", put(root, place, value))
    for name, value in (
        ("shape", [1, 1, 10, 7]),
        ("shape", [2, 1, 10, 6]),
        ("data_type", "float64"),
        ("chunk_grid.configuration.chunk_shape", [1, 2, 10, 6]),
    ):
        wrong("head/weight/zarr.json", put(weight, name, value))
    group = json.loads((path / "head/zarr.json").read_bytes())
    wrong("head/zarr.json", put(group, "attributes.kdcache.shape", [10, 7]))


def test_head_objects_that_lie(tmp_path: Path) -> None:
    key = head_layouts((CLASSES, WIDTH))[0].key(0, 0)
    dump(tmp_path / "whole")
    for case, change in enumerate(
        (
            lambda entries: entries.pop(key),
            lambda entries: entries.update(
                {key: Entry(**{**vars(entries[key]), "kind": "metadata"})}
            ),
            lambda entries: entries.update({key: Entry(**{**vars(entries[key]), "kind": "once"})}),
        )
    ):
        path = tmp_path / f"{case}"
        shutil.copytree(tmp_path / "whole", path)
        reseal(path, change)
        with pytest.raises(FormatError):
            open_store(path)
    _bad_head(tmp_path / "whole", 0, np.full((CLASSES, WIDTH), np.nan, np.float32))
    reseal(tmp_path / "whole")
    store = open_store(tmp_path / "whole")
    with pytest.raises(CorruptStore, match="not finite"):
        store.head  # noqa: B018
    assert not verify(store).ok
    (tmp_path / "whole" / key).unlink()
    with pytest.raises(KDCacheError, match="is missing"):
        open_store(tmp_path / "whole").head  # noqa: B018


def test_a_writer_leaves_newer_formats_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        fill(writer, 1)
    document = json.loads((tmp_path / "zarr.json").read_bytes())
    (tmp_path / "zarr.json").write_bytes(put(document, "attributes.kdcache.format", [1, 2]))
    with pytest.raises(FormatError, match="this kdcache writes"):
        opened(tmp_path)


def test_an_encoding_of_a_newer_format_than_the_store_is_refused(tmp_path: Path) -> None:
    dump(tmp_path, head=None)
    document = json.loads((tmp_path / "zarr.json").read_bytes())
    (tmp_path / "zarr.json").write_bytes(put(document, "attributes.kdcache.format", [1, 0]))
    reseal(tmp_path)
    with pytest.raises(FormatError, match=r"pooled has the encoding channels, which format 1\.0"):
        open_store(tmp_path)


def test_heads_and_channels_are_pushed_and_pulled_with_any_part(tmp_path: Path) -> None:
    store = dump(tmp_path / "store", views=3)
    push_store(tmp_path / "store", str(tmp_path / "there"))
    assert tree(tmp_path / "there") == tree(tmp_path / "store")
    pull_store(str(tmp_path / "there"), tmp_path / "part", views=(1, 3))
    with open_store(tmp_path / "part") as part:
        assert verify(part).ok
        assert part.view_digests == store.view_digests[1:]
        assert part.head is not None
        assert np.array_equal(part.head[0], head()[0])
        assert np.array_equal(part.read(2, field="pooled"), store.read(2, field="pooled"))


def test_fields_are_compared_by_their_spec(tmp_path: Path) -> None:
    a = dump(tmp_path / "a", {"logits": "float16", "pooled": "channels:0.02"})
    b = dump(tmp_path / "b", {"logits": "quantized", "pooled": "channels:0.5"})
    c = dump(tmp_path / "c", {"logits": "float16", "tokens": "float16"})
    comparison = compare_stores(a, b)
    assert comparison.differing_views == [0, 1]
    assert [(d.view, d.field) for d in comparison.field_differences] == [
        (view, name) for name in ("logits", "pooled") for view in (0, 1)
    ]
    logits, _, pooled, _ = comparison.field_differences
    assert logits.kl_mean is not None
    assert logits.kl_mean > 0
    assert pooled.kl_mean is pooled.top1_agreement is None
    assert 0 < pooled.error_mean < pooled.error_worst
    assert compare_stores(a, c).not_compared.keys() == {"pooled", "tokens"}
    assert not compare_stores(a, c).same_encoding
    json.dumps(comparison.to_dict())


# ---- probes ----------------------------------------------------------------------------------------


def test_probes_of_images_and_of_anything_else() -> None:
    image = np.arange(3 * 16 * 16, dtype=np.uint8).reshape(3, 16, 16)
    probe = make_probe(4, 2, image)
    assert (probe.row, probe.view, len(probe.coarse)) == (4, 2, 3 * 64)
    assert probe.coarse[:2] == bytes([image[0, 1, 1], image[0, 1, 3]])
    tokens = np.arange(100, dtype=">i8")
    assert make_probe(0, 0, tokens).sha256 == make_probe(0, 0, tokens.astype("<i8")).sha256
    values = np.frombuffer(make_probe(0, 0, tokens).coarse, "<f8")
    assert list(values[:3]) == [0, 2, 3]
    assert values[-1] == 99
    short = np.float32([[0.5, 1.5]])
    assert np.array_equal(np.frombuffer(make_probe(0, 0, short).coarse, "<f8"), short[0])
    digests = {item_digest(short), item_digest(short[0]), item_digest(short.astype("f8"))}
    assert len(digests) == 3
    with pytest.raises(DataError, match="must hold numbers"):
        make_probe(0, 0, np.array(["text"]))
