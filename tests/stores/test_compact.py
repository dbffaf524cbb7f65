"""`compact` keeps its promises: the target KL, exact argmax and moments, whatever the logits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from kdcache_stores import (
    DataError,
    FieldSpec,
    KDCacheError,
    Samples,
    Shard,
    Store,
    StoreWriter,
    UnfinishedStore,
    UsageError,
    describe,
    open_store,
    verify,
)
from kdcache_stores.encodings import compact
from kdcache_stores.encodings.fidelity import kl, measure, standardize
from kdcache_stores.format.header import Field
from kdcache_stores.write.fitting import calibration_rows

from .conftest import make_plan, make_teacher, tree

Logits = np.ndarray


def teacher_like(
    views: int, n: int, classes: int, rank: int = 8, within: float = 0.2, seed: int = 0
) -> Logits:
    """Logits float32 (views, n, classes) of a linear layer over features that move a little."""
    rng = np.random.default_rng(seed)
    layer = rng.normal(size=(rank, classes)) * np.linspace(2, 0.2, rank)[:, None]
    centre = rng.normal(size=(n, rank))
    moved = centre + within * rng.normal(size=(views, n, rank))
    return (moved @ layer + rng.normal(size=classes)).astype(np.float32)


def opened(path: Path, logits: Logits, encoding: str = "compact:3e-4", **more: Any) -> StoreWriter:
    views, n, classes = logits.shape
    samples = Samples([f"{i:05d}" for i in range(n)], np.arange(n) % classes)
    plan, teacher = make_plan(samples, classes), make_teacher(classes)
    spec = {"logits": FieldSpec((classes,), encoding)}
    options = {"shard_rows": 32, "views": views} | more
    return StoreWriter(path, plan=plan, teacher=teacher, samples=samples, fields=spec, **options)


def prepare(writer: StoreWriter, logits: Logits) -> None:
    for name, rows in writer.calibration_rows.items():
        writer.fit({name: logits[:2, rows]})


def put(writer: StoreWriter, shard: Shard, logits: Logits) -> None:
    writer.write(shard, {"logits": logits[shard.view, shard.start : shard.stop]})


def dump(path: Path, logits: Logits, encoding: str = "compact:3e-4", **more: Any) -> Store:
    with opened(path, logits, encoding, **more) as writer:
        prepare(writer, logits)
        for shard in writer.pending():
            put(writer, shard, logits)
        writer.seal()
    return open_store(path)


def check(store: Store, logits: Logits, kl: float) -> None:
    """Every view decodes to the argmax and the moments of the live rows, and to the target."""
    measured = []
    for view in range(store.n_views):
        live, decoded = logits[view].astype(np.float64), store.read(view).astype(np.float64)
        assert np.array_equal(decoded.argmax(1), live.argmax(1))
        std = live.std(1)
        near = 2.0**-16 * std + 1e-6 * np.abs(live).max(1) + 1e-30
        assert (np.abs(decoded.std(1) - std) <= near).all()
        assert (np.abs(decoded.mean(1) - live.mean(1)) <= near).all()
        measured.append(measure(logits[view], decoded.astype(np.float32))["kl_z_mean"])
    assert np.mean(measured) <= kl


@pytest.mark.parametrize(
    ("samples", "classes", "rows"),
    [
        (1, 10, 1),
        (100, 10, 100),
        (2000, 10, 256),
        (5000, 10, 625),
        (50000, 100, 1024),
        (1281167, 1000, 4000),
    ],
)
def test_calibration_rows_are_a_small_part(samples: int, classes: int, rows: int) -> None:
    field = Field.make("logits", FieldSpec((classes,), "compact"))
    chosen = calibration_rows(field, samples)
    assert chosen is not None
    assert len(np.unique(chosen)) == rows
    assert (chosen[0], chosen[-1]) == (0, samples - 1)


def test_moments_are_finer_than_those_of_float16(tmp_path: Path) -> None:
    live = teacher_like(views=1, n=600, classes=100)
    exact = np.stack([live.mean(2, dtype="f8"), live.std(2, dtype="f8")])
    half = live.astype(np.float16).astype(np.float64)
    store = dump(tmp_path, live)
    decoded = store.read(0).astype(np.float64)[None]
    ours, halfs = (
        np.abs(np.stack([rows.mean(2), rows.std(2)]) - exact) for rows in (decoded, half)
    )
    assert (ours.mean((1, 2)) < halfs.mean((1, 2))).all()
    assert (store.read(0).argmax(1) == live[0].argmax(1)).all()


@pytest.mark.parametrize("kl", [3e-5, 3e-4, 3e-3])
def test_the_target_is_reached_for_few_bytes(tmp_path: Path, kl: float) -> None:
    logits = teacher_like(views=4, n=600, classes=40)
    store = dump(tmp_path, logits, f"compact:{kl}", shard_rows=300)
    check(store, logits, 1.1 * kl)
    field = describe(store)["fields"]["logits"]
    assert 0.3 * kl < field["fidelity"]["kl_z_mean"] < 1.1 * kl
    assert field["fidelity"]["top1_agreement"] == 1
    assert field["arrays"]["values"] < 4 * 600 * 8
    assert sum(field["arrays"].values()) == field["nbytes"]
    assert 7 <= field["fitted"]["components"] <= 10
    assert field["fitted"]["directions"] == 39
    assert verify(store).ok


def test_the_five_lines_of_the_format(tmp_path: Path) -> None:
    logits = teacher_like(views=2, n=64, classes=10)
    store = dump(tmp_path, logits)
    document = (Path(__file__).parents[2] / "stores" / "FORMAT.md").read_text()
    (code,) = re.findall(r"```python\n(signed = .*?)```", document, re.DOTALL)
    arrays = zarr.open_group(tmp_path / "logits", mode="r").arrays()
    names = {"f": {name: array[:] for name, array in arrays}, "v": 1, "np": np}
    exec(code, names)
    rows = names["rows"]
    assert names["f"]["top"][1].any()
    np.testing.assert_allclose(store.read(1), rows, rtol=0, atol=2e-4)
    assert np.array_equal(rows.argmax(1), logits[1].argmax(1))


def with_outlier(logits: Logits) -> Logits:
    logits[:, 33] = 1e6 * np.eye(logits.shape[2])[3]
    return logits


HARD: dict[str, Callable[[], Logits]] = {
    "one class": lambda: np.random.default_rng(0).normal(size=(2, 40, 1)).astype("f4"),
    "two classes": lambda: teacher_like(2, 40, 2),
    "one sample": lambda: teacher_like(3, 1, 10),
    "one view": lambda: teacher_like(1, 64, 10),
    "many views": lambda: teacher_like(20, 32, 10),
    "a thousand classes, few samples": lambda: teacher_like(2, 48, 1000, rank=32),
    "collinear classes": lambda: np.repeat(teacher_like(3, 64, 5), 3, axis=2),
    "huge": lambda: (teacher_like(3, 64, 10) * 1e30).astype("f4"),
    "tiny": lambda: (teacher_like(3, 64, 10) * 1e-30).astype("f4"),
    "far from zero": lambda: teacher_like(3, 64, 10) + np.float32(1000),
    "constant rows": lambda: (
        teacher_like(3, 64, 10) * (np.arange(64) % 3 > 0)[:, None].astype("f4")
    ),
    "ties": lambda: np.round(teacher_like(3, 64, 10)).astype("f4"),
    "equal views": lambda: np.repeat(teacher_like(1, 64, 10), 3, axis=0),
    "certain": lambda: (np.eye(10, dtype="f4")[np.arange(64) % 10] * 80)[None].repeat(2, 0),
    "an outlier": lambda: with_outlier(teacher_like(2, 64, 10)),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_logits(tmp_path: Path, name: str) -> None:
    logits = HARD[name]()
    check(dump(tmp_path, logits), logits, 6e-4)


def test_two_samples_say_roughly_what_a_step_costs(tmp_path: Path) -> None:
    logits = teacher_like(3, 2, 10)
    check(dump(tmp_path, logits), logits, 3e-3)


@pytest.mark.slow
def test_two_hundred_and_forty_views(tmp_path: Path) -> None:
    logits = teacher_like(240, 32, 10)
    check(dump(tmp_path, logits), logits, 6e-4)


def test_directions_that_no_row_uses_are_left_out(tmp_path: Path) -> None:
    logits = teacher_like(2, 300, 200, rank=20)
    store = dump(tmp_path, logits, shard_rows=300)
    assert describe(store)["fields"]["logits"]["fitted"]["components"] <= 22
    check(store, logits, 4e-4)


def test_the_basis_need_not_know_every_row(tmp_path: Path) -> None:
    logits = teacher_like(2, 64, 30, rank=3)
    strange = logits.copy()
    strange[1] = np.random.default_rng(1).normal(size=strange[1].shape)
    with opened(tmp_path, logits) as writer:
        prepare(writer, logits)
        for shard in writer.pending():
            put(writer, shard, strange)
        writer.seal()
    check(open_store(tmp_path), strange, 1.0)
    assert describe(open_store(tmp_path))["fields"]["logits"]["fidelity"]["kl_z_worst"] > 1e-3


def test_a_target_out_of_reach_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "MOST_COMPONENTS", 8)
    logits = np.random.default_rng(0).normal(size=(2, 40, 30)).astype(np.float32)
    with (
        opened(tmp_path, logits) as writer,
        pytest.raises(DataError, match=r"cannot reach a KL of 0.0003 .* float16"),
    ):
        prepare(writer, logits)


@pytest.mark.parametrize("text", ["compact:0", "compact:1", "compact:x", "compact:nan", "compact:"])
def test_wrong_parameters(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="target KL of compact"):
        opened(tmp_path, teacher_like(1, 8, 4), text)


def test_fitting_comes_first(tmp_path: Path) -> None:
    logits = teacher_like(2, 64, 10)
    with opened(tmp_path, logits) as writer:
        first, *_, last = writer.pending()
        with pytest.raises(UsageError, match="was not fitted yet: call fit"):
            put(writer, first, logits)
        with pytest.raises(DataError, match="one or two views"):
            writer.fit({"logits": logits[:, :3]})
        with pytest.raises(DataError, match="not finite"):
            writer.fit({"logits": np.where(logits > 2, np.nan, logits)})
        prepare(writer, logits)
        assert writer.calibration_rows == {}
        with pytest.raises(UsageError, match="must be written before"):
            put(writer, last, logits)


def test_any_parts_in_any_order_end_the_same(tmp_path: Path) -> None:
    logits = teacher_like(4, 80, 10)
    dump(tmp_path / "whole", logits)
    whole = tree(tmp_path / "whole")
    for parts in (2, 5):
        path = tmp_path / f"{parts}"
        for part in reversed(range(parts)):
            with opened(path, logits) as writer:
                prepare(writer, logits)
                for shard in writer.pending((part, parts)):
                    put(writer, shard, logits)
        with opened(path, logits) as writer:
            assert not writer.pending()
            writer.seal()
        assert tree(path) == whole


def test_ranks_that_compute_slightly_differently_share_one_base(tmp_path: Path) -> None:
    logits = teacher_like(4, 80, 10)
    noise = np.random.default_rng(1).normal(size=logits.shape)
    other = (logits + 0.01 * noise).astype(np.float32)
    with opened(tmp_path, logits) as one, opened(tmp_path, logits) as two:
        works = [(one, logits, (0, 2)), (two, other, (1, 2))]
        rows = [writer.calibration_rows["logits"] for writer, _, _ in works]
        for (writer, live, _), chosen in zip(works, rows, strict=True):
            writer.fit({"logits": live[:2, chosen]})
        pending = [writer.pending(part) for writer, _, part in works]
        assert {s for p in pending for s in p if s.view == 0} == set(pending[0]) & set(pending[1])
        for step in range(max(map(len, pending))):
            for (writer, live, _), shards in zip(works, pending, strict=True):
                for shard in shards[step : step + 1]:
                    put(writer, shard, live)
        one.seal()
    store = open_store(tmp_path)
    for view in range(4):
        decoded = store.read(view)
        assert measure(logits[view], decoded)["kl_z_mean"] < 1e-3
        nearest = [np.abs(decoded - live[view]).max(1) for live in (logits, other)]
        assert np.minimum(*nearest).max() < 1


def test_a_base_that_another_writer_wrote_is_found(tmp_path: Path) -> None:
    logits = teacher_like(2, 64, 10)
    with opened(tmp_path, logits) as one, opened(tmp_path, logits) as two:
        prepare(one, logits)
        for shard in one.pending():
            put(one if shard.view == 0 else two, shard, logits)
        two.seal()
    check(open_store(tmp_path), logits, 4e-4)


def test_growth_adds_views_to_the_same_base(tmp_path: Path) -> None:
    logits = teacher_like(4, 64, 10)
    before = dump(tmp_path / "grown", logits[:2]).view_digests
    store = dump(tmp_path / "grown", logits)
    assert store.view_digests[:2] == before
    dump(tmp_path / "whole", logits)
    grown, whole = tree(tmp_path / "grown"), tree(tmp_path / "whole")
    shards = [key for key in whole if key.startswith("logits/")]
    assert [grown[key] for key in shards] == [whole[key] for key in shards]


def test_every_digest_of_a_view_knows_the_base(tmp_path: Path) -> None:
    logits = teacher_like(3, 64, 10)
    changed = logits.copy()
    changed[0, 5] += teacher_like(1, 1, 10, seed=3)[0, 0]
    one, two = dump(tmp_path / "1", logits), dump(tmp_path / "2", changed)
    assert all(a != b for a, b in zip(one.view_digests, two.view_digests, strict=True))


def test_a_shard_is_lost_with_its_base(tmp_path: Path) -> None:
    logits = teacher_like(2, 64, 10)
    with opened(tmp_path, logits) as writer:
        prepare(writer, logits)
        for shard in writer.pending():
            put(writer, shard, logits)
    base = tmp_path / "logits/base/c/0/1/0"
    data = bytearray(base.read_bytes())
    data[9] ^= 1
    base.write_bytes(data)
    with opened(tmp_path, logits) as writer:
        assert [(s.view, s.index) for s in writer.pending()] == [(0, 1), (1, 1)]
        with pytest.raises(UnfinishedStore):
            writer.seal()
        for shard in writer.pending():
            put(writer, shard, logits)
        writer.seal()
    check(open_store(tmp_path), logits, 4e-4)


@pytest.mark.parametrize("name", ["base/c/0/0/0", "basis/c/0/0/0/0", "values/c/1/0/0"])
def test_repair_writes_all_that_hangs_on_what_is_damaged(tmp_path: Path, name: str) -> None:
    logits = teacher_like(2, 64, 10)
    dump(tmp_path, logits)
    whole = tree(tmp_path)
    damaged = tmp_path / "logits" / name
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(KDCacheError, match="damaged"):
        open_store(tmp_path).read(1)
    report = verify(open_store(tmp_path))
    expected = {
        "base": {(0, 0), (1, 0)},
        "basis": {(0, 0), (0, 1), (1, 0), (1, 1)},
        "values": {(1, 0)},
    }
    lost = expected[name.split("/")[0]]
    assert {(view, start // 32) for view, start, _ in report.rewrite} == lost
    with opened(tmp_path, logits, repair=True) as writer:
        prepare(writer, logits)
        assert {(shard.view, shard.index) for shard in writer.pending()} == lost
        for shard in writer.pending():
            put(writer, shard, logits)
        writer.seal()
    assert tree(tmp_path) == whole


def test_some_rows_are_those_of_the_whole_view(tmp_path: Path) -> None:
    store = dump(tmp_path, teacher_like(3, 100, 10))
    rows = np.array([99, 3, 40, 3, 31, 32])
    np.testing.assert_allclose(store.read(2, rows), store.read(2)[rows], rtol=1e-6, atol=1e-6)


def test_the_rows_side_gives_the_directions_of_the_classes_side() -> None:
    from kdcache_stores.encodings.compact import _directions, _directions_of_rows
    from kdcache_stores.encodings.fidelity import standardize

    rng = np.random.default_rng(0)
    first = standardize(rng.normal(size=(20, 6)) @ rng.normal(size=(6, 90)))
    moved = standardize(first + 0.3 * rng.normal(size=(20, 6)) @ rng.normal(size=(6, 90))) - first
    few = _directions_of_rows(first, moved)
    assert np.allclose(few @ few.T, np.eye(len(few)), atol=1e-6)
    assert np.allclose(few.sum(axis=1), 0, atol=1e-6)  # the mean is kept apart
    leading = np.abs((few[:10] * _directions(first, moved)[:10]).sum(axis=1))
    assert np.allclose(leading, 1, atol=1e-6)


def test_thousands_of_classes() -> None:
    rng = np.random.default_rng(0)
    classes = 2100
    heads = rng.normal(size=(32, classes)).astype(np.float32)
    features = rng.normal(size=(200, 32)).astype(np.float32)
    noise = 0.3 * rng.normal(size=(200, 32)).astype(np.float32)
    rows = np.stack([features @ heads, (features + noise) @ heads])
    encoding = compact.Compact()
    shared = encoding.fit(rows)
    shared |= encoding.base(rows[0], shared)
    decoded = np.empty_like(rows[1])
    encoding.decode(
        {**encoding.encode(rows[1], np.zeros(200, np.int64), shared), **shared}, decoded
    )
    measured = measure(rows[1], decoded)
    assert measured["kl_z_mean"] < 4e-4
    assert measured["top1_agreement"] == 1
    assert shared["basis"].shape == (1024, classes)
    samples = {k: encoding.calibration_samples(10**7, (k,)) for k in (100, 1000, 4000, 65534)}
    assert samples == {100: 1024, 1000: 4000, 4000: 512, 65534: 512}


@pytest.mark.parametrize("classes", [40, 400])
def test_the_target_holds_on_rows_that_nothing_was_fitted_to(classes: int) -> None:
    """Many classes and few calibration rows: their own directions fit them better than any others."""
    rng = np.random.default_rng(3)
    layer = rng.standard_normal((300, classes)).astype(np.float32)
    centre = rng.standard_normal((900, 300))
    first, last = (
        ((centre + 0.5 * rng.standard_normal(centre.shape)) @ layer).astype(np.float32)
        for _ in range(2)
    )
    encoding = compact.Compact(3e-4)
    chosen = np.linspace(0, 899, 256).round().astype(np.int64)
    shared = encoding.fit(np.stack([first, last])[:, chosen])
    shared |= encoding.base(first, shared)
    decoded = np.empty_like(last)
    encoding.decode({**encoding.encode(last, np.zeros(900, np.int64), shared), **shared}, decoded)
    z = [standardize(rows.astype(np.float64)) / 2 for rows in (last, decoded)]
    others = np.setdiff1d(np.arange(900), chosen)
    assert kl(*z)[others].mean() == pytest.approx(3e-4, rel=0.1)
