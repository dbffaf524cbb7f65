"""dump-teacher and its neighbours on the command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from kdcache.data.loading import load_dataset
from kdcache.dumping.default_encoding import choose_encodings
from kdcache.models.classes import save_class_map
from kdcache.models.zoo import build_model
from kdcache_stores import open_store
from tests.conftest import Result, Trained

Run = Callable[..., Result]


@pytest.fixture
def dump(kdcache: Run) -> Run:
    def run(*args: object) -> Result:
        return kdcache("dump-teacher", "--dataset", "digits", "--device", "cpu", *args, "--json")

    return run


def strings(value: object) -> list[str]:
    """Every string in a JSON document."""
    if isinstance(value, dict):
        return [s for key, item in value.items() for s in (key, *strings(item))]
    if isinstance(value, list):
        return [s for item in value for s in strings(item)]
    return [value] if isinstance(value, str) else []


@pytest.fixture
def published(trained: Trained, tmp_path: Path) -> Path:
    """The trained teacher as other projects publish theirs: nested, with DataParallel's prefix."""
    from kdcache.runs import load_run_model

    state = load_run_model(trained.teacher).module.state_dict()
    path = tmp_path / "resnet8_last.pth"
    torch.save({"epoch": 3, "model": {f"module.{k}": v for k, v in state.items()}}, path)
    return path


def test_published_checkpoint(
    published: Path, trained: Trained, dump: Run, kdcache: Run, tmp_path: Path
) -> None:
    out = tmp_path / "s.zarr"
    done = dump("--teacher", f"resnet8@{published}", "--views", 4, "--encoding", "float32",
                "--out", out)  # fmt: skip
    assert done.code == 0, done.err
    with open_store(out) as store, open_store(trained.store) as run:
        # Measured on the training images, as train-teacher did: the very same logits.
        assert store.teacher.preprocessing == run.teacher.preprocessing
        assert store.digest == run.digest
        assert store.teacher.clean_top1.keys() == run.teacher.clean_top1.keys() == {"train", "test"}
        assert store.teacher.clean_top1["test"] > 0.5
        assert store.teacher.file_sha256 is not None
    said = kdcache("dump-teacher", "--dataset", "digits", "--device", "cpu", "--teacher",
                   "resnet8", "--weights", published, "--views", 4, "--encoding", "float32",
                   "--out", out).err  # fmt: skip
    assert "preprocessing measured on digits" in said
    assert "5,748 rows are stored already" in said


def test_nothing_of_the_file_system_enters_a_store(
    published: Path, tmp_path: Path, kdcache: Run
) -> None:
    data = load_dataset("digits")
    test = load_dataset("digits", "test")
    arrays = tmp_path / "secret" / "mine.npz"
    arrays.parent.mkdir()
    np.savez(arrays, x_train=data.images.numpy()[:200], y_train=data.labels[:200],
             x_test=test.images.numpy(), y_test=test.labels)  # fmt: skip
    names = tmp_path / "secret" / "map.json"
    save_class_map(names, list(range(10)))
    done = kdcache("dump-teacher", "--dataset", f"arrays:{arrays}", "--data-root", tmp_path,
                   "--teacher", f"resnet8@{published}", "--class-map", names, "--views", 1,
                   "--out", tmp_path / "s.zarr", "--device", "cpu", "--json")  # fmt: skip
    assert done.code == 0, done.err
    header = json.loads((tmp_path / "s.zarr" / "zarr.json").read_text())
    assert not [s for s in strings(header) if str(tmp_path) in s or "secret" in s]
    command = header["attributes"]["kdcache"]["provenance"]["command"]
    assert command.startswith("kdcache dump-teacher --dataset arrays:mine.npz")


def test_two_teachers_in_one_pass(
    trained: Trained, published: Path, dump: Run, tmp_path: Path
) -> None:
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    done = dump("--teacher", trained.teacher, "--out", a, "--teacher", f"resnet8@{published}",
                "--out", b, "--views", 4, "--encoding", "float32", "--normalize", "cifar10",
                "--normalize", "cifar10", "--size", 8)  # fmt: skip
    assert done.code == 1
    assert "does not take images of 3x8x8" in done.err
    done = dump("--teacher", trained.teacher, "--out", a, "--teacher", f"resnet8@{published}",
                "--out", b, "--views", 4, "--encoding", "float32", "--mean", "0.31", "--std",
                "0.38")  # fmt: skip
    assert done.code == 0, done.err
    assert [entry["store"] for entry in done.json["stores"]] == [str(a), str(b)]
    with open_store(a) as first, open_store(b) as second, open_store(trained.store) as own:
        assert first.teacher.preprocessing["mean"] == [0.31]
        assert first.digest == second.digest != own.digest
        assert first.plan.digest == own.plan.digest


def test_plan_from(trained: Trained, dump: Run, kdcache: Run, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    done = dump("--teacher", trained.teacher, "--plan-from", trained.store, "--out", out,
                "--encoding", "float32")  # fmt: skip
    assert done.code == 0, done.err
    with open_store(out) as store, open_store(trained.store) as there:
        assert store.digest == there.digest
    for extra, word in (("--seed", 1), "seed"), (("--augment", "none"), "augmentation"):
        refused = dump("--teacher", trained.teacher, "--plan-from", trained.store, "--out",
                       tmp_path / "x.zarr", *extra)  # fmt: skip
        assert refused.code == 1
        assert word in refused.err
    shifted, data = tmp_path / "shifted.npz", load_dataset("digits")
    np.savez(shifted, x_train=np.roll(data.images.numpy(), 1, 0), y_train=data.labels,
             keys_train=np.array(data.keys), x_test=data.images.numpy(), y_test=data.labels)  # fmt: skip
    refused = kdcache("dump-teacher", "--dataset", f"arrays:{shifted}", "--teacher",
                      trained.teacher, "--plan-from", trained.store, "--out", tmp_path / "x.zarr",
                      "--device", "cpu")  # fmt: skip
    assert refused.code == 1
    assert "replay" in refused.err
    assert not (tmp_path / "x.zarr").exists()


def test_a_split_beside_plan_from(trained: Trained, dump: Run, tmp_path: Path) -> None:
    tests, out = tmp_path / "tests.zarr", tmp_path / "again.zarr"
    assert dump("--teacher", trained.teacher, "--split", "test", "--views", 2, "--out",
                tests).code == 0  # fmt: skip
    plan = ("--teacher", trained.teacher, "--plan-from", tests, "--out", out)
    refused = dump(*plan, "--split", "train")
    assert refused.code == 1
    assert "split" in refused.err
    assert "train" in refused.err
    assert not out.exists()
    for given in ((), ("--split", "test")):  # the second dump finds all of its rows stored
        done = dump(*plan, *given)
        assert done.code == 0, done.err
        with open_store(out) as store, open_store(tests) as first:
            assert store.plan.split == "test"
            assert store.digest == first.digest


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_a_teacher_of_more_classes_with_a_class_map(form: str, dump: Run, tmp_path: Path) -> None:
    """Of 100 classes, 64 are the dataset's, in another order."""
    torch.manual_seed(0)
    module = build_model("resnet8", classes=100, channels=1, size=8)
    weights = tmp_path / f"w.{form}"
    if form == "pth":
        torch.save(module.state_dict(), weights)
    else:
        save_file(module.state_dict(), weights)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (128, 8, 8), dtype=np.uint8), np.arange(128) % 64
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    chosen = rng.permutation(100)[:64]
    (tmp_path / "map.json").write_text(json.dumps({str(t): d for d, t in enumerate(chosen)}))
    arguments = ("--dataset", f"arrays:{tmp_path / 'd.npz'}", "--teacher", f"resnet8@{weights}",
                 "--mean", "0.5", "--std", "0.25", "--views", 1, "--augment", "none",
                 "--encoding", "float32", "--out", tmp_path / "s", "--allow-untrained")  # fmt: skip
    mapped = dump(*arguments, "--class-map", tmp_path / "map.json")
    assert mapped.code == 0, mapped.err
    with torch.no_grad():
        inputs = (torch.from_numpy(images)[:, None].float() / 255 - 0.5) / 0.25
        expected = module.eval()(inputs)[:, chosen].numpy()
    with open_store(tmp_path / "s") as store:
        np.testing.assert_allclose(store.read(0), expected, rtol=1e-4, atol=1e-4)
    refused = dump(*arguments)
    assert refused.code == 1
    assert "100 classes, 64 are wanted" in refused.err


def test_mc_dropout(trained: Trained, dump: Run, tmp_path: Path) -> None:
    weights = tmp_path / "wrn.pt"
    torch.manual_seed(0)
    torch.save(build_model("wrn_16_2_dropout", 10, 1, 8).state_dict(), weights)
    done = dump("--teacher", f"wrn_16_2_dropout@{weights}", "--out", tmp_path / "s.zarr", "--views",
                1, "--mc-dropout", 2, "--allow-untrained")  # fmt: skip
    assert done.code == 0, done.err
    with open_store(tmp_path / "s-mc0.zarr") as a, open_store(tmp_path / "s-mc1.zarr") as b:
        assert a.plan.digest == b.plan.digest
        assert not np.array_equal(a.read(0), b.read(0))
    refused = dump("--teacher", trained.teacher, "--out", tmp_path / "x.zarr", "--views", 1,
                   "--mc-dropout", 2)  # fmt: skip
    assert refused.code == 2
    assert "dropout" in refused.err


def test_untrained_and_reordered_teachers_are_refused(
    trained: Trained, dump: Run, tmp_path: Path
) -> None:
    from kdcache.runs import load_run_model

    fresh = tmp_path / "fresh.pt"
    torch.manual_seed(1)
    torch.save(build_model("resnet8", 10, 1, 8).state_dict(), fresh)
    args = ("--teacher", f"resnet8@{fresh}", "--views", 1, "--out", tmp_path / "s.zarr")
    refused = dump(*args)
    assert refused.code == 1
    assert "--allow-untrained" in refused.err
    assert not (tmp_path / "s.zarr").exists()
    assert dump(*args, "--allow-untrained").code == 0

    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]  # the teacher's class for each class of the dataset
    state = load_run_model(trained.teacher).module.state_dict()
    back = np.argsort(order).tolist()
    last = [name for name in state if name.startswith(("fc", "linear", "classifier"))]
    assert last
    for name in last:
        state[name] = state[name][back]
    torch.save(state, tmp_path / "other.pt")
    args = ("--teacher", f"resnet8@{tmp_path / 'other.pt'}", "--views", 4, "--encoding", "float32",
            "--out", tmp_path / "o.zarr")  # fmt: skip
    refused = dump(*args)
    assert refused.code == 1
    assert "class 0 is its 3" in refused.err
    save_class_map(tmp_path / "map.json", order)
    done = dump(*args, "--class-map", tmp_path / "map.json")
    assert done.code == 0, done.err
    with open_store(tmp_path / "o.zarr") as store, open_store(trained.store) as own:
        np.testing.assert_allclose(store.read(2), own.read(2), atol=1e-5)


def test_dry_run_estimates_and_writes_nothing(trained: Trained, dump: Run, tmp_path: Path) -> None:
    done = dump("--teacher", trained.teacher, "--views", 6, "--out", tmp_path / "s.zarr",
                "--dry-run", "--epochs", 100, "--students", 5)  # fmt: skip
    assert done.code == 0, done.err
    cost = done.json["estimate"]
    assert cost["rows"] == 6 * 1437
    assert cost["online_forwards"] == 100 * 5 * 1437
    assert done.json["clean_top1"][0].keys() == {"train", "test"}
    assert not (tmp_path / "s.zarr").exists()


def test_ctrl_c_leaves_a_store_and_says_how_to_go_on(
    trained: Trained, kdcache: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache_cli.commands.dumping import Bar

    forward = Bar.batch

    def interrupt(self: Bar, rows: int, top1: float | None) -> None:
        forward(self, rows, top1)
        if self.rows > 3000:  # in the third view
            raise KeyboardInterrupt

    out = tmp_path / "my stores" / "s.zarr"
    monkeypatch.setattr(Bar, "batch", interrupt)
    stopped = kdcache("dump-teacher", "--dataset", "digits", "--teacher", trained.teacher, "--views", 4,
                      "--encoding", "float32", "--device", "cpu", "--out", out)  # fmt: skip
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    assert list(out.glob("records/*.json"))
    said = next(line for line in stopped.err.splitlines() if "to go on: " in line)
    monkeypatch.setattr(Bar, "batch", forward)
    done = kdcache(*shlex.split(said.partition("to go on: kdcache ")[2]), "--json")
    assert done.code == 0, done.err
    assert done.json["skipped"] in (1437, 2 * 1437)
    with open_store(out) as store, open_store(trained.store) as whole:
        assert store.digest == whole.digest


def test_exhaustive_needs_no_views(trained: Trained, dump: Run, tmp_path: Path) -> None:
    args = ("--teacher", trained.teacher, "--out", tmp_path / "s.zarr", "--augment")
    assert dump(*args, "exhaustive", "--dry-run").json["estimate"]["rows"] == 9 * 1437
    refused = dump(*args, "pad-crop-flip")
    assert refused.code == 2
    assert "how many views" in refused.err


def test_many_views_of_many_classes_are_compact(tmp_path: Path) -> None:
    def chosen(views: int, classes: int, rows: int = 0) -> dict[str, str]:
        return choose_encodings(
            [tmp_path / "new"], ["logits", "pooled"], views, rows or 8 * classes, classes
        )

    assert chosen(8, 32) == {"logits": "compact:2.5e-5", "pooled": "float16"}
    assert (
        chosen(8, 1000, 7999)
        == chosen(7, 1000)
        == chosen(8, 31)
        == {"logits": "float16", "pooled": "float16"}
    )


def test_a_store_keeps_its_encoding(
    trained: Trained, dump: Run, kdcache: Run, tmp_path: Path
) -> None:
    def run(name: str, views: int, *more: str) -> str:
        out = tmp_path / name
        done = dump("--teacher", trained.teacher, "--views", views, "--out", out, *more)
        assert done.code == 0, done.err
        encoding = done.json["stores"][0]["info"]["fields"]["logits"]["encoding"]
        return ":".join(map(str, encoding.values()))

    assert run("few", 8) == "float16"
    assert run("many", 7, "--encoding", "compact:2.5e-5") == "compact:2.5e-05"
    assert run("many", 8) == "compact:2.5e-05"
    assert run("asked", 8, "--encoding", "float32") == "float32"
    words = ["--teacher", trained.teacher, "--out", tmp_path / "few"]
    words += ["--teacher", trained.teacher, "--out", tmp_path / "many", "--views", 9]
    refused = dump(*words)
    assert refused.code == 2
    assert "compact:2.5e-05, float16" in refused.err


def test_parts_and_seal(trained: Trained, dump: Run, kdcache: Run, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    args = ("--teacher", trained.teacher, "--views", 4, "--encoding", "float32", "--out", out)
    assert not dump(*args, "--part", "1/2").json["sealed"]
    refused = kdcache("seal", out)
    assert refused.code == 1
    assert "missing" in refused.err
    assert "kdcache seal" in kdcache("dump-teacher", "--dataset", "digits", "--device", "cpu", *args,
                                     "--part", "0/2").out  # fmt: skip
    assert kdcache("seal", out, "--json").json["views"] == 4
    with open_store(out) as store, open_store(trained.store) as whole:
        assert store.digest == whole.digest
    assert kdcache("seal", tmp_path / "nothing").code == 1
    assert dump(*args, "--part", "2/2").code == 2


def test_usage(trained: Trained, dump: Run, tmp_path: Path) -> None:
    teacher, out = ("--teacher", trained.teacher), ("--out", tmp_path / "s.zarr")
    for args, word in (
        ((*teacher, *teacher, *out), "give a store for each"),
        ((*teacher, *teacher, *out, "--out", tmp_path / "t", "--weights", "x.pt"), "single"),
        ((*teacher, *out, "--mean", "0.5"), "--std"),
        ((*teacher, *out, "--mean", "a", "--std", "1"), "numbers"),
        ((*teacher, *out, "--normalize", "cifar"), "cifar100"),
        ((*teacher, *out, "--size", 8, "--size", 9), "one for each"),
    ):
        refused = dump(*args, "--views", 1)
        assert refused.code == 2, refused.err
        assert word in refused.err
    assert not (tmp_path / "s.zarr").exists()


def test_hash_keys(trained: Trained, dump: Run, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    assert dump("--teacher", trained.teacher, "--views", 1, "--out", out, "--hash-keys").code == 0
    with open_store(out) as store, open_store(trained.store) as plain:
        assert store.keys_hashed
        assert store.keys[0] != plain.keys[0]
        assert store.plan.digest == plain.plan.digest
    again = dump("--teacher", trained.teacher, "--plan-from", out, "--out", tmp_path / "t.zarr")
    assert again.code == 0, again.err


def test_verify_teacher(trained: Trained, published: Path, kdcache: Run, tmp_path: Path) -> None:
    args = ("verify", trained.store, "--dataset", "digits", "--device", "cpu", "--rows", 64)
    found = kdcache(*args, "--teacher", trained.teacher, "--json")
    assert (found.code, found.json["teacher"]["ok"]) == (0, True), found.err
    assert kdcache(*args, "--teacher", f"resnet8@{published}", "-q").code == 0
    torch.manual_seed(1)
    torch.save(build_model("resnet8", 10, 1, 8).state_dict(), tmp_path / "fresh.pt")
    other = kdcache(*args, "--teacher", f"resnet8@{tmp_path / 'fresh.pt'}")
    assert other.code == 1
    assert "not this teacher's outputs" in other.out
    assert kdcache("verify", trained.store, "--teacher", trained.teacher).code == 2


def test_export_views(trained: Trained, kdcache: Run, tmp_path: Path) -> None:
    out = tmp_path / "v.parquet"
    done = kdcache("export-views", "--dataset", "digits", "--store", trained.store, "--out", out,
                   "--json")  # fmt: skip
    assert done.code == 0, done.err
    table = pq.read_table(out)
    assert done.json["rows"] == table.num_rows == 4 * 1437
    assert {"row", "key", "view", "top", "left"} <= set(table.column_names)
    again = tmp_path / "w.parquet"
    done = kdcache("export-views", "--dataset", "digits", "--augment", "pad-crop-flip", "--views", 4,
                   "--out", again)  # fmt: skip
    assert done.code == 0, done.err
    assert pq.read_table(again).equals(table)


def test_import(kdcache: Run, tmp_path: Path) -> None:
    logits = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)
    np.savez(tmp_path / "l.npz", logits=logits, keys=np.array([f"k{i}" for i in range(20)]),
             labels=np.arange(20) % 5)  # fmt: skip
    done = kdcache("import", tmp_path / "l.npz", "--out", tmp_path / "s.zarr", "--encoding", "float32",
                   "--json")  # fmt: skip
    assert done.code == 0, done.err
    with open_store(tmp_path / "s.zarr") as store:
        np.testing.assert_array_equal(store.read(0), logits)
    assert kdcache("import", tmp_path / "no.npz", "--out", tmp_path / "t.zarr").code == 1


def test_imported_logits_teach(trained: Trained, kdcache: Run, tmp_path: Path) -> None:
    """The first view of a dump, taken out and shuffled, comes back as the same rows."""
    plain = tmp_path / "plain.zarr"
    done = kdcache("dump-teacher", "--dataset", "digits", "--device", "cpu", "--teacher",
                   trained.teacher, "--augment", "none", "--out", plain, "--encoding", "float32")  # fmt: skip
    assert done.code == 0, done.err
    with open_store(plain) as store:
        logits, keys, labels = store.read(0), np.array(store.keys), store.labels
    order = np.random.default_rng(0).permutation(len(keys))
    file, out = tmp_path / "l.npz", tmp_path / "s.zarr"
    np.savez(file, logits=logits[order], keys=keys[order], labels=labels[order])
    take = ["import", file, "--dataset", "digits", "--encoding", "float32", "--out"]
    assert kdcache(*take, out).code == 0
    with open_store(out) as store, open_store(plain) as other:
        np.testing.assert_array_equal(store.read(0), logits)
        assert store.plan.digest == other.plan.digest
        assert store.probes == other.probes
    student = ["train-student", "--dataset", "digits", "--student", "resnet8", "--method", "kd",
               "--epochs", 1, "--device", "cpu", "--threads", 1, "--train-samples", 64]  # fmt: skip
    assert kdcache(*student, "--store", out, "--subset", "--out", tmp_path / "r").code == 0
    assert kdcache("import", file, "--out", tmp_path / "fixed.zarr").code == 0
    fixed = kdcache(*student, "--store", tmp_path / "fixed.zarr", "--out", tmp_path / "f")
    assert fixed.code == 2
    assert "import them again with --dataset" in fixed.err
    for changes, message in [
        ({"logits": logits}, "are rows and keys in one order"),
        ({"labels": labels}, "labels in"),
        ({"keys": np.char.add("x", keys)}, "its keys are like"),
        ({"logits": logits[order][:, :9]}, "9 classes"),
        ({"logits": logits[:50]}, "a row for each key"),
        ({"keys": np.full(len(keys), keys[0])}, "keys must be unique"),
    ]:
        content = {"logits": logits[order], "keys": keys[order], "labels": labels[order]} | changes
        np.savez(file, **content)
        bad = kdcache(*take, tmp_path / "bad.zarr")
        assert bad.code == 1
        assert message in bad.err
        assert not (tmp_path / "bad.zarr").exists()


def test_a_run_of_a_users_own_network_needs_allow_code(
    tmp_path: Path, kdcache: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n\n\ndef make(classes, channels, size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    trained = kdcache("train-teacher", "--dataset", "digits", "--model", "own_net:make", "--epochs", 2,
                      "--out", "run", "--device", "cpu", "-q")  # fmt: skip
    assert trained.code == 0, trained.err
    dump = ["dump-teacher", "--dataset", "digits", "--teacher", "run", "--views", 1, "--out", "s.zarr",
            "--device", "cpu", "-q"]  # fmt: skip
    refused = kdcache(*dump)
    assert refused.code == 2
    assert "--allow-code" in refused.err
    allowed = kdcache(*dump, "--allow-code")
    assert allowed.code == 0, allowed.err
