"""A whole dump from Python: what `prepare_dump` finds out, and that `run` writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.data.loading import DatasetSource
from kdcache.dumping.job import DumpRequest, prepare_dump
from kdcache.dumping.requests import TeacherRequest
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
