"""Push, pull, parts, growth, catalogue, listing, comparison and card."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdcache_stores import (
    CorruptStore,
    FormatError,
    KDCacheError,
    MismatchError,
    Plan,
    Samples,
    StoreInUse,
    StoreNotFound,
    UnfinishedStore,
    UsageError,
    describe,
    open_store,
    verify,
    write_arrays,
)
from kdcache_stores.format.manifest import ANNOUNCEMENT, SEAL
from kdcache_stores.objects import bucket as bucket_module
from kdcache_stores.objects.bucket import Bucket
from kdcache_stores.share.card import write_card
from kdcache_stores.share.catalog import CATALOG, read_catalog
from kdcache_stores.share.compare import compare_stores
from kdcache_stores.share.pull import pull_store
from kdcache_stores.share.push import push_store
from kdcache_stores.share.store_list import list_stores
from tests.sharing.servers import FAULTS, StaticServer
from tests.stores.conftest import (
    dump,
    make_plan,
    make_samples,
    make_teacher,
    open_writer,
    tree,
    write_pending,
)


def data_of(path: Path) -> dict[str, bytes]:
    return {key: data for key, data in tree(path).items() if not key.startswith("records")}


@pytest.fixture(params=["folder", "file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where stores are pushed to."""
    if request.param == "s3":
        return str(request.getfixturevalue("bucket")) + "/team"
    return f"{'file://' if request.param == 'file' else ''}{tmp_path / 'team'}"


# ---- push ----------------------------------------------------------------------------------------


def test_push_and_pull_give_the_same_bytes(store: Path, place: str, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    done = push_store(store, f"{place}/toy.zarr", lambda *step: steps.append(step))
    assert (done.sent, done.skipped) == (17, 0)
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] > 0
    again = push_store(store, f"{place}/toy.zarr")
    assert (again.sent, again.sent_bytes, again.skipped) == (0, 0, 17)
    pulled = pull_store(f"{place}/toy.zarr", tmp_path / "pulled")
    assert pulled.digest == done.digest == open_store(store).digest
    assert data_of(tmp_path / "pulled") == data_of(store)
    assert pull_store(f"{place}/toy.zarr", tmp_path / "pulled").sent == 0
    assert data_of(tmp_path / "pulled") == tree(tmp_path / "pulled")


def test_growth_sends_what_is_missing(store: Path, place: str, tmp_path: Path) -> None:
    push_store(store, f"{place}/toy.zarr")
    pull_store(f"{place}/toy.zarr", tmp_path / "pulled")
    reader = open_store(f"{place}/toy.zarr", cache_size=0)
    dump(store, views=6)
    done = push_store(store, f"{place}/toy.zarr")
    assert done.sent == 7  # three shards a view, and the probes of the growth
    assert reader.read(3).shape == (50, 10)  # opened before
    with open_store(f"{place}/toy.zarr") as remote:
        assert verify(remote).ok
        assert remote.n_views == 6
        assert remote.source.objects.size(ANNOUNCEMENT) is None
    assert pull_store(f"{place}/toy.zarr", tmp_path / "pulled").sent == 7
    assert data_of(tmp_path / "pulled") == data_of(store)


def test_a_smaller_store_has_nothing_to_add(store: Path, place: str, tmp_path: Path) -> None:
    push_store(store, f"{place}/toy.zarr")
    small = pull_store(f"{place}/toy.zarr", tmp_path / "small", (1, 3))
    done = push_store(tmp_path / "small", f"{place}/toy.zarr")
    assert done.sent == 0
    assert done.digest == open_store(store).digest != small.digest


OTHERS: dict[str, Callable[[Path], Path]] = {
    "teacher": lambda path: dump(path, views=4, teacher=make_teacher(weights_sha256="cd" * 32)),
    "plan": lambda path: dump(path, views=4, plan=make_plan(make_samples(), seed=8)),
    "encoding": lambda path: dump(path, views=4, encoding="float32"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_data_is_not_overwritten(other: str, store: Path, place: str, tmp_path: Path) -> None:
    push_store(store, f"{place}/toy.zarr")
    with pytest.raises(StoreInUse, match="already holds another store"):
        push_store(OTHERS[other](tmp_path / "other"), f"{place}/toy.zarr")
    pull_store(f"{place}/toy.zarr", tmp_path / "pulled")
    assert data_of(tmp_path / "pulled") == data_of(store)


def test_something_else_at_the_place(store: Path, tmp_path: Path, bucket: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(StoreInUse, match=r"thesis.tex"):
        push_store(store, str(tmp_path / "full"))
    Bucket(f"{bucket}/full").put("thesis.tex", b"x")
    with pytest.raises(StoreInUse, match=r"thesis.tex"):
        push_store(store, f"{bucket}/full")


def test_only_whole_sealed_stores_are_pushed(store: Path, tmp_path: Path, bucket: str) -> None:
    with open_writer(tmp_path / "unfinished") as writer:
        write_pending(writer, 2)
    with pytest.raises(UnfinishedStore):
        push_store(tmp_path / "unfinished", f"{bucket}/x")
    shard = store / "logits/values/c/2/1/0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    with pytest.raises(CorruptStore, match="not pushed"):
        push_store(store, f"{bucket}/x")
    assert Bucket(bucket).children() == ([], [])
    with pytest.raises(UsageError, match="only serves"):
        push_store(dump(tmp_path / "fine"), "http://127.0.0.1:1/x")


def interrupt_after(monkeypatch: pytest.MonkeyPatch, puts: int) -> None:
    """Make the `puts`-th write to a bucket, and all after it, fail."""
    original, left, lock = Bucket.put, [puts], threading.Lock()

    def put(self: Bucket, key: str, data: bytes, *, replace: bool = False) -> None:
        with lock:
            left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        original(self, key, data, replace=replace)

    monkeypatch.setattr(bucket_module.Bucket, "put", put)


@pytest.mark.parametrize("puts", [0, 1, 2, 5, 12, 17, 18])
def test_an_interrupted_push_is_repeated(
    puts: int, store: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, puts)
        with pytest.raises(KeyboardInterrupt):
            push_store(store, f"{bucket}/toy.zarr")
    with pytest.raises((UnfinishedStore, StoreNotFound)):
        open_store(f"{bucket}/toy.zarr")
    push_store(store, f"{bucket}/toy.zarr")
    with open_store(f"{bucket}/toy.zarr", cache_size=0) as remote:
        assert verify(remote).ok


@pytest.mark.parametrize("puts", range(7, 12))
def test_an_interrupted_growth_leaves_a_readable_store(
    puts: int, store: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_store(store, f"{bucket}/toy.zarr")
    dump(store, views=6)
    with monkeypatch.context() as patch:
        interrupt_after(patch, puts)
        try:
            push_store(store, f"{bucket}/toy.zarr")
        except KeyboardInterrupt:
            assert puts < 11
    with open_store(f"{bucket}/toy.zarr", cache_size=0) as remote:
        assert remote.n_views in (4, 6)
        assert verify(remote).ok
    push_store(store, f"{bucket}/toy.zarr")
    with open_store(f"{bucket}/toy.zarr", cache_size=0) as remote:
        assert remote.n_views == 6
        assert verify(remote).ok


def test_a_growth_that_stopped_is_taken_over(
    store: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_store(store, f"{bucket}/toy.zarr")
    shutil.copytree(store, tmp_path / "other")
    dump(tmp_path / "other", views=5)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)  # four objects and the announcement
        with pytest.raises(KeyboardInterrupt):
            push_store(tmp_path / "other", f"{bucket}/toy.zarr")
    dump(store, views=6)
    with pytest.raises(StoreInUse, match="--take-over"):
        push_store(store, f"{bucket}/toy.zarr")
    push_store(store, f"{bucket}/toy.zarr", take_over=True)
    with open_store(f"{bucket}/toy.zarr", cache_size=0) as remote:
        assert remote.n_views == 6
        assert verify(remote).ok


@pytest.mark.parametrize("same", [True, False])
def test_two_pushes_at_once(same: bool, store: Path, tmp_path: Path, bucket: str) -> None:
    other = store if same else OTHERS["teacher"](tmp_path / "other")
    results: list[object] = []
    barrier = threading.Barrier(2)

    def push(path: Path) -> None:
        barrier.wait()
        try:
            results.append(push_store(path, f"{bucket}/toy.zarr").digest)
        except StoreInUse as error:
            results.append(error)

    threads = [threading.Thread(target=push, args=(path,)) for path in (store, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    digests = [result for result in results if isinstance(result, str)]
    assert len(digests) == (2 if same else 1)
    with open_store(f"{bucket}/toy.zarr", cache_size=0) as remote:
        assert remote.digest == digests[0]
        assert verify(remote).ok


# ---- pull ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [(0, 2), (2, 4), (1, 3), (3, 4)])
def test_a_part_is_a_valid_store(views: tuple[int, int], store: Path, tmp_path: Path) -> None:
    whole = open_store(store)
    with StaticServer(store.parent, ranges=False) as server:
        done = pull_store(f"{server.url}/toy.zarr", tmp_path / "part", views)
    with open_store(tmp_path / "part", expect=done.digest) as part:
        assert verify(part).ok
        assert verify(part).notes == []
        assert part.view_range == range(*views)
        assert part.n_views == views[1] - views[0]
        assert part.plan.digest == whole.plan.digest
        assert part.teacher.digest == whole.teacher.digest
        assert part.view_digests == whole.view_digests[slice(*views)]
        assert part.part is not None
        assert (part.part.of, part.part.views) == (whole.digest, 4)
        assert part.probes == [probe for probe in whole.probes if probe.view in range(*views)]
        for view in part.view_range:
            assert np.array_equal(part.read(view), whole.read(view))
        for view in set(range(-1, 5)) - set(range(*views)):
            with pytest.raises(UsageError, match="has views"):
                part.read(view)
        assert describe(part)["part"]["of"] == whole.digest
    if views[0]:
        with pytest.raises(MismatchError, match="is a part"):
            open_writer(tmp_path / "part", views=6)


def test_plain_zarr_reads_a_part_at_the_same_numbers(store: Path, tmp_path: Path) -> None:
    import zarr

    pull_store(store, tmp_path / "part", (2, 3))
    array = zarr.open_group(str(tmp_path / "part"), mode="r")["logits/values"]
    assert np.array_equal(np.asarray(array[2], np.float32), open_store(store).read(2))
    assert np.isnan(np.asarray(array[0])).all()


def test_a_part_grows_by_pulling_and_by_dumping(store: Path, tmp_path: Path) -> None:
    pull_store(store, tmp_path / "part", (0, 1))
    assert pull_store(store, tmp_path / "part", (0, 2)).sent == 3
    with pytest.raises(StoreInUse, match="pull at least those"):
        pull_store(store, tmp_path / "part", (2, 4))
    dump(tmp_path / "part", views=4)
    with open_store(tmp_path / "part") as grown:
        assert grown.digest == open_store(store).digest
        assert grown.part is None
        assert verify(grown).ok
    pull_store(store, tmp_path / "other", (1, 2))
    pull_store(store, tmp_path / "other")
    assert data_of(tmp_path / "other") == data_of(store)


def test_a_part_of_a_part(store: Path, tmp_path: Path) -> None:
    pull_store(store, tmp_path / "part", (1, 4))
    pull_store(tmp_path / "part", tmp_path / "smaller", (2, 3))
    part = open_store(tmp_path / "smaller").part
    assert part is not None
    assert part.of == open_store(store).digest


def test_pull_refuses(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"0:4, asked for 2:9"):
        pull_store(store, tmp_path / "x", (2, 9))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(StoreInUse, match=r"thesis.tex"):
        pull_store(store, tmp_path / "full")
    with pytest.raises(StoreInUse, match="another store"):
        pull_store(store, OTHERS["teacher"](tmp_path / "other"))
    with open_writer(tmp_path / "unfinished", views=4) as writer:
        write_pending(writer, 2)
    with pytest.raises(StoreInUse, match="unfinished dump"):
        pull_store(store, tmp_path / "unfinished")
    with pytest.raises(UsageError, match="to this disk"):
        pull_store(store, "s3://bucket/x")


def test_an_interrupted_pull_goes_on(store: Path, tmp_path: Path) -> None:
    shard = store / "logits/values/c/3/2/0"
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-1] + b"\0")
    with pytest.raises(CorruptStore):
        pull_store(store, tmp_path / "pulled")
    assert not (tmp_path / "pulled" / SEAL).exists()
    shard.write_bytes(kept)
    done = pull_store(store, tmp_path / "pulled")
    assert done.skipped > done.sent
    assert data_of(tmp_path / "pulled") == data_of(store)


@pytest.mark.parametrize("key", [
    "logits/values/c/3/2/0", "samples.parquet", "logits/values/zarr.json",
])  # fmt: skip
@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_a_damaged_copy_is_mended_by_pulling_it_again(
    store: Path, tmp_path: Path, key: str, harm: str
) -> None:
    copy = tmp_path / "copy"
    pull_store(store, copy)
    whole = pull_store(store, copy)
    assert whole.sent == 0
    file = copy / key
    data = file.read_bytes()
    if harm == "lose":
        file.unlink()
    else:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if harm == "flip" else data[:-9])
    again = pull_store(store, copy)
    assert (again.sent, again.sent_bytes) == (1, len(data))
    assert again.skipped == whole.skipped - 1
    assert data_of(copy) == data_of(store)


def test_pull_under_faults(store: Path, tmp_path: Path) -> None:
    for seed in range(3):
        with StaticServer(store.parent, faults=FAULTS, rate=0.4, seed=seed) as server:
            pull_store(f"{server.url}/toy.zarr", tmp_path / f"pulled{seed}")
            assert server.injected.total() > 2
        assert data_of(tmp_path / f"pulled{seed}") == data_of(store)


# ---- catalogue and listing -----------------------------------------------------------------------


def test_ls(place: str, store: Path, tmp_path: Path) -> None:
    push_store(store, f"{place}/b.zarr")
    push_store(OTHERS["teacher"](tmp_path / "t"), f"{place}/a.zarr")
    push_store(OTHERS["plan"](tmp_path / "p"), f"{place}/deep/c.zarr")
    if not place.startswith("s3"):
        folder = Path(place.removeprefix("file://"))
        with open_writer(folder / "unfinished") as writer:
            write_pending(writer, 2)
        (folder / "other").mkdir()
        (folder / "other" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    listed = list_stores(place)
    names = [item.name for item in listed if item.summary["sealed"]]
    assert sorted(names) == ["a.zarr", "b.zarr", "deep/c.zarr"]
    plans = [item.summary["plan"] for item in listed]
    assert plans == sorted(plans)
    assert {item.summary["teacher"] for item in listed} == {"toy"}
    entry = next(item for item in listed if item.name == "b.zarr")
    assert entry.summary["digest"] == open_store(store).digest
    assert 0 < entry.summary["top1"] <= 1
    assert [i.name for i in listed if not i.summary["sealed"]] in ([], ["unfinished"])
    assert not any("other" in item.name for item in listed)


def test_ls_on_a_web_server_reads_the_catalogue(store: Path, tmp_path: Path) -> None:
    team = tmp_path / "team"
    push_store(store, str(team / "a.zarr"))
    push_store(OTHERS["teacher"](tmp_path / "t"), str(team / "b.zarr"))
    local = {item.name: item.summary for item in list_stores(team)}
    with StaticServer(team) as server:
        assert {item.name: item.summary for item in list_stores(server.url)} == local
        assert [item.where for item in list_stores(f"{server.url}/a.zarr")] == [
            f"{server.url}/a.zarr"
        ]
        with pytest.raises(StoreNotFound, match=r"catalog.json"):
            list_stores(f"{server.url}/nope")
        dump(store, views=6)
        push_store(store, str(team / "a.zarr"))
        views = {item.name: item.summary["views"] for item in list_stores(server.url)}
        assert views == {"a.zarr": 6, "b.zarr": 4}
        assert open_store(list_stores(server.url)[0].where).n_views == 6


def test_many_pushes_keep_each_line_of_the_catalogue(store: Path, place: str) -> None:
    threads = [
        threading.Thread(target=push_store, args=(store, f"{place}/{i}.zarr")) for i in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if place.startswith("s3"):
        data = Bucket(place).get(CATALOG)
    else:
        data = (Path(place.removeprefix("file://")) / CATALOG).read_bytes()
    assert sorted(read_catalog(data, "here")) == [f"{i}.zarr" for i in range(5)]


def test_a_strangers_catalogue_is_checked() -> None:
    for value in (
        [],
        {"kdcache_catalog": 2, "stores": {}},
        {"kdcache_catalog": 1, "stores": {"../up": {}}},
        {"kdcache_catalog": 1, "stores": {"x": {"dataset": 3}}},
    ):
        with pytest.raises(FormatError):
            read_catalog(json.dumps(value).encode(), "there")


def test_ls_of_nothing(tmp_path: Path, bucket: str) -> None:
    assert list_stores(tmp_path) == []
    assert list_stores(bucket) == []
    with pytest.raises(StoreNotFound):
        list_stores(tmp_path / "nope")


# ---- comparison ----------------------------------------------------------------------------------


def test_diff(store: Path, tmp_path: Path) -> None:
    one = open_store(store)
    same = compare_stores(one, open_store(store))
    assert (same.same_content, same.equal_views, same.differing_views) == (True, [0, 1, 2, 3], [])
    pull_store(store, tmp_path / "part", (1, 3))
    part = compare_stores(one, open_store(tmp_path / "part"))
    assert (part.same_content, part.equal_views, part.only_a, part.only_b) == (
        False,
        [1, 2],
        [0, 3],
        [],
    )
    coarse = compare_stores(one, open_store(OTHERS["encoding"](tmp_path / "float32")))
    assert (coarse.same_plan, coarse.same_teacher, coarse.same_encoding) == (True, True, False)
    assert coarse.differing_views == [0, 1, 2, 3]
    assert all(0 < v.kl_mean <= v.kl_worst < 1e-4 for v in coarse.field_differences)
    plan = compare_stores(one, open_store(OTHERS["plan"](tmp_path / "plan")))
    assert plan.not_compared
    assert ("plan.seed", 7, 8) in plan.differences
    assert not plan.differing_views


def test_diff_measures_the_kl_divergence(tmp_path: Path) -> None:
    from scipy.special import rel_entr, softmax

    a, b = dump(tmp_path / "a", 1, "float32"), dump(tmp_path / "b", 2, "float32")
    shutil.rmtree(b)
    with open_writer(
        b, views=1, encoding="float32", teacher=make_teacher(weights_sha256="cd" * 32)
    ) as w:
        rng = np.random.default_rng(5)
        for shard in w.pending():
            w.write(shard, {"logits": rng.normal(0, 3, (shard.rows, 10)).astype(np.float32)})
        w.seal()
    difference = compare_stores(open_store(a), open_store(b)).field_differences[0]
    p, q = (softmax(open_store(x).read(0).astype(np.float64), axis=1) for x in (a, b))
    expected = rel_entr(p, q).sum(axis=1)
    assert difference.kl_mean == pytest.approx(expected.mean())
    assert difference.kl_worst == pytest.approx(expected.max())
    assert difference.top1_agreement == (p.argmax(1) == q.argmax(1)).mean()


# ---- card ----------------------------------------------------------------------------------------


def snippets(readme: str) -> list[str]:
    return [block.partition("```")[0] for block in readme.split("```python\n")[1:]]


# rdflib, through which mlcroissant reads JSON-LD, warns of itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_card(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import mlcroissant

    write_card(store, "cc-by-4.0")
    readme = (store / "README.md").read_text()
    card = huggingface_hub.DatasetCard(readme)
    assert card.data.license == "cc-by-4.0"
    assert card.data.to_dict()["size_categories"] == ["n<1K"]
    assert open_store(store).digest in readme
    monkeypatch.chdir(store.parent)
    expected = open_store(store).read(0)
    for code, name in zip(snippets(readme)[:3], ("logits", "view", "view"), strict=True):
        if "tensorstore" in code:
            pytest.importorskip("tensorstore")
        values: dict[str, object] = {}
        exec(code, values)
        assert np.array_equal(np.asarray(values[name], np.float32), expected)
    monkeypatch.chdir(store)
    dataset = mlcroissant.Dataset(str(store / "croissant.json"))
    assert not dataset.metadata.issues.errors
    assert dataset.metadata.license == ["cc-by-4.0"]
    rows = list(dataset.records("samples"))
    assert len(rows) == 50
    assert rows[7]["samples/label"] == 7
    with open_store(store) as again:
        assert verify(again).ok
        assert verify(again).notes == []


def test_the_card_travels_with_the_store(store: Path, place: str, tmp_path: Path) -> None:
    push_store(store, f"{place}/toy.zarr")
    write_card(store, "mit", f"{place}/toy.zarr")
    push_store(store, f"{place}/toy.zarr")
    pull_store(f"{place}/toy.zarr", tmp_path / "pulled")
    assert tree(tmp_path / "pulled") == tree(store)


def test_card_refuses_what_is_no_licence(store: Path) -> None:
    with pytest.raises(UsageError, match="licence"):
        write_card(store, "mit\ninjected: yes")


def test_the_card_names_the_fields(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = Samples([f"{i}" for i in range(20)], np.arange(20) % 4)
    plan = Plan("toy", "train", 4, samples.fingerprint, {"name": "none"}, seed=0)
    for names, title in ((["logits", "pooled"], "Logits and pooled"), (["pooled"], "Pooled")):
        path = tmp_path / "-".join(names)
        shapes = {"logits": (1, 20, 4), "pooled": (1, 20, 6)}
        arrays = {name: rng.normal(size=shapes[name]).astype(np.float32) for name in names}
        write_arrays(path, arrays, samples=samples, plan=plan).close()
        write_card(path, license="mit")
        text = (path / "README.md").read_text()
        assert f"# {title} of unknown on toy" in text
        assert ('"logits"' in text.partition("---\n\n")[0]) is ("logits" in names)


def test_a_bucket_that_is_not_there_is_named(bucket: str, store: Path) -> None:
    with pytest.raises(KDCacheError, match="there is no such bucket") as refused:
        push_store(store, f"{bucket}-other/toy.zarr")
    assert "again" not in str(refused.value)
