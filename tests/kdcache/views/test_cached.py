"""CachedViews: every batch carries the logits of its own views, whatever else is being read."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import Tensor, nn

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.loading import load_dataset
from kdcache.dumping.dump import dump
from kdcache.models.weights import tensor_digest
from kdcache.preprocessing import Preprocessing
from kdcache.teachers.teacher import Teacher
from kdcache.views import window
from kdcache.views.cached import Batch, CachedViews
from kdcache.views.plan import ViewPlan
from kdcache.views.window import pieces
from kdcache_stores import MismatchError, Store, open_store

VIEWS = {False: 9, True: 10}  # of the stores, by whether their views come in pairs


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits").subset(range(20))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval().requires_grad_(False)
    normal = Preprocessing((0.4,), (0.3,))
    return Teacher("linear", module, normal, 10, tensor_digest(module.state_dict()))


@pytest.fixture(scope="module")
def stores(
    digits: Dataset, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[bool, Store]]:
    """A store of single views, and one of pairs."""
    folder, opened = tmp_path_factory.mktemp("stores"), {}
    for pairs, augment in ((False, "pad-crop-flip"), (True, "weak+strong")):
        plan = ViewPlan(digits, make_augmentation(augment, digits), seed=0)
        path = folder / augment
        dump(plan, [(teacher, path)], views=VIEWS[pairs], encoding="float32")
        opened[pairs] = open_store(path)
    yield opened
    for store in opened.values():
        store.close()


@cache
def all_logits(store: Store) -> np.ndarray:
    """float32 (V, N, K)."""
    return np.stack([store.read(view) for view in store.view_range])


def check(batch: Batch, store: Store, pairs: bool) -> None:
    """Every row of the batch has the logits that the store holds for its view."""
    first = batch.views.tolist()
    for row, view, logits in zip(
        batch.rows, first, batch.teachers[0]["logits"].numpy(), strict=True
    ):
        stored = [all_logits(store)[view + i, row] for i in range(1 + pairs)]
        assert np.array_equal(logits, np.stack(stored) if pairs else stored[0])


def test_an_iterator_keeps_its_view_while_another_reads(
    digits: Dataset, stores: dict[bool, Store]
) -> None:
    with CachedViews(digits, [stores[False]], 4) as views:
        first, second = views.epoch(0), views.epoch(4)
        check(next(first), stores[False], pairs=False)
        check(next(second), stores[False], pairs=False)
        rest = list(first)
        assert [set(batch.views.tolist()) for batch in rest] == [{0}] * 4
        for batch in [*rest, *second]:
            check(batch, stores[False], pairs=False)


@pytest.mark.parametrize("pairs", [False, True], ids=["single", "pairs"])
@pytest.mark.parametrize("schedule", ["epoch", "random"])
@settings(max_examples=15, deadline=None)
@given(script=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 12)), max_size=24))
def test_interleaved_epochs_carry_their_own_logits(
    digits: Dataset,
    stores: dict[bool, Store],
    schedule: str,
    pairs: bool,
    script: list[tuple[int, int]],
) -> None:
    """Four readers; each step of the script goes on with one of them, or has it begin an epoch."""
    reading: dict[int, Iterator[Batch]] = {}
    with CachedViews(
        digits, [stores[pairs]], 7, schedule=schedule, resident_views=4, pairs=pairs
    ) as views:
        for reader, epoch in script:
            if epoch >= 0:
                reading[reader] = views.epoch(epoch)
            if (batch := next(reading.get(reader, iter(())), None)) is not None:
                check(batch, stores[pairs], pairs)
        for iterator in reading.values():
            for batch in iterator:
                check(batch, stores[pairs], pairs)


def test_threads_read_their_own_epochs(digits: Dataset, stores: dict[bool, Store]) -> None:
    with (
        CachedViews(digits, [stores[False]], 3, schedule="random", resident_views=2) as views,
        ThreadPoolExecutor(4) as threads,
    ):
        for batches in threads.map(lambda epoch: list(views.epoch(epoch)), range(24)):
            assert sum(len(batch.rows) for batch in batches) == len(digits)
            for batch in batches:
                check(batch, stores[False], pairs=False)


def test_memory_is_that_of_the_live_iterators(digits: Dataset, stores: dict[bool, Store]) -> None:
    """A window and the next view; another such room for iterators that do not fit beside, no longer."""
    with CachedViews(digits, [stores[False]], 4, schedule="random", resident_views=3) as views:
        assert views.resident is not None
        one_room = 4 * len(digits) * 10 * 4
        for epoch in range(12):
            batches = views.epoch(epoch)
            next(batches)
            assert views.resident.nbytes == one_room
        other = views.epoch(5)
        next(other)
        assert views.resident.nbytes == 2 * one_room
        del other
        gc.collect()
        list(views.epoch(3))
        assert views.resident.nbytes == one_room
    with CachedViews(digits, [stores[False]], 4, schedule="random") as views:
        assert views.resident is not None
        live = [views.epoch(epoch) for epoch in range(5)]
        for batches in live:
            next(batches)
        assert views.resident.nbytes == 9 * len(digits) * 10 * 4  # all views: nothing to add


def test_the_next_view_is_read_while_one_is_used(
    digits: Dataset, stores: dict[bool, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [Event() for _ in range(VIEWS[False])]
    read = Store.read_encoded

    def noted(self: Store, view: int, *args: object, **options: object) -> object:
        asked[view].set()
        return read(self, view, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "read_encoded", noted)
    with CachedViews(digits, [stores[False]], 4) as views:
        for epoch in range(4):
            batches = views.epoch(epoch)
            next(batches)
            assert asked[epoch + 1].wait(10)
            assert not asked[epoch + 2].is_set()


def test_closing_leaves_an_open_store_to_its_owner(
    digits: Dataset, stores: dict[bool, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(Store, "close", lambda self: closed.append(self.where))
    CachedViews(digits, [stores[False]], 4).close()
    assert closed == []
    where = stores[False].where
    CachedViews(digits, [where], 4).close()
    assert closed == [where]


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 20), st.integers(1, 50)
)
def test_pieces_hold_each_row_once_and_cut_no_shard(
    rows: list[int], shard_rows: int, most: int
) -> None:
    chosen = np.array(rows)
    cut = [np.arange(len(rows))[piece] for piece in pieces(chosen, shard_rows, most)]
    assert sorted(np.concatenate(cut).tolist()) == list(range(len(rows)))
    shards = [set((chosen[piece] // shard_rows).tolist()) for piece in cut]
    assert sum(map(len, shards)) == len(set().union(*shards)), "a shard is in one piece"
    for held in shards:
        assert (max(held) - min(held) + 1) * shard_rows <= max(most, shard_rows)


@pytest.mark.parametrize("encoding", ["float32", "float16", "topk:3", "compact", "quantized"])
def test_views_packed_in_pieces_are_those_read_at_once(
    digits: Dataset,
    teacher: Teacher,
    tmp_path: Path,
    encoding: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = ViewPlan(digits, make_augmentation("pad-crop-flip", digits), seed=0)
    dump(plan, [(teacher, tmp_path / "s")], views=2, encoding=encoding, shard_rows=3)
    monkeypatch.setattr(window, "DECODED_BYTES", 7 * 10 * 4)
    rows = np.random.default_rng(0).permutation(20)[:15]
    with open_store(tmp_path / "s") as store, CachedViews(digits, [store], 4, rows=rows) as views:
        whole = store.read(1, rows)
        # compact's last bit depends on which rows are decoded together
        slack = 1e-5 * whole.std(1).min() if encoding == "compact" else 0
        for batch in views.epoch(1):
            place = [rows.tolist().index(row) for row in batch.rows]
            assert_allclose(batch.teachers[0]["logits"], whole[place], rtol=0, atol=slack)


@pytest.mark.parametrize("pairs", [False, True])
def test_what_is_decoded_together_does_not_depend_on_the_start(
    digits: Dataset, stores: dict[bool, Store], pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of matrices may round a row by its company: a resume decodes the same batches at once."""
    taken: list[list[int]] = []
    take = window.Window.take

    def noted(self: window.Window, places: Tensor) -> window.Targets:
        taken.append(places.flatten().tolist())
        return take(self, places)

    monkeypatch.setattr(window.Window, "take", noted)
    monkeypatch.setattr(window, "TAKEN_BYTES", 4 * 10 * 3 * (2 if pairs else 1) * 3)
    with CachedViews(digits, [stores[pairs]], 3, pairs=pairs) as views:
        whole = [batch.teachers[0]["logits"] for batch in views.epoch(5)]
        together = [*taken]
        assert [len(places) for places in together] == ([18, 18, 4] if pairs else [9, 9, 2])
        for start in range(7):
            taken.clear()
            rest = [batch.teachers[0]["logits"] for batch in views.epoch(5, start)]
            assert taken == together[start // 3 :]
            assert all(a.equal(b) for a, b in zip(rest, whole[start:], strict=True))


MIXES = ["mixup:alpha=0.4", "pad-crop-flip+cutmix"]


@pytest.mark.parametrize("augment", MIXES)
def test_without_a_store_partners_come_from_the_chosen_rows(digits: Dataset, augment: str) -> None:
    """As if the chosen samples were the dataset: the same images, partner labels and lambdas."""
    rows = np.array([17, 2, 3, 5, 7, 11, 13])
    augmentation = make_augmentation(augment, digits)
    plan = ViewPlan(digits, augmentation, seed=3)
    chosen = np.sort(rows)
    alone = ViewPlan(digits.subset(chosen), augmentation, seed=3)
    partners = set()
    with CachedViews(digits, [], 4, plan=plan, rows=rows) as views:
        for epoch in range(12):
            for batch in views.epoch(epoch):
                assert set(batch.rows.tolist()) <= set(rows.tolist())
                here = np.searchsorted(chosen, batch.rows)
                (same,) = alone.stream([(here, epoch)])
                assert batch.labels.tolist() == digits.labels[batch.rows].tolist()
                assert batch.images.equal(same.images)
                assert batch.mix is not None
                assert same.mix is not None
                partner = chosen[alone.parameters(here, epoch)[0]["partner"]]
                assert batch.mix[0].tolist() == digits.labels[partner].tolist()
                assert batch.mix[1].equal(same.mix[1])
                partners |= set(partner.tolist())
    assert partners == set(rows.tolist())


def test_without_a_store_all_rows_keep_the_plan(digits: Dataset) -> None:
    plan = ViewPlan(digits, make_augmentation("mixup", digits), seed=3)
    assert CachedViews(digits, [], 4, plan=plan).plan is plan
    shuffled = np.random.default_rng(0).permutation(len(digits))
    assert CachedViews(digits, [], 4, plan=plan, rows=shuffled).plan is plan
    crops = ViewPlan(digits, make_augmentation("pad-crop-flip", digits), seed=3)
    assert CachedViews(digits, [], 4, plan=crops, rows=np.arange(5)).plan is crops


@pytest.mark.parametrize("augment", MIXES)
def test_partners_are_those_of_the_mix(digits: Dataset, augment: str) -> None:
    plan = ViewPlan(digits, make_augmentation(augment, digits), seed=3)
    rows, views = np.arange(20), np.arange(20) % 3
    partners = plan.partners(rows, views)
    assert partners is not None
    assert partners.tolist() == plan.parameters(rows, views)[0]["partner"].tolist()


@pytest.mark.parametrize("augment", MIXES)
def test_stored_partners_from_outside_are_refused(
    digits: Dataset, teacher: Teacher, tmp_path: Path, augment: str
) -> None:
    augmentation = make_augmentation(augment, digits)
    plan, rows = ViewPlan(digits, augmentation, seed=3), np.arange(2, 12)
    dump(plan, [(teacher, tmp_path / "whole")], views=2, encoding="float32")
    partner = plan.parameters(rows, 0)[0]["partner"]
    outside = [row for row in partner if row not in rows]
    first = digits.keys[outside[0]]
    for read in (("logits",), ()):
        with pytest.raises(
            MismatchError, match=rf"^{len(outside)} of the 10 images .* '{first}'\)"
        ):
            CachedViews(digits, [tmp_path / "whole"], 4, rows=rows, fields=read)
    few = digits.subset(rows)
    with pytest.raises(MismatchError, match=f"{len(outside)} are not in {few.name}"):
        CachedViews(few, [tmp_path / "whole"], 4)
    with CachedViews(digits, [tmp_path / "whole"], 4) as views:  # all samples: as they were dumped
        assert sum(len(batch.rows) for batch in views.epoch(1)) == 20

    # What the message advises: a store of the chosen samples alone.
    dump(ViewPlan(few, augmentation, 3), [(teacher, tmp_path / "few")], 2, encoding="float32")
    with CachedViews(digits, [tmp_path / "few"], 4, rows=rows[:]) as views:
        for batch in views.epoch(1):
            partner = rows[
                ViewPlan(few, augmentation, 3).parameters(batch.rows - 2, 1)[0]["partner"]
            ]
            assert batch.mix is not None
            assert batch.mix[0].tolist() == digits.labels[partner].tolist()


def test_rows_that_mix_among_themselves_are_taken(
    digits: Dataset, teacher: Teacher, tmp_path: Path
) -> None:
    """The rule is about the partners, not about the number of rows."""
    plan = ViewPlan(digits, make_augmentation("mixup", digits), seed=3)
    dump(plan, [(teacher, tmp_path / "store")], views=2, encoding="float32")
    partner = plan.parameters(np.arange(20), 0)[0]["partner"]
    rows = {0}
    while not rows >= (grown := rows | {int(partner[row]) for row in rows}):
        rows = grown
    assert 1 < len(rows) < 20
    chosen = np.array(sorted(rows))
    with CachedViews(digits, [tmp_path / "store"], 4, rows=chosen, views=1) as views:
        assert sum(len(batch.rows) for batch in views.epoch(0)) == len(rows)


def same_batch(one: Batch, other: Batch) -> bool:
    return (
        bool((one.images == other.images).all() and (one.views == other.views).all())
        and bool((one.rows == other.rows).all())
        and bool((one.teachers[0]["logits"] == other.teachers[0]["logits"]).all())
    )


@pytest.mark.parametrize("schedule", ["epoch", "random"])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_pass_goes_on_where_its_state_says(
    digits: Dataset, stores: dict[bool, Store], pairs: bool, schedule: str
) -> None:
    """Broken off after any batch, in any epoch, what follows is equal bit for bit."""

    def make() -> CachedViews:
        return CachedViews(digits, stores[pairs], 6, pairs=pairs, schedule=schedule, seed=3)

    with make() as views:
        whole = [batch for _ in range(3) for batch in views]
        assert len(views) == 4
    assert len(whole) == 12
    for stop in range(11):
        with make() as first:
            passes = (batch for _ in range(3) for batch in first)
            for _ in range(stop + 1):
                next(passes)
            state = json.loads(json.dumps(first.state_dict()))
        with make() as then:
            then.load_state_dict(state)
            then.set_epoch(state["epoch"])  # what a trainer does as an epoch begins
            rest = [batch for _ in range(state["epoch"], 3) for batch in then]
        assert len(rest) == 11 - stop
        assert all(map(same_batch, rest, whole[stop + 1 :]))


def test_the_state_of_other_views_is_refused(digits: Dataset, stores: dict[bool, Store]) -> None:
    with (
        CachedViews(digits, stores[False], 6) as views,
        CachedViews(digits, stores[False], 5) as other,
    ):
        with pytest.raises(MismatchError, match="batch_size 6, here it is 5"):
            other.load_state_dict(views.state_dict())
        other.set_epoch(2)
        assert all((batch.views == 2).all() for batch in other)


def test_one_store_may_be_given_alone(digits: Dataset, stores: dict[bool, Store]) -> None:
    for alone in (stores[False], stores[False].where, Path(stores[False].where)):
        with CachedViews(digits, alone, 6) as views:
            assert len(views.stores) == len(views.teachers) == 1
