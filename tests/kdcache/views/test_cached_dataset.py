"""CachedDataset: equal items however they are fetched, and rows that are those of the store."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.loading import load_dataset
from kdcache.dumping.dump import dump
from kdcache.models.weights import tensor_digest
from kdcache.preprocessing import Preprocessing
from kdcache.teachers.teacher import Teacher
from kdcache.views.cached_dataset import CachedDataset, ViewSampler
from kdcache.views.plan import ViewPlan
from kdcache_stores import CorruptStore, UsageError, open_store
from kdcache_stores.read.random_rows import DecodedFolder, RandomRows

ENCODINGS = ["float32", "float16", "quantized:0.05"]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits").subset(range(40))


@pytest.fixture(scope="module")
def stores(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three views in shards of 16 rows, by encoding."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval().requires_grad_(False)
    normal = Preprocessing((0.4,), (0.3,))
    teacher = Teacher("linear", module, normal, 10, tensor_digest(module.state_dict()))
    folder, paths = tmp_path_factory.mktemp("stores"), {}
    for encoding in ENCODINGS:
        plan = ViewPlan(digits, make_augmentation("pad-crop-flip", digits), seed=0)
        paths[encoding] = folder / encoding.partition(":")[0]
        dump(plan, [(teacher, paths[encoding])], views=3, encoding=encoding, shard_rows=16)
    return paths


def rows_of(batches: Iterator[dict[str, torch.Tensor]]) -> list[tuple[Any, ...]]:
    """Everything that came, in the order in which it came."""
    return [
        (int(row), int(view), int(label), image.numpy().tobytes(), logits.numpy().tobytes())
        for batch in batches
        for row, view, label, image, logits in zip(
            *(batch[name] for name in ("row", "view", "label", "image", "logits")), strict=True
        )
    ]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_item_is_the_view_and_the_stored_row(
    digits: Dataset, stores: dict[str, Path], encoding: str
) -> None:
    data = CachedDataset(digits, stores[encoding])
    with open_store(stores[encoding]) as store:
        assert len(data) == 40
        for epoch in range(5):
            data.set_epoch(epoch)
            view = epoch % 3
            stored = store.read(view)
            images = data.plan.images(np.arange(40), view)
            for i in (39, 0, 17, 16, 15):
                item = data[i]
                assert (item["row"], item["view"], item["label"]) == (i, view, digits.labels[i])
                assert torch.equal(item["image"], images[i])
                assert item["logits"].dtype == torch.float32
                np.testing.assert_array_equal(item["logits"], stored[i])
    with pytest.raises(IndexError, match="0 to 39, asked for 40"):
        data[40]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning")
@pytest.mark.parametrize("encoding", ["float16", "quantized:0.05"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_give_equal_rows(
    digits: Dataset, stores: dict[str, Path], method: str, encoding: str
) -> None:
    """The epoch reaches persistent workers, and each way to start them gives what none of them gives."""
    data = CachedDataset(digits, stores[encoding])
    data[0]  # mapped before the fork
    expected = [
        item
        for epoch in range(3)
        for item in rows_of(iter([torch.utils.data.default_collate(
            [data[epoch, i] for _, i in one_pass(data, epoch)])]))
    ]  # fmt: skip
    for workers in (0, 1, 2, 4):
        loader = DataLoader(
            data, 7, sampler=ViewSampler(data, seed=1), num_workers=workers,
            multiprocessing_context=method if workers else None, persistent_workers=workers > 0,
        )  # fmt: skip
        assert [item for _ in range(3) for item in rows_of(iter(loader))] == expected


def one_pass(data: CachedDataset, epoch: int) -> list[tuple[int, int]]:
    sampler = ViewSampler(data, seed=1)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_forked_workers_learn_of_the_epoch(digits: Dataset, stores: dict[str, Path]) -> None:
    """With a sampler of plain numbers too, as DistributedSampler is; ranks share out the samples."""
    data = CachedDataset(digits, stores["float16"])
    loaders = [
        DataLoader(
            data, 8, num_workers=2, multiprocessing_context="fork", persistent_workers=True,
            sampler=DistributedSampler(data, num_replicas=2, rank=rank),
        )
        for rank in range(2)
    ]  # fmt: skip
    for epoch in range(4):
        data.set_epoch(epoch)
        items = [item for loader in loaders for item in rows_of(iter(loader))]
        assert {view for _, view, *_ in items} == {epoch % 3}
        assert sorted(row for row, *_ in items) == list(range(40))


def test_a_sampler_shares_out_each_epoch(digits: Dataset, stores: dict[str, Path]) -> None:
    data = CachedDataset(digits, stores["float16"], rows=np.arange(37))
    parts = [ViewSampler(data, seed=2, part=(rank, 3)) for rank in range(3)]
    for epoch in range(2):  # passes that end go on to the next epoch
        pairs = [pair for sampler in parts for pair in sampler]
        assert {e for e, _ in pairs} == {epoch}
        assert len({number for _, number in pairs}) == len(pairs) == 36
    assert [number for _, number in ViewSampler(data, shuffle=False)] == list(range(37))
    with pytest.raises(UsageError, match="0 <= i < n"):
        ViewSampler(data, part=(3, 3))


def test_a_pass_that_is_broken_off_begins_anew(digits: Dataset, stores: dict[str, Path]) -> None:
    sampler = ViewSampler(CachedDataset(digits, stores["float16"]), seed=2)
    whole = list(sampler)
    sampler.set_epoch(0)
    next(iter(sampler))
    assert list(sampler) == whole
    with pytest.raises(UsageError, match="of the seed 2, this sampler has 3"):
        ViewSampler(sampler.dataset, seed=3).load_state_dict(sampler.state_dict())


def test_a_pickle_holds_the_epoch_and_no_rows(digits: Dataset, stores: dict[str, Path]) -> None:
    data = CachedDataset(digits, stores["quantized:0.05"])
    data.set_epoch(2)
    data[0]
    copy = pickle.loads(pickle.dumps(data))
    assert copy.epoch == 2
    assert copy._epoch.is_shared()
    assert torch.equal(copy[5]["logits"], data[5]["logits"])
    copy.set_epoch(1)
    assert data.epoch == 2


def test_transform_and_labels_without_a_store(digits: Dataset) -> None:
    """The same views without a teacher, ever new ones; a transform comes after the view."""
    plan = ViewPlan(digits, make_augmentation("pad-crop-flip", digits), seed=0)
    data = CachedDataset(digits, plan=plan, transform=lambda image: image.float() / 255)
    item = data[7, 3]
    assert item.keys() == {"image", "label", "row", "view"}
    assert item["view"] == 7
    torch.testing.assert_close(item["image"], plan.images(3, 7)[0] / 255)


def test_mixed_labels_come_with_the_item(digits: Dataset) -> None:
    plan = ViewPlan(digits, make_augmentation("mixup", digits), seed=0)
    item = CachedDataset(digits, plan=plan)[1, 4]
    partner = plan.partners([4], [1])
    assert partner is not None
    assert item["partner_label"] == digits.labels[partner[0]]
    assert 0 <= item["lambda"] <= 1


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_random_rows_are_those_of_the_store(stores: dict[str, Path], encoding: str) -> None:
    rng = np.random.default_rng(0)
    with open_store(stores[encoding]) as store:
        rows = RandomRows(store, "logits", DecodedFolder())
        assert rows.mapped == (encoding != "quantized:0.05")
        assert rows.decoded_bytes == (0 if rows.mapped else 2 * 40 * 10 * 4)
        for view in (0, 1, 2, 0, 2):
            wanted = rng.integers(0, 40, 64)
            np.testing.assert_array_equal(rows.read(view, wanted), store.read(view, wanted))
        with pytest.raises(UsageError, match="views 0 to 2, asked for 3"):
            rows.read(3, np.arange(2))
        with pytest.raises(UsageError, match="rows 0 to 39"):
            rows.read(0, np.array([40]))


def test_a_decoded_folder_holds_two_views_and_goes(stores: dict[str, Path]) -> None:
    with open_store(stores["quantized:0.05"]) as store:
        folder = DecodedFolder()
        path, rows = Path(folder.path), RandomRows(store, "logits", folder)
        for view in (0, 1, 2, 0, 1):
            rows.read(view, np.arange(40))
            held = {file.name.split("-")[2] for file in path.iterdir() if file.name != "lock"}
            assert len(held) <= 2
        del rows, folder
        assert not path.exists()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_damaged_shard_is_noticed(
    digits: Dataset, stores: dict[str, Path], tmp_path: Path, when: str
) -> None:
    """At its first touch, and where it changes after that."""
    import shutil

    path = Path(shutil.copytree(stores["float16"], tmp_path / "store"))
    (shard,) = path.glob("logits/values/c/0/0/*")
    data = CachedDataset(digits, path)
    if when == "after":
        data[0]
    damaged = bytearray(shard.read_bytes())
    damaged[5] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(CorruptStore, match="SHA-256"):
        data[0]


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


@pytest.mark.parametrize("transform", [None, lambda image: image.float() / 255])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_is_what_its_items_are(
    digits: Dataset, stores: dict[str, Path], mixed: bool, transform: Any
) -> None:
    """Collated at once or from items one by one; a custom collate's changes count."""
    plan = ViewPlan(digits, make_augmentation("pad-crop-flip+mixup", digits), seed=1)
    store, own = ((), plan) if mixed else (stores["float16"], None)
    data = CachedDataset(digits, store, plan=own, views=3, transform=transform)
    wanted = [(0, 5), (2, 5), (1, 39), (0, 0), (2, -1)]
    expected = default_collate([dict(data[index]) for index in wanted])
    assert type(data[3]["row"]) is int
    assert equal(default_collate(data.__getitems__(wanted)), expected)
    for looked in (range(5), [0], [4]):
        items = data.__getitems__(wanted)
        assert [items[i]["row"] for i in looked] == [expected["row"][i] for i in looked]
        assert equal(default_collate(items), expected)
    for place in (0, 3):
        items = data.__getitems__(wanted)
        items[place]["label"] = 77
        batch = default_collate(items)
        assert batch["label"][place] == 77
        assert type(batch) is dict
    items = data.__getitems__(wanted)
    assert [item["row"] for item in items[1:3]] == expected["row"][1:3].tolist()
    assert len(items) == len(list(items)) == 5
    items[0]["more"] = 1.5
    with pytest.raises(KeyError):  # not of all items
        default_collate(items)
    part = torch.utils.data.Subset(data, [5, 39])
    (batch,) = DataLoader(part, 2)
    assert batch["row"].tolist() == [5, 39]


def test_what_is_no_dataset_of_kdcache_is_refused_by_name(
    digits: Dataset, stores: dict[str, Path]
) -> None:
    store = stores["float16"]
    data = CachedDataset(digits, store)
    with pytest.raises(UsageError, match=r"found Subset: give load_dataset\(NAME\)"):
        CachedDataset(torch.utils.data.Subset(data, [0, 1]), store)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"takes a CachedDataset, found Subset: .* give rows="):
        ViewSampler(torch.utils.data.Subset(data, [0, 1]))  # type: ignore[arg-type]
