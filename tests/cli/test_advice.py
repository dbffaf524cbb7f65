"""A refusal says what to do, and what it says, done, succeeds."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from kdcache import runs
from kdcache.models.zoo import build_model
from kdcache_stores import open_store
from tests.conftest import Result, Trained

Run = Callable[..., Result]

HERE = "--dataset digits --device cpu"
#: As short as a training can be.
SHORT = f"train-student {HERE} --student resnet8 --epochs 1 --batch-size 16 --train-samples 32 --out OUT"
DUMP = f"dump-teacher {HERE} --teacher TEACHER --out OUT"
KD = f"{SHORT} --method kd --store STORE"

#: (refused, what the refusal says, the same as it then advises). Words in capitals are places.
CHEAP = [
    (f"{DUMP} --views 2 --split tst", r"splits train, test", f"{DUMP} --views 2 --split test --dry-run"),
    (f"{DUMP} --augment pad-crop-flip", r": --views N", f"{DUMP} --augment pad-crop-flip --views 2 --dry-run"),
    (f"{DUMP} --augment none --views 2", r"stored: --views 1", f"{DUMP} --augment none --views 1 --dry-run"),
    (f"{DUMP} --augment weak+strong --views 3", r"--views 4 or another even number",
     f"{DUMP} --augment weak+strong --views 4 --dry-run"),
    (f"{DUMP} --views 2 --encoding pooled=float16", r"for one of them",
     f"{DUMP} --views 2 --encoding logits=float16 --dry-run"),
    (f"dump-teacher {HERE} --teacher resnet8 --out OUT --views 1", r"resnet8@FILE",
     f"dump-teacher {HERE} --teacher resnet8@WEIGHTS --out OUT --views 1 --dry-run"),
    (f"dump-teacher {HERE} --teacher WEIGHTS --out OUT --views 1", r"NETWORK@",
     f"dump-teacher {HERE} --teacher resnet8@WEIGHTS --out OUT --views 1 --dry-run"),
    (f"dump-teacher {HERE} --teacher resnt8@WEIGHTS --out OUT --views 1", r"did you mean 'resnet8'",
     f"dump-teacher {HERE} --teacher resnet8@WEIGHTS --out OUT --views 1 --dry-run"),
    (f"dump-teacher {HERE} --teacher TEACHER --out STORE --views 2 --encoding float32 --seed 1", r"seed",
     f"dump-teacher {HERE} --teacher TEACHER --out STORE --views 6 --encoding float32 --seed 0 --dry-run"),
    (f"evaluate UNTRAINED {HERE}", r"Run its command again to go on", f"evaluate TEACHER {HERE}"),
    ("check", r"give the STORES to check, or a --run", "check STORE"),
    ("check STORE --temperature 2", r"of which --method", "check STORE --temperature 2 --method kd"),
    ("check STORE --train-samples 50", r"give --dataset", f"check STORE --train-samples 50 {HERE}"),
    ("verify STORE --teacher TEACHER", r"--teacher needs --dataset",
     f"verify STORE --teacher TEACHER --rows 8 {HERE}"),
    ("pull STORE OUT --views 2:9", r"holds the views 0:4", "pull STORE OUT --views 2:4"),
    ("pull STORE FULL", r"pull into an empty folder", "pull STORE OUT"),
    ("push STORE FULL", r"push to an empty prefix", "push STORE OUT"),
    ("import TINY --out OUT", r"float32", "import TINY --out OUT --encoding float32"),
    ("inspect TEACHER", r"See it with: kdcache evaluate",
     f"evaluate TEACHER {HERE}"),
    ("inspec STORE", r"did you mean 'inspect'", "inspect STORE"),
    (f"{DUMP} --views 1 --normalise cifar10", r"--normalize", f"{DUMP} --views 1 --dry-run"),
    (f"export-views {HERE.split(' --device')[0]} --views 2 --augment pad-crop --out OUT", r"'pad-crop-flip'",
     "export-views --dataset digits --views 2 --augment pad-crop-flip --out OUT"),
]  # fmt: skip

LONG = [
    ("report --out OUT", r"give runs, or --store", "report TEACHER --out OUT"),
    (f"{SHORT} --method kd", r"at least one --store", KD),
    (f"{SHORT} --method kd", r"--online TEACHER", f"{SHORT} --method kd --online TEACHER"),
    (f"{SHORT} --store STORE", r"give --method", KD),
    (f"{SHORT} --method kdd --store STORE", r"did you mean 'kd'", KD),
    (f"{KD} --resident-views 2", r"--schedule random", f"{KD} --resident-views 2 --schedule random"),
    (f"{KD} --nesterov --momentum 0", r"--momentum above 0", f"{KD} --nesterov --momentum .9"),
    (f"{KD} --views 9", r"the store holds 4 views", f"{KD} --views 4"),
    (f"{KD} --val-split 1.5", r"must be in \[0, 1\)", f"{KD} --val-split .25"),
    (f"{KD} --checkpoint-every often", r"such as 90s", f"{KD} --checkpoint-every 90s"),
    (f"{KD} --alpha .5 --kd-weight 1", r"give it or them", f"{KD} --alpha .5"),
    (f"{SHORT} --method ce --standardize", r"leave out standardize", f"{SHORT} --method ce"),
    (f"{KD} --add ce", r"--ce-weight weighs", f"{KD} --ce-weight .5"),
    (f"{KD} --add dkd:x", r"NAME:WEIGHT", f"{KD} --add dkd:0.5"),
    (f"{KD} --dkd-beta 4", r"option of dkd", f"{KD.replace('kd --store', 'dkd --store')} --dkd-beta 4"),
    (f"{SHORT} --method ofd --store STORE", r"give --online TEACHER", f"{SHORT} --method ofd --online TEACHER"),
    (f"{KD} --eval-every 0", r"at least 1|x>=1", f"{KD} --eval-every 1"),
    (f"{KD} --lr 1e9 --momentum 0", r"lower --lr", f"{KD} --lr .01".replace("OUT", "OTHER")),
]  # fmt: skip


@dataclass(frozen=True)
class Places:
    """Where the words in capitals are."""

    trained: Trained
    folder: Path

    def words(self, line: str) -> list[str]:
        """The command with its places."""
        places = {
            "TEACHER": self.trained.teacher,
            "STORE": self.trained.store,
            "WEIGHTS": self.trained.teacher / runs.WEIGHTS,
            **{name: self.folder / name for name in ("OUT", "OTHER", "FULL", "TINY", "UNTRAINED")},
        }
        return [
            re.sub(r"[A-Z]{3,}", lambda m: str(places[m[0]]), word) for word in shlex.split(line)
        ]


@pytest.fixture
def places(trained: Trained, tmp_path: Path) -> Places:
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL/thesis.tex").touch()
    (tmp_path / "UNTRAINED").mkdir()
    shutil.copy(trained.teacher / runs.CONFIG, tmp_path / "UNTRAINED")
    with open_store(trained.store) as store:
        logits = store.read(0) * np.float32(1e-9)
        np.savez(tmp_path / "TINY.npz", logits=logits, keys=store.keys)
    (tmp_path / "TINY.npz").rename(tmp_path / "TINY")
    return Places(trained, tmp_path)


def check_advice(places: Places, kdcache: Run, refused: str, says: str, advised: str) -> None:
    result = kdcache(*places.words(refused))
    assert result.code in (1, 2), result.err
    said = result.out + result.err
    assert re.search(says, said), said
    result = kdcache(*places.words(advised))
    assert result.code == 0, result.err


@pytest.mark.parametrize(("refused", "says", "advised"), CHEAP)
def test_what_a_refusal_advises_works(
    places: Places, kdcache: Run, refused: str, says: str, advised: str
) -> None:
    check_advice(places, kdcache, refused, says, advised)


@pytest.mark.slow
@pytest.mark.parametrize(("refused", "says", "advised"), LONG)
def test_what_a_training_advises_works(
    places: Places, kdcache: Run, refused: str, says: str, advised: str
) -> None:
    check_advice(places, kdcache, refused, says, advised)


@pytest.mark.slow
def test_another_configuration(places: Places, kdcache: Run) -> None:
    assert kdcache(*places.words(KD)).code == 0
    check_advice(places, kdcache, f"{KD} --lr .02", "Use the old value", KD)
    check_advice(
        places, kdcache, f"{KD} --lr .02", "or another --out", f"{KD} --lr .02 --out OTHER"
    )


@pytest.mark.slow
def test_a_damaged_checkpoint_is_deleted(places: Places, kdcache: Run) -> None:
    assert kdcache(*places.words(KD)).code == 0
    out = places.folder / "OUT"
    (out / runs.SUMMARY).unlink()
    (out / runs.CHECKPOINT).write_bytes(b"x")
    result = kdcache(*places.words(KD))
    assert result.code == 1
    assert "checkpoint.pt cannot be read" in result.err
    assert "delete it to start this run again" in result.err
    (out / runs.CHECKPOINT).unlink()
    assert kdcache(*places.words(KD)).code == 0


@pytest.mark.slow
def test_a_damaged_store_is_repaired_by_its_dump(places: Places, kdcache: Run) -> None:
    dump = f"{DUMP} --views 2 --encoding float32"
    assert kdcache(*places.words(dump)).code == 0
    shard = next(f for f in (places.folder / "OUT/logits/values/c").rglob("*") if f.is_file())
    shard.write_bytes(b"x" * shard.stat().st_size)
    check_advice(places, kdcache, "verify OUT", "run again with --repair", f"{dump} --repair")
    assert kdcache(*places.words("verify OUT")).code == 0


@pytest.mark.slow
def test_parts_and_the_commands_that_a_dump_prints(
    places: Places, kdcache: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`seal` once all parts are done, and the student's command behind "next:"."""
    monkeypatch.chdir(places.folder)
    dump = f"{DUMP} --views 2 --encoding float32 --shard-rows 500"
    first = kdcache(*places.words(f"{dump} --part 0/2"))
    assert first.code == 0
    (seal,) = re.findall(r"when all 2 parts are: kdcache (.*)", first.out)
    early = kdcache(*shlex.split(seal))
    assert early.code == 1
    assert "write them before sealing" in early.err
    assert kdcache(*places.words(f"{dump} --part 1/2")).code == 0
    assert kdcache(*shlex.split(seal)).code == 0
    again = kdcache(*places.words(dump))
    (following,) = re.findall(r"next: kdcache (.*)", again.out)
    words = [
        *shlex.split(following),
        "--epochs",
        "1",
        "--train-samples",
        "32",
        "--batch-size",
        "16",
    ]
    result = kdcache(*words, "--device", "cpu")
    assert result.code == 0, result.err


@pytest.mark.slow
def test_stores_of_other_plans_and_splits(places: Places, kdcache: Run) -> None:
    state = safetensors.torch.load_file(places.trained.teacher / runs.WEIGHTS)
    other_weights = places.folder / "other.safetensors"
    safetensors.torch.save_file(
        {name: 1.01 * value for name, value in state.items()}, other_weights
    )
    dump = DUMP.replace("--teacher TEACHER", f"--teacher resnet8@{other_weights}")
    other = f"{dump} --views 4 --encoding float32 --seed 9"
    assert kdcache(*places.words(other)).code == 0
    both = f"{KD} --store OUT".replace("--out OUT", "--out OTHER")
    result = kdcache(*places.words(both))
    assert result.code == 1
    assert "--plan-from" in result.err
    shutil.rmtree(places.folder / "OUT")
    planned = f"{dump} --views 4 --encoding float32 --plan-from STORE"
    result = kdcache(*places.words(planned))
    assert result.code == 0, result.err
    assert kdcache(*places.words(both)).code == 0
    shutil.rmtree(places.folder / "OTHER")
    zscores = f"{both} --combine mean-zscores"
    check_advice(places, kdcache, zscores, "add standardize", f"{zscores} --standardize")
    shutil.rmtree(places.folder / "OUT")
    evaluate = f"evaluate TEACHER --store STORE {HERE}"
    assert "Dump the teacher with --split test" in kdcache(*places.words(evaluate)).err
    assert kdcache(*places.words(f"{DUMP} --split test --views 1 --augment none")).code == 0
    assert kdcache(*places.words(evaluate.replace("STORE", "OUT"))).code == 0


@pytest.mark.slow
def test_imported_logits_are_imported_again_with_their_dataset(
    places: Places, kdcache: Run
) -> None:
    with open_store(places.trained.store) as store:
        np.savez(places.folder / "logits.npz", logits=store.read(0), keys=store.keys)
    file = places.folder / "logits.npz"
    assert kdcache("import", file, "--out", places.folder / "A").code == 0
    words = [
        str(places.folder / "A") if word.endswith("teacher.zarr") else word
        for word in places.words(KD)
    ]
    result = kdcache(*words)
    assert result.code
    assert "import them again with --dataset NAME" in result.err
    assert kdcache("import", file, "--out", places.folder / "B", "--dataset", "digits", "--augment",
                   "none").code == 0  # fmt: skip
    words = [
        str(places.folder / "B") if word == str(places.folder / "A") else word for word in words
    ]
    result = kdcache(*words)
    assert result.code == 0, result.err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fitnet", "at"])
def test_fields_that_a_method_needs_are_dumped(places: Places, kdcache: Run, method: str) -> None:
    train = KD.replace("--method kd", f"--method {method}").replace("OUT", "OTHER")
    result = kdcache(*places.words(train))
    assert result.code
    fields = re.findall(r"--fields ([a-z0-9@,:_]+[a-z0-9])", result.err)[0]
    dumped = kdcache(*places.words(f"{DUMP} --views 4 --fields {fields}"))
    assert dumped.code == 0, dumped.err
    result = kdcache(*places.words(f"{train} --store OUT"))
    assert result.code == 0, result.err


def test_a_pickled_network_becomes_weights(places: Places, kdcache: Run) -> None:
    """The line of Python that the refusal gives, run as it stands."""
    module = build_model("resnet8", 10, 1, 8)
    module.load_state_dict(runs.load_run_model(places.trained.teacher).module.state_dict())
    file = places.folder / "whole.pt"
    torch.save(module, file)
    dump = f"dump-teacher {HERE} --views 1 --out OUT --dry-run --teacher"
    result = kdcache(*places.words(dump), f"resnet8@{file}")
    assert result.code
    (line,) = re.findall(r"(content = torch\.load\(.*?'weights\.pt'\))", result.err)
    line = line.replace("FILE", repr(str(file))).replace(
        "'weights.pt'", repr(str(places.folder / "w.pt"))
    )
    exec(line, {"torch": torch})
    result = kdcache(*places.words(dump), f"resnet8@{places.folder / 'w.pt'}")
    assert result.code == 0, result.err


@pytest.mark.slow
def test_a_finding_goes_with_its_remedy(places: Places, kdcache: Run) -> None:
    shutil.copytree(places.trained.store, places.folder / "OUT")
    advice = re.search(
        r"Remedy: dump-teacher --views (\d+).*\[few-views\]",
        kdcache("check", places.folder / "OUT").out,
    )
    assert advice is not None
    dump = f"{DUMP} --encoding float32 --views {advice[1]}"
    assert kdcache(*places.words(dump)).code == 0
    assert "[few-views]" not in kdcache("check", places.folder / "OUT").out
