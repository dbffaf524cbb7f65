"""check, and the same judgement as the preflight of train-student."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdcache.data.loading import load_dataset
from kdcache_stores import FieldSpec, StoreWriter, open_store
from tests.conftest import Result, Trained
from tests.sharing.servers import StaticServer

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def shuffled(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' store with the logits of every row moved one class on; pixels replay as before."""
    path = tmp_path_factory.mktemp("shuffled") / "shuffled.zarr"
    dataset = load_dataset("digits", "train")
    with open_store(trained.store) as good:
        teacher = replace(good.teacher, clean_top1={"test": 0.2})
        with StoreWriter(path, plan=good.plan, teacher=teacher, samples=dataset.samples,
                         views=good.n_views, config={},
                         fields={"logits": FieldSpec((10,), "float32")}) as writer:  # fmt: skip
            for shard in writer.pending():
                rows = slice(shard.start, shard.stop)
                probes = [p for p in good.probes if p.view == shard.view
                          and shard.start <= p.row < shard.stop]  # fmt: skip
                logits = np.roll(good.read(shard.view, rows), 1, axis=1)
                writer.write(shard, {"logits": logits}, probes)
            writer.seal()
    return path


def student(store: Path, out: Path, *more: object) -> list[object]:
    return ["train-student", "--store", store, "--dataset", "digits", "--student", "resnet8", "--method",
            "kd", "--out", out, "--train-samples", 60, "--epochs", 2, "--batch-size", 20, "--device",
            "cpu", *more]  # fmt: skip


def rules(done: Result) -> list[str]:
    return [finding["rule"] for finding in done.json["findings"]]


def test_silent_where_all_is_well(trained: Trained, kdcache: Run) -> None:
    done = kdcache("check", trained.store, "--epochs", 4, "--strict")
    assert (done.code, done.out, done.err) == (0, "nothing to warn of\n", "")
    quiet = kdcache("check", trained.store, "--epochs", 4, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    data = kdcache("check", trained.store, "--epochs", 4, "--recipe", "cifar100/kd-ls", "--json")
    assert (data.code, data.json, data.err) == (0, {"findings": []}, "")


def test_warnings_exit_1_under_strict_alone(shuffled: Path, kdcache: Run) -> None:
    for flags, code in (((), 0), (("--strict",), 1), (("-q",), 0)):
        done = kdcache("check", shuffled, "--epochs", 4, *flags)
        assert done.code == code
        assert done.err == ""
        assert done.out.startswith("warning: The teacher resnet8 of ")
        assert "Remedy: " in done.out
        assert done.out.endswith("[class-order]\n")
    data = kdcache("check", shuffled, "--epochs", 4, "--json", "--strict")
    assert (data.code, data.err, rules(data)) == (1, "", ["class-order"])


def test_the_settings_of_a_student(trained: Trained, kdcache: Run) -> None:
    def found(*flags: object) -> list[str]:
        return rules(kdcache("check", trained.store, "--epochs", 4, "--json", *flags))

    assert found("--method", "kd", "--temperature", 20, "--alpha", 0.9) == ["temperature", "alpha"]
    assert found("--recipe", "cifar100/kd-ls", "--kd-weight", 0.9) == ["standardized-weight"]
    assert found("--recipe", "cifar100/kd") == []
    part = ("--dataset", "digits", "--train-samples", 60, "--views", 4)
    assert found("--method", "kd", *part) == []
    alone = kdcache("check", trained.store, "--temperature", 3)
    assert alone.code == 2
    assert "temperature: of which --method" in alone.err
    for flags in ((), (trained.store, "--train-samples", 60), (trained.store, "--teacher", "x")):
        assert kdcache("check", *flags).code == 2


def test_an_ensemble_of_one_is_refused(trained: Trained, kdcache: Run) -> None:
    done = kdcache("check", trained.store, trained.store, "--epochs", 4)
    assert done.code == 1
    assert "both hold logits of one teacher" in done.err


def test_the_teacher_tried(
    trained: Trained, kdcache: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.teachers.trials.SIZES", (8, 16))  # larger ones take seconds
    common = ("--dataset", "digits", "--device", "cpu", "--json", "--epochs", 4)
    assert rules(kdcache("check", trained.store, "--teacher", trained.teacher, *common)) == []
    wrong = tmp_path / "wrong.zarr"
    done = kdcache("dump-teacher", "--dataset", "digits", "--teacher", trained.teacher, "--views", 2,
                   "--mean", "3", "--std", "1", "--out", wrong, "--device", "cpu", "-q",
                   "--allow-untrained")  # fmt: skip
    assert done.code == 0, done.err
    found = kdcache("check", wrong, "--teacher", trained.teacher, *common)
    assert "preprocessing" in rules(found)
    assert "normalisation measured on the dataset" in found.out
    assert "--mean " in found.out
    other = kdcache("check", trained.store, "--teacher", "resnet8", *common)
    assert other.code == 1


def test_a_training_says_it_and_records_it(shuffled: Path, tmp_path: Path, kdcache: Run) -> None:
    done = kdcache(*student(shuffled, tmp_path / "run", "--temperature", 8, "--json"))
    assert done.code == 0, done.err
    said = [w["rule"] for w in done.json["warnings"]]
    assert said[:2] == ["temperature", "class-order"]
    assert "warning: The temperature T = 8" in done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["warnings"] == done.json["warnings"]
    # The finished run judged again says the same.
    again = kdcache("check", "--run", tmp_path / "run", "--json")
    assert again.code == 0, again.err
    assert again.json["findings"] == done.json["warnings"]
    assert kdcache("check", "--run", tmp_path / "run", "--epochs", 4).code == 2
    moved = kdcache("check", shuffled, "--run", tmp_path / "run", "--json")
    assert moved.json == again.json


def test_a_good_training_has_no_warnings(trained: Trained, tmp_path: Path, kdcache: Run) -> None:
    done = kdcache(*student(trained.store, tmp_path / "run", "--strict", "--json"))
    assert done.code == 0, done.err
    assert [w["rule"] for w in done.json["warnings"]] in ([], ["unfit"])  # two epochs are few
    assert "warning" not in done.err.replace("warning: After 2 epochs", "")


def test_strict_refuses_before_anything_is_made(
    shuffled: Path, tmp_path: Path, kdcache: Run
) -> None:
    done = kdcache(*student(shuffled, tmp_path / "run", "--strict", "--alpha", 0.9))
    assert done.code == 1
    assert "2 warning(s), which --strict makes errors" in done.err
    assert "[alpha]" in done.err
    assert "[class-order]" in done.err
    assert not (tmp_path / "run").exists()


def test_the_baseline_given_and_found(
    trained: Trained, shuffled: Path, tmp_path: Path, kdcache: Run
) -> None:
    """The shuffled store says of itself that its teacher has 20% on clean test images."""
    flags = ("--student", "resnet8", "--baseline", trained.teacher, "--epochs", 4, "--json")
    assert rules(kdcache("check", trained.store, *flags)) == []
    assert rules(kdcache("check", shuffled, *flags)) == ["class-order", "weak-teacher"]
    other = kdcache("check", trained.store, "--student", "resnet20", "--baseline", trained.teacher)
    assert other.code == 1
    assert "model.name" in other.err
    none = kdcache(*student(trained.store, tmp_path / "run", "--baseline", tmp_path))
    assert none.code == 1
    assert not (tmp_path / "run").exists()
    # One that lies beside the new run is found, if it saw as many samples.
    alone = student(shuffled, tmp_path / "ce", "--strict")
    alone[alone.index("kd")] = "ce"
    alone[alone.index("--epochs") + 1] = 30
    assert kdcache(*alone).code == 0
    strict = kdcache(*student(shuffled, tmp_path / "run", "--strict"))
    assert "[weak-teacher]" in strict.err
    assert str(tmp_path / "ce") in strict.err


def test_students_from_labels_side_by_side_are_baselines(
    shuffled: Path, tmp_path: Path, kdcache: Run
) -> None:
    """The run of the same seed, though it comes after the student's."""
    asked = student(
        shuffled, tmp_path / "all", "--method", "ce", "--json", "--epochs", 30, "--lr", 0.1
    )
    done = kdcache(*asked)
    assert done.code == 0, done.err
    kd, ce = done.json
    assert [w["rule"] for w in ce["warnings"]] == []
    assert {"weak-teacher", "behind-labels"} <= {w["rule"] for w in kd["warnings"]}
    assert f"by labels alone ({tmp_path / 'all' / 'ce-seed0'})" in done.err
    assert kd["teachers"] == {"resnet8": 0.2}


def shards(server: StaticServer) -> list[str]:
    return sorted(path for _, path, _ in server.requests if "/c/" in path)


@pytest.mark.parametrize("size", ["0", "1GB"])
def test_a_remote_store_is_not_pulled_twice(
    size: str, trained: Trained, tmp_path: Path, kdcache: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KDCACHE_CACHE_SIZE", size)  # put back what --cache-size would set
    with StaticServer(trained.store.parent) as server:
        url = f"{server.url}/{trained.store.name}"
        args = student(Path("."), tmp_path / "run", "--views", 2, "--alpha", 0.9)
        args[args.index("--store") + 1] = url
        done = kdcache(*args)
        assert done.code == 0, done.err
    read = shards(server)
    assert len(read) == len(set(read)) == 2  # one shard of each of the two views
    assert ("were not checked" in done.err) == (size == "0")
    assert "[alpha]" in done.err
