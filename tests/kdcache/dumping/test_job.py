"""A whole dump from Python: what `prepare_dump` finds out, and that `run` writes it."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kdcache import Training, train
from kdcache.data.loading import DatasetSource
from kdcache.dumping.clean_images import clean_images, clean_top1
from kdcache.dumping.dump import dump
from kdcache.dumping.first_rows import allowed
from kdcache.dumping.job import DumpRequest, prepare_dump
from kdcache.dumping.requests import TeacherRequest
from kdcache.preprocessing import Preprocessing
from kdcache.runs import load_run_model, read_summary
from kdcache.teachers.teacher import Teacher
from kdcache.teachers.trials import try_out
from kdcache.training.optim import Optimization
from kdcache.views.sizes import view_size
from kdcache_stores import DataError, MismatchError, UsageError, describe, open_store
from tests.conftest import Trained

DIGITS = DatasetSource("digits")


def test_a_dump_from_its_request_to_its_store(trained: Trained, tmp_path: Path) -> None:
    teacher = TeacherRequest(tmp_path / "t.zarr", str(trained.teacher))
    request = DumpRequest(
        DIGITS, [teacher], views=2, seed=3, augment="pad-crop-flip", encoding="float32"
    )
    notes: list[str] = []
    with prepare_dump(request, notes.append) as prepared:
        assert not (tmp_path / "t.zarr").exists()
        assert (prepared.plan.seed, prepared.views) == (3, 2)
        assert prepared.estimate.rows == 2 * len(prepared.plan)
        assert prepared.estimate.encodings == {"logits": "float32"}
        (target,) = prepared.targets
        assert target.clean_top1 is not None
        assert target.clean_top1.keys() == {"train", "test"}
        assert any("preprocessing its own: mean" in note for note in notes)
        done = prepared.run(command="from a program")
    assert done.sealed
    with open_store(tmp_path / "t.zarr") as store:
        assert describe(store)["provenance"]["command"] == "from a program"
        assert store.teacher.clean_top1 == target.clean_top1
    # Once more with the views of that store, and nothing said of them.
    again = DumpRequest(DIGITS, [TeacherRequest(tmp_path / "u.zarr", str(trained.teacher))],
                        plan_from=tmp_path / "t.zarr")  # fmt: skip
    with prepare_dump(again, notes.append) as prepared:
        assert (prepared.plan.seed, prepared.views) == (3, 2)
    assert any("identical" in note for note in notes)


def test_views_and_clean_images_have_the_size_that_the_teacher_was_trained_at(
    tmp_path: Path,
) -> None:
    """A folder of 40-pixel files, a teacher of crops of 16: so are its views, and so is it tested."""
    rng = np.random.default_rng(0)
    for split, number in product(("train", "val"), range(40)):
        image = rng.integers(0, 60, (40, 40, 3)) + 150 * (number % 2)
        file = tmp_path / "photos" / split / str(number % 2) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(file)
    source = DatasetSource(f"folder:{tmp_path / 'photos'}")
    run = train(
        Training(source.name, "resnet8", augment="resized-crop-flip:size=16,flip=false",
                 optimization=Optimization(epochs=3, batch_size=8, lr=0.05)),
        tmp_path / "teacher",
    )  # fmt: skip
    notes: list[str] = []
    request = TeacherRequest(tmp_path / "t.zarr", str(run.path))
    with prepare_dump(DumpRequest(source, [request], views=1), notes.append) as prepared:
        assert view_size(prepared.plan) == (16, 16)
        (target,) = prepared.targets
        assert target.clean_images == {"train": 28, "test": 28}
        assert target.clean_top1 is not None
        assert target.clean_top1["test"] == read_summary(run.path)["last_top1"] == 1
        prepared.run()
    assert any(n.startswith("views: resized-crop-flip:size=16, the size that") for n in notes)
    with open_store(tmp_path / "t.zarr") as store:
        assert store.provenance["clean_images"] == {"train": 28, "test": 28}
    asked = DumpRequest(source, [replace(request, out=tmp_path / "u")], views=1, augment="none")
    with prepare_dump(asked, notes.append) as prepared:
        assert view_size(prepared.plan) == (40, 40)


def test_nothing_is_written_where_something_is_refused(trained: Trained, tmp_path: Path) -> None:
    untrained = TeacherRequest(tmp_path / "t.zarr", "resnet8")
    for request, error in (
        (DumpRequest(DIGITS, [untrained], views=1), DataError),
        (DumpRequest(DIGITS, [untrained], augment="pad-crop-flip"), UsageError),
        (DumpRequest(DIGITS, [untrained], plan_from=trained.store, seed=99), MismatchError),
    ):
        with pytest.raises(error), prepare_dump(request):
            pass
    assert not (tmp_path / "t.zarr").exists()


class NormalisesItself(nn.Module):
    """A network that takes pixels from 0 to 1, as many a deployed one does."""

    def __init__(self, network: nn.Module, own: Preprocessing) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, own.mean[0], own.std[0]

    def forward(self, pixels: Tensor) -> Any:
        return self.network((pixels - self.mean) / self.std)


def test_a_teacher_in_doubt_is_looked_at_more_closely(trained: Trained) -> None:
    """As closely as it may cost; and what was assumed is refused where another preprocessing fits."""
    run, split = load_run_model(trained.teacher), DIGITS.load("test")
    inside = NormalisesItself(run.module.eval(), run.preprocessing)
    good = Teacher("own", inside, Preprocessing((0.0,), (1.0,)), 10, "0" * 64)
    sound = clean_top1(good, [split], forwards=120)
    assert (sound.images, sound.untried, sound.advice) == ({"test": 120}, False, None)
    weak = replace(good, preprocessing=Preprocessing((0.0,), (2.0,)))
    small = clean_top1(weak, [split], forwards=120)
    assert (small.images, small.untried, small.advice) == ({"test": 120}, True, None)
    closer = clean_top1(weak, [split], forwards=120, more=1500)
    assert closer.images["test"] > 120
    assert not closer.untried
    assert closer.advice is not None
    assert closer.advice.endswith("with pixels from 0 to 1: dump it with --mean 0 --std 1.")
    # Nobody has said it: it is looked at though it is well, and refused where it is not.
    assert clean_top1(good, [split], forwards=120, assumed=True).untried
    well = clean_top1(good, [split], forwards=120, more=1500, assumed=True)
    assert (well.untried, well.advice) == (False, None)
    keep = r"pixels from 0 to 1: dump it with --mean 0 --std 1\. To dump it as it is.*: --mean 0 --std 2"
    with pytest.raises(UsageError, match=f"nothing says which pixels own was trained on.*{keep}"):
        clean_top1(weak, [split], forwards=120, more=1500, assumed=True)


@pytest.mark.slow
def test_a_network_that_normalises_too_is_told_with_the_option_that_helps(trained: Trained) -> None:
    run = load_run_model(trained.teacher)
    split = DIGITS.load("test")
    inside = NormalisesItself(run.module.eval(), run.preprocessing)
    twice = Teacher("own", inside, run.preprocessing, 10, "0" * 64)
    good = clean_top1(replace(twice, preprocessing=Preprocessing((0.0,), (1.0,))), [split])
    assert good.advice is None
    assert good.top1["test"] > 0.9
    helped = r"and 9\d\.\d% with pixels from 0 to 1: dump it with --mean 0 --std 1\."
    low = replace(twice, preprocessing=Preprocessing((0.0,), (2.0,)))
    advice = clean_top1(low, [split]).advice
    assert advice is not None
    assert re.search(f"on \\d+ clean test images, {helped}", advice)
    with pytest.raises(MismatchError, match=f"cannot be told from guessing.*{helped}"):
        clean_top1(replace(twice, preprocessing=Preprocessing((0.0,), (3.0,))), [split])
    assert clean_top1(low, [split], allow_untrained=True).advice is None


def test_trials_cost_no_more_than_they_may(trained: Trained) -> None:
    """At least 24 images each; sizes that cost more than their part are not tried."""
    run, split = load_run_model(trained.teacher), DIGITS.load("test")
    seen: list[int] = []

    class Counting(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images[:, 0].numel() // 64)
            return torch.zeros(len(images), 10)

    teacher = Teacher("own", Counting(), run.preprocessing, 10, "0" * 64)
    images, labels = clean_images(split)
    for forwards in (288, 1000, 8000):
        seen.clear()
        try_out(teacher, images, labels, None, forwards)
        assert 0 < sum(seen) <= forwards


class Counted(nn.Module):
    """Counts the views that it is given."""

    seen = 0

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        Counted.seen += len(images)
        return self.network(images)


@pytest.mark.parametrize(("views", "encoding", "allow", "calibrated"), [
    (2, "float16", False, 0), (2, "float16", True, 0), (8, "compact:2.5e-5", False, 2 * 256),
], ids=["few", "any", "calibrated"])  # fmt: skip
def test_all_that_is_forwarded_before_the_first_row(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    views: int,
    encoding: str,
    allow: bool,
    calibrated: int,
) -> None:
    """128 forwards, or 2% of the dump; calibration rows beyond that once, for fit, estimate and checks."""
    load = Teacher.__post_init__

    def counting(self: Teacher) -> None:
        if not isinstance(self.module, Counted):
            object.__setattr__(self, "module", Counted(self.module))
        load(self)

    monkeypatch.setattr(Teacher, "__post_init__", counting)
    teacher = TeacherRequest(tmp_path / "t.zarr", str(trained.teacher))
    request = DumpRequest(DIGITS, [teacher], views=views, encoding=encoding, allow_untrained=allow)
    Counted.seen = 0
    with prepare_dump(request) as prepared:
        rows = prepared.estimate.rows
        assert 64 <= Counted.seen - calibrated <= max(128, 0.02 * rows)
        before = Counted.seen
        prepared.run()
        assert Counted.seen - before == rows, "what was forwarded before is not forwarded again"
    with prepare_dump(request) as prepared:
        assert prepared.estimate.rows == 0


def test_a_fit_is_the_same_whoever_forwards_its_rows(trained: Trained, tmp_path: Path) -> None:
    """Of a whole dump, and of `dump` alone: the same bytes."""
    teacher = TeacherRequest(tmp_path / "t.zarr", str(trained.teacher))
    request = DumpRequest(DIGITS, [teacher], views=2, encoding="compact", batch_size=100)
    with prepare_dump(request) as prepared:
        prepared.run()
        alone = [target._replace(path=tmp_path / "u.zarr") for target in prepared.targets]
        dump(prepared.plan, alone, 2, encoding="compact", batch_size=100)
    for file in sorted((tmp_path / "t.zarr").glob("logits/*/c/**/*")):
        if file.is_file():
            other = tmp_path / "u.zarr" / file.relative_to(tmp_path / "t.zarr")
            assert file.read_bytes() == other.read_bytes()


def test_so_many_forwards_are_allowed() -> None:
    assert (allowed(0), allowed(6400), allowed(400_000)) == (120, 120, 7992)
