"""One pass over several teachers, parts, resumption, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.loading import load_dataset
from kdcache.dumping.dump import dump
from kdcache.teachers.posterior import mc_dropout
from kdcache.teachers.teacher import Teacher
from kdcache.views.plan import ViewPlan
from kdcache_stores import (
    DataError,
    KDCacheError,
    MismatchError,
    StoreInUse,
    UnfinishedStore,
    UsageError,
    describe,
    open_store,
    reopen,
    verify,
)
from tests.kdcache.dumping.conftest import MakeTeacher, tree
from tests.kdcache.views.conftest import make_folder


@pytest.fixture
def plan(digits: Dataset) -> ViewPlan:
    return ViewPlan(digits, make_augmentation("pad-crop-flip", digits), seed=0)


class Watch:
    """Keeps what a dump reports."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []
        self.rows, self.top1, self.sizes = 0, None, []

    def start(self, done: int, total: int) -> None:
        self.started.append((done, total))

    def batch(self, rows: int, top1: float | None) -> None:
        self.rows, self.top1 = self.rows + rows, top1

    def written(self, nbytes: int) -> None:
        self.sizes.append(nbytes)


def test_two_teachers_in_one_pass_equal_two_dumps(
    plan: ViewPlan, make_teacher: MakeTeacher, tmp_path: Path
) -> None:
    a, b = make_teacher("resnet8", seed=1), make_teacher("resnet14", seed=2)
    dump(plan, [(a, tmp_path / "a"), (b, tmp_path / "b")], 3, batch_size=64)
    for teacher, name in ((a, "a"), (b, "b")):
        dump(plan, [(teacher, tmp_path / "one" / name)], 3, batch_size=64)
        assert tree(tmp_path / name) == tree(tmp_path / "one" / name)


def test_one_pass_makes_every_view_once(
    plan: ViewPlan, make_teacher: MakeTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    stream = ViewPlan.stream

    def counted(self: ViewPlan, batches: list, *args: object, **options: object) -> object:
        pairs = list(batches)
        asked.extend((int(view), int(row)) for rows, views in pairs
                     for row, view in zip(rows, views, strict=True))  # fmt: skip
        return stream(self, pairs, *args, **options)

    monkeypatch.setattr(ViewPlan, "stream", counted)
    teachers = [make_teacher(seed=seed) for seed in range(3)]
    dump(plan, [(t, tmp_path / str(i)) for i, t in enumerate(teachers)], 2, batch_size=100)
    assert asked == [(view, row) for view in (0, 1) for row in range(300)]


def test_a_teacher_added_later_completes_what_it_lacks(
    plan: ViewPlan, make_teacher: MakeTeacher, tmp_path: Path
) -> None:
    a, b = make_teacher(seed=1), make_teacher(seed=2)
    dump(plan, [(a, tmp_path / "a")], 2)
    watch = Watch()
    done = dump(plan, [(a, tmp_path / "a"), (b, tmp_path / "b")], 2, watch=watch)
    assert (done.rows, done.skipped, watch.started) == (600, 0, [(0, 600)])
    dump(plan, [(b, tmp_path / "again")], 2)
    assert tree(tmp_path / "b") == tree(tmp_path / "again")


def test_watch_hears_rows_sizes_and_accuracy(
    plan: ViewPlan, teacher: Teacher, tmp_path: Path
) -> None:
    watch = Watch()
    dump(plan, [(teacher, tmp_path / "s")], 3, batch_size=64, watch=watch)
    assert watch.started == [(0, 900)]
    assert watch.rows == 900
    assert len(watch.sizes) == 3
    assert sorted(watch.sizes) == watch.sizes
    assert watch.top1 is None or 0 <= watch.top1 <= 1


class Interrupt(Watch):
    """Ctrl-C while a later shard is under way."""

    def __init__(self, after: int = 700) -> None:
        super().__init__()
        self.after = after

    def batch(self, rows: int, top1: float | None) -> None:
        super().batch(rows, top1)
        if self.rows > self.after:
            raise KeyboardInterrupt


def test_interrupted_dump_goes_on_byte_for_byte(
    plan: ViewPlan, teacher: Teacher, tmp_path: Path
) -> None:
    dump(plan, [(teacher, tmp_path / "whole")], 5, batch_size=64)
    with pytest.raises(KeyboardInterrupt):
        dump(plan, [(teacher, tmp_path / "s")], 5, batch_size=64, watch=Interrupt())
    with pytest.raises(UnfinishedStore):
        open_store(tmp_path / "s")
    watch = Watch()
    done = dump(plan, [(teacher, tmp_path / "s")], 5, batch_size=64, watch=watch)
    assert done.skipped in (600, 900)
    assert done.rows == 1500 - done.skipped
    assert watch.started == [(done.skipped, 1500)]
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")


def test_small_shards_resume_too(plan: ViewPlan, teacher: Teacher, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    dump(plan, [(teacher, tmp_path / "whole")], 2, batch_size=32, shard_rows=70)
    with pytest.raises(KeyboardInterrupt):
        dump(plan, [(teacher, tmp_path / "s")], 3, batch_size=32, watch=Interrupt(), shard_rows=70)
    dump(plan, [(teacher, tmp_path / "s")], 3, batch_size=32)
    with open_store(tmp_path / "whole") as whole, open_store(tmp_path / "s") as store:
        for view in range(2):
            np.testing.assert_array_equal(store.read(view), whole.read(view))
        assert whole.view_digests == store.view_digests[:2]


def test_a_teacher_of_other_classes_than_the_plan_writes_nothing(
    plan: ViewPlan, make_teacher: MakeTeacher, tmp_path: Path
) -> None:
    with pytest.raises(KDCacheError, match=r"logits must have shape \(10,\).*found \(12,\)"):
        dump(plan, [(make_teacher(classes=12), tmp_path / "s")], 1)


def test_parts_and_seal_equal_one_job(plan: ViewPlan, teacher: Teacher, tmp_path: Path) -> None:
    dump(plan, [(teacher, tmp_path / "whole")], 5)
    for part in ((2, 3), (0, 3)):
        assert not dump(plan, [(teacher, tmp_path / "s")], 5, part=part).sealed
    with pytest.raises(UnfinishedStore, match="missing"), reopen(tmp_path / "s") as writer:
        writer.seal()
    dump(plan, [(teacher, tmp_path / "s")], 5, part=(1, 3))
    with reopen(tmp_path / "s") as writer:
        assert writer.views == 5
        writer.seal()
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    "encoding", ["float32", "quantized", "quantized:0.2", "topk:3", "compact:1e-3"]
)
def test_reopen_knows_every_encoding(
    encoding: str, plan: ViewPlan, teacher: Teacher, tmp_path: Path
) -> None:
    dump(plan, [(teacher, tmp_path / "s")], 1, encoding=encoding, part=(0, 2), hash_keys=True)
    with reopen(tmp_path / "s") as writer:
        writer.seal()
    with open_store(tmp_path / "s") as store:
        assert store.keys_hashed
        assert store.n_views == 1


def test_growth_in_parts_is_sealed_with_its_number_of_views(
    plan: ViewPlan, teacher: Teacher, tmp_path: Path
) -> None:
    dump(plan, [(teacher, tmp_path / "s")], 2)
    dump(plan, [(teacher, tmp_path / "s")], 4, part=(0, 2))
    with pytest.raises(UsageError, match="--views"):
        reopen(tmp_path / "s")
    with pytest.raises(UnfinishedStore), reopen(tmp_path / "s", 4) as writer:
        writer.seal()
    dump(plan, [(teacher, tmp_path / "s")], 4, part=(1, 2))
    with reopen(tmp_path / "s", 4) as writer:
        writer.seal()
    with open_store(tmp_path / "s") as store:
        assert store.n_views == 4
        assert verify(store).ok


class Twin(Watch):
    """Another job dumps the very same part while this one is under way."""

    def __init__(self, plan: ViewPlan, teacher: Teacher, path: Path) -> None:
        super().__init__()
        self.other = (plan, [(teacher, path)], 4)

    def batch(self, rows: int, top1: float | None) -> None:
        if not self.rows:
            dump(*self.other, part=(0, 2))
        super().batch(rows, top1)


def test_two_jobs_with_the_same_part_do_no_damage(
    plan: ViewPlan, teacher: Teacher, tmp_path: Path
) -> None:
    dump(plan, [(teacher, tmp_path / "whole")], 4)
    path = tmp_path / "s"
    dump(plan, [(teacher, path)], 4, part=(0, 2), watch=Twin(plan, teacher, path))
    dump(plan, [(teacher, path)], 4, part=(1, 2))
    with reopen(path) as writer:
        writer.seal()
    assert tree(path) == tree(tmp_path / "whole")


def test_two_jobs_with_other_values_are_told_apart(
    plan: ViewPlan, teacher: Teacher, tmp_path: Path
) -> None:
    """A teacher that is not deterministic: the second writer of a shard is refused."""
    noisy = replace(teacher, module=Noisy(teacher.module))
    path = tmp_path / "s"
    with pytest.raises(StoreInUse, match="other values"):
        dump(plan, [(noisy, path)], 2, part=(0, 2), watch=Twin(plan, noisy, path))
    dump(plan, [(noisy, path)], 4)
    with open_store(path) as store:
        assert verify(store).ok


class Noisy(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out + torch.rand_like(out)


class Spoilt(nn.Module):
    """NaN for one image: the one whose mean is `value`."""

    def __init__(self, module: nn.Module, value: float) -> None:
        super().__init__()
        self.module, self.value = module, value

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return torch.where((x.mean((1, 2, 3)) == self.value)[:, None], torch.nan, out)


def test_a_logit_that_is_not_finite_names_sample_and_view(
    plan: ViewPlan, teacher: Teacher, digits: Dataset, tmp_path: Path
) -> None:
    image = teacher.preprocessing(plan.images([123], [2]))
    spoilt = replace(teacher, module=Spoilt(teacher.module, float(image.mean())))
    with pytest.raises(DataError, match=r"not finite") as caught:
        dump(plan, [(spoilt, tmp_path / "s")], 4, batch_size=300)
    assert repr(digits.keys[123]) in str(caught.value)
    assert "view 2" in str(caught.value)
    with pytest.raises(UnfinishedStore):
        open_store(tmp_path / "s")


def test_refusals(
    plan: ViewPlan, teacher: Teacher, make_teacher: MakeTeacher, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match="class-map"):
        dump(plan, [(replace(make_teacher(classes=7), classes=10), tmp_path / "a")], 1)
    with pytest.raises(UsageError, match="its own"):
        dump(plan, [(teacher, tmp_path / "b"), (teacher, tmp_path / "c" / ".." / "b")], 1)
    with pytest.raises(UsageError, match="at least one"):
        dump(plan, [], 1)
    dump(plan, [(teacher, tmp_path / "s")], 2)
    for options, word in (
        ({"batch_size": 10}, "batch_size"),
        ({"encoding": "float32"}, "encoding"),
        ({"hash_keys": True}, "keys"),
    ):
        with pytest.raises(MismatchError, match=word):
            dump(plan, [(teacher, tmp_path / "s")], 2, **options)
    with pytest.raises(MismatchError, match="precision"):
        dump(plan, [(replace(teacher, precision="bf16"), tmp_path / "s")], 2)
    with pytest.raises(MismatchError, match="seed"):
        dump(ViewPlan(plan.dataset, plan.augmentation, 1), [(teacher, tmp_path / "s")], 2)
    with pytest.raises(MismatchError, match="only grow"):
        dump(plan, [(teacher, tmp_path / "s")], 1)


def test_exhaustive_views_are_bounded(digits: Dataset, teacher: Teacher, tmp_path: Path) -> None:
    plan = ViewPlan(digits, make_augmentation("exhaustive", digits), seed=0)
    assert plan.views == 9
    with pytest.raises(UsageError, match="9 views"):
        dump(plan, [(teacher, tmp_path / "s")], 10)


def test_a_store_keeps_its_rows_a_shard(plan: ViewPlan, teacher: Teacher, tmp_path: Path) -> None:
    """As it grows, and as it goes on; another number is refused, not taken for a new store."""
    dump(plan, [(teacher, tmp_path / "s")], 1, shard_rows=64)
    dump(plan, [(teacher, tmp_path / "s")], 2)
    with open_store(tmp_path / "s") as store:
        assert store.shard_rows == 60  # equal shards: 64 would leave one of 44
        assert len(store.shards(1)) == 5
    for asked, rows in ((32, 30), (128, 100)):
        with pytest.raises(MismatchError, match=f"shards of 60 rows, this dump has {rows}"):
            dump(plan, [(teacher, tmp_path / "s")], 3, shard_rows=asked)


def test_an_interrupt_within_a_view_loses_one_shard_at_most(
    plan: ViewPlan, teacher: Teacher, tmp_path: Path
) -> None:
    watch = Interrupt(after=200)
    with pytest.raises(KeyboardInterrupt):
        dump(plan, [(teacher, tmp_path / "s")], 1, batch_size=16, shard_rows=32, watch=watch)
    again = dump(plan, [(teacher, tmp_path / "s")], 1, batch_size=16)
    assert 200 - 32 <= again.skipped < 300
    assert again.rows + again.skipped == 300


def test_parts_share_a_single_view(plan: ViewPlan, teacher: Teacher, tmp_path: Path) -> None:
    dump(plan, [(teacher, tmp_path / "whole")], 1, batch_size=16, shard_rows=64)
    rows = [
        dump(plan, [(teacher, tmp_path / "s")], 1, batch_size=16, shard_rows=64, part=(i, 2)).rows
        for i in range(2)
    ]
    assert rows == [3 * 60, 2 * 60]
    with reopen(tmp_path / "s") as writer:
        writer.seal()
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")


def test_growth_keeps_the_old_views(plan: ViewPlan, teacher: Teacher, tmp_path: Path) -> None:
    dump(plan, [(teacher, tmp_path / "s")], 2)
    with open_store(tmp_path / "s") as store:
        before = store.view_digests
    done = dump(plan, [(teacher, tmp_path / "s")], 3)
    assert (done.rows, done.skipped) == (300, 600)
    with open_store(tmp_path / "s") as store:
        assert store.view_digests[:2] == before


def test_repair_writes_the_damage_anew(plan: ViewPlan, teacher: Teacher, tmp_path: Path) -> None:
    dump(plan, [(teacher, tmp_path / "whole")], 3)
    shutil.copytree(tmp_path / "whole", tmp_path / "s")
    shard = next(file for file in (tmp_path / "s").glob("logits/values/c/1/**/*") if file.is_file())
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    assert dump(plan, [(teacher, tmp_path / "s")], 3).rows == 0
    assert dump(plan, [(teacher, tmp_path / "s")], 3, repair=True).rows == 300
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")


def test_unlabelled_samples(teacher: Teacher, tmp_path: Path) -> None:
    dataset = load_dataset("digits").subset(range(50))
    dataset.labels = np.full(50, -1)
    plan = ViewPlan(dataset, make_augmentation("none", dataset), seed=0)
    watch = Watch()
    dump(plan, [(teacher, tmp_path / "s")], 1, watch=watch)
    with open_store(tmp_path / "s") as store:
        assert describe(store)["fields"]["logits"]["top1"] is None
    assert watch.top1 is None


def test_posterior_samples_are_aligned_and_independent_of_the_batch(
    plan: ViewPlan, make_teacher: MakeTeacher, tmp_path: Path
) -> None:
    teacher = make_teacher("wrn_16_2_dropout")
    samples = [mc_dropout(teacher, seed) for seed in range(2)]
    dump(plan, [(t, tmp_path / f"{i}") for i, t in enumerate(samples)], 1, encoding="float32",
         batch_size=300)  # fmt: skip
    dump(plan, [(samples[0], tmp_path / "small")], 1, encoding="float32", batch_size=7)
    with (
        open_store(tmp_path / "0") as a,
        open_store(tmp_path / "1") as b,
        open_store(tmp_path / "small") as small,
    ):
        assert a.plan.digest == b.plan.digest
        assert a.teacher.digest != b.teacher.digest
        assert np.abs(a.read(0) - b.read(0)).max() > 0.01 * a.read(0).std()
        np.testing.assert_allclose(a.read(0), small.read(0), atol=1e-4)


@pytest.mark.parametrize(
    "encoding", ["float32", pytest.param("compact:1e-3", marks=pytest.mark.slow)]
)
def test_several_views_a_decode_give_the_same_store(
    make_teacher: MakeTeacher, tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, interrupted, in parts and with workers; each image is decoded once for all views."""
    folder = make_folder(tmp_path / "images", per_class=20)
    dataset = load_dataset(f"folder:{folder}")
    decoded: list[int] = []
    decode = dataset.decode

    def counting(row: int) -> torch.Tensor:
        decoded.append(row)
        return decode(row)

    monkeypatch.setattr(dataset, "decode", counting)
    plan = ViewPlan(dataset, make_augmentation("resized-crop-flip:size=16", dataset), seed=0)
    teacher = make_teacher(classes=2, channels=3, size=16)

    def run(name: str, views: int = 5, **how: Any) -> int:
        decoded.clear()
        dump(plan, [(teacher, tmp_path / name)], views, batch_size=8, shard_rows=16,
             encoding=encoding, **how)  # fmt: skip
        return len(decoded)

    rows = len(plan)
    fitted = run("whole") - 5 * rows  # the rows that an encoding is fitted on
    assert run("three", views_per_decode=3) == fitted + 2 * rows
    run("workers", views_per_decode=5, workers=2)
    for part in range(2):
        run("parts", views_per_decode=4, part=(part, 2))
    with reopen(tmp_path / "parts") as writer:
        writer.seal()
    with pytest.raises(KeyboardInterrupt):
        run("interrupted", views_per_decode=2, watch=Interrupt(after=60))
    run("interrupted", views_per_decode=4)
    run("grown", views=2, views_per_decode=2)
    for name in ("three", "workers", "parts", "interrupted"):
        assert tree(tmp_path / name) == tree(tmp_path / "whole")
    run("grown", views_per_decode=2)
    with open_store(tmp_path / "grown") as grown, open_store(tmp_path / "whole") as whole:
        assert grown.view_digests == whole.view_digests
