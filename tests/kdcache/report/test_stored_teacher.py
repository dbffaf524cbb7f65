"""A teacher that does not say how it was trained, in a report beside the store that it filled."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from kdcache.data.loading import load_dataset
from kdcache.preprocessing import Preprocessing
from kdcache.report.collect import read_run
from kdcache.report.logits import run_stores, spec_teacher
from kdcache_stores import UsageError, open_store
from tests.conftest import Result, Trained


def test_it_takes_its_preprocessing_from_the_store(
    trained: Trained, tmp_path: Path, kdcache: object
) -> None:
    assert callable(kdcache)
    spec, out = f"resnet8@{trained.teacher / 'model.safetensors'}", tmp_path / "s.zarr"
    done: Result = kdcache(
        "dump-teacher", "--dataset", "digits", "--device", "cpu", "--teacher", spec, "--out", out,
        "--augment", "none", "--mean", "0.4", "--std", "0.2", "--allow-untrained", "-q",
    )  # fmt: skip
    assert done.code == 0, done.err
    digits = load_dataset("digits", "test")
    with open_store(out) as store, open_store(trained.store) as other:
        for stores in ([store], [store, other]):
            assert spec_teacher(spec, digits, "cpu", stores).preprocessing == Preprocessing(
                (0.4,), (0.2,)
            )
    with pytest.raises(UsageError, match="mean and std"):
        spec_teacher(spec, digits, "cpu")


def test_the_stores_that_runs_read_are_known(trained: Trained, tmp_path: Path) -> None:
    paths = [str(trained.store), str(tmp_path / "moved.zarr")]
    run = replace(read_run(trained.teacher), config={"store_paths": paths})
    with ExitStack() as opened:
        (store,) = run_stores([run, run], opened)
        assert Path(store.where) == trained.store
