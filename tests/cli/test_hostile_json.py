"""Whatever the documents of a store or a run hold: no traceback, and an error names them."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.runs import CHECKPOINT, CONFIG, METRICS, SUMMARY, WEIGHTS
from kdcache_stores.format.canonical_json import parse_json
from kdcache_stores.format.records import read_probes
from kdcache_stores.format.tables import write_table
from tests.cli.hostile_json import TOKENS, documents, forge, forged, nodes
from tests.conftest import Result, Trained
from tests.stores.hostile import reseal

Run = Callable[..., Result]
HERE = ["--dataset", "digits", "--device", "cpu"]
FEW = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MANY = settings(
    max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Place:
    """What is sound, and where forgeries and what is made of them go."""

    trained: Trained
    student: Path
    folder: Path

    @property
    def forged(self) -> Path:
        return self.folder / "forged"

    @property
    def training(self) -> list[str]:
        return ["train-student", "--student", "resnet8", "--method", "kd", "--store", str(self.trained.store),
                "--epochs", "2", "--batch-size", "32", "--train-samples", "32", *HERE]  # fmt: skip

    def commands(self, kind: str) -> dict[str, list[Any]]:
        """What reads a store, or a run, by name."""
        forged, out, teacher = self.forged, self.folder / "out", self.trained.teacher
        if kind == "run":
            return {
                "report": ["report", forged, "--out", out],
                "check": ["check", "--run", forged],
                "evaluate": ["evaluate", forged, *HERE],
                "export": ["export", forged, "--out", out / "m", "--format", "safetensors"],
                "again": [*self.training, "--out", forged],
                "resume": [*self.training, "--out", forged],
                "baseline": [*self.training, "--out", out / "run", "--baseline", forged],
                "dump": [
                    "dump-teacher",
                    "--teacher",
                    forged,
                    "--views",
                    "1",
                    "--allow-untrained",
                    "--out",
                    out,
                    "--dry-run",
                    *HERE,
                ],
            }
        train = [forged if word == str(self.trained.store) else word for word in self.training]
        return {
            "inspect": ["inspect", forged],
            "json": ["inspect", forged, "--json"],
            "verify": ["verify", forged],
            "recheck": ["verify", forged, "--teacher", teacher, "--rows", "4", *HERE],
            "ls": ["ls", self.folder],
            "diff": ["diff", self.trained.store, forged],
            "check": ["check", forged],
            "check a student": ["check", forged, "--student", "resnet8", "--method", "kd", *HERE],
            "card": ["card", forged],
            "pull": ["pull", forged, out],
            "push": ["push", forged, out],
            "estimate": ["dump-teacher", "--teacher", teacher, "--views", "6", "--encoding", "float32",
                         "--out", forged, "--dry-run", *HERE],
            "evaluate": ["evaluate", teacher, "--store", forged, "--split", "train", *HERE],
            "train": [*train, "--out", out],
            "report": ["report", "--store", forged, "--out", out],
        }  # fmt: skip


@pytest.fixture(scope="module")
def place(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Place:
    from kdcache_cli import main

    folder = tmp_path_factory.mktemp("hostile")
    made = Place(trained, folder / "student", tmp_path_factory.mktemp("work"))
    assert main([*made.training, "--out", str(made.student), "--quiet"]) == 0
    return made


def try_command(place: Place, kdcache: Run, kind: str, name: str) -> Result:
    shutil.rmtree(place.folder / "out", ignore_errors=True)
    result = kdcache(*place.commands(kind)[name])
    assert result.code in (0, 1, 2)
    # A run may name a store or a data set that there is not: that is what its error names.
    other = kind == "run" and re.search(
        r"cannot read|null|kdcache store|dataset|name is longer", result.err
    )
    if "rror: " in result.err and not other:
        assert place.forged.name in result.err, result.err
    return result


def drawn_forgery(data: st.DataObject, document: Any) -> str:
    at = data.draw(st.sampled_from(list(nodes(document))), "place")
    return forged(document, at, data.draw(st.sampled_from([*TOKENS, "+", "-"]), "change"))


def check_a_store(place: Place, kdcache: Run, data: st.DataObject, left_out: set[str]) -> None:
    found = documents(place.trained.store)
    # Most of what decides anything later than at opening is in the root.
    key = data.draw(st.sampled_from(["zarr.json", "zarr.json", *found]), "document")
    forge(place.trained.store, place.forged, key, drawn_forgery(data, found[key]))
    names = place.commands("store").keys() - left_out
    try_command(place, kdcache, "store", data.draw(st.sampled_from(sorted(names)), "command"))


def check_a_run(place: Place, kdcache: Run, data: st.DataObject, left_out: set[str]) -> None:
    names = place.commands("run").keys() - left_out
    name = data.draw(st.sampled_from(sorted(names)), "command")
    shutil.rmtree(place.forged, ignore_errors=True)
    shutil.copytree(place.student, place.forged)
    if name == "resume":
        (place.forged / SUMMARY).unlink()
        (place.forged / WEIGHTS).unlink()
    config = tomllib.loads((place.forged / CONFIG).read_text())
    if name == "baseline":
        config["objective"]["method"] = "ce"
    file = data.draw(st.sampled_from([CONFIG, SUMMARY, METRICS, CHECKPOINT]), "file")
    if file == METRICS:
        lines = [json.loads(line) for line in (place.forged / METRICS).read_text().splitlines()]
        text = drawn_forgery(data, lines[0]) + "\n" + json.dumps(lines[1]) + "\n"
        (place.forged / METRICS).write_text(text, errors="surrogatepass")
    elif file == SUMMARY:
        summary = json.loads((place.student / SUMMARY).read_text())
        (place.forged / file).write_text(drawn_forgery(data, summary), errors="surrogatepass")
    elif file == CHECKPOINT:
        state = torch.load(place.student / CHECKPOINT, weights_only=True)
        key = data.draw(st.sampled_from(sorted(state)), "key")
        state[key] = data.draw(st.sampled_from([None, -1, 10**6, "x", [], [[]], {}, torch.ones(3)]))
        torch.save(state, place.forged / CHECKPOINT)
    with suppress(ValueError, TypeError, AttributeError):  # JSON that TOML has no word for
        if file == CONFIG:
            config = json.loads(drawn_forgery(data, config))
        (place.forged / CONFIG).write_text(tomli_w.dumps(config))
    try_command(place, kdcache, "run", name)


@FEW
@given(st.data())
def test_a_store_of_any_documents(place: Place, kdcache: Run, data: st.DataObject) -> None:
    check_a_store(place, kdcache, data, {"report", "train", "estimate"})


@FEW
@given(st.data())
def test_a_run_of_any_documents(place: Place, kdcache: Run, data: st.DataObject) -> None:
    check_a_run(place, kdcache, data, {"report", "baseline", "evaluate", "dump"})


@pytest.mark.slow
@pytest.mark.timeout(3000)
@MANY
@given(st.data())
def test_many_stores_of_any_documents(place: Place, kdcache: Run, data: st.DataObject) -> None:
    check_a_store(place, kdcache, data, set())


@pytest.mark.slow
@pytest.mark.timeout(3000)
@MANY
@given(st.data())
def test_many_runs_of_any_documents(place: Place, kdcache: Run, data: st.DataObject) -> None:
    check_a_run(place, kdcache, data, set())


CASES = [
    ("attributes.kdcache.teacher.preprocessing.mean", '["x"]', "recheck", "finite numbers"),
    (
        "attributes.kdcache.teacher.preprocessing.std",
        "[1e308, 1]",
        "recheck",
        "one mean and one std",
    ),
    ("attributes.kdcache.teacher.preprocessing.class_map", '[0, "1"]', "recheck", "10 classes"),
    ("attributes.kdcache.teacher.preprocessing.dropout_seed", "[[]]", "recheck", "a number from 0"),
    ("attributes.kdcache.teacher.preprocessing.size", "2147483648", "recheck", "a size of 1 to"),
    ("attributes.kdcache.teacher.precision", '"x"', "recheck", "unknown precision"),
    ("attributes.kdcache.teacher.clean_top1", '{"test": 2}', "inspect", "clean_top1"),
    ("attributes.kdcache.plan.augmentation.padding", "null", "train", "padding as int"),
    ("attributes.kdcache.plan.augmentation", "{}", "train", "a table with a name"),
    ("attributes.kdcache.plan.class_names", '["a"]', "inspect", "class_names"),
    ("attributes.kdcache.plan.seed", "1e400", "inspect", "beyond float64"),
    ("attributes.kdcache.provenance.versions", '"torch"', "train", "versions must be"),
    ("attributes.kdcache.provenance.versions.torch", "[]", "train", "must be text"),
    ("attributes.kdcache.provenance.time", "{}", "card", "must be text"),
]


@pytest.mark.parametrize(("at", "token", "command", "words"), CASES)
def test_each_is_named(
    place: Place, kdcache: Run, at: str, token: str, command: str, words: str
) -> None:
    whole = place.trained.store
    document = parse_json((whole / "zarr.json").read_bytes(), "root")
    parent: Any = document
    *path, last = at.split(".")
    for part in path:
        parent = parent[part]
    parent.setdefault(last, None)
    forge(whole, place.forged, "zarr.json", forged(document, tuple(at.split(".")), token))
    result = try_command(place, kdcache, "store", command)
    assert result.code == 1, result.err
    assert words in result.err


@pytest.mark.parametrize("change", [{"row": -1}, {"row": 2**40}, {"view": 9}, {"coarse": b""},
                                    {"coarse": b"x" * 999}, {"sha256": ""}])  # fmt: skip
def test_probes_of_nothing(place: Place, kdcache: Run, change: dict[str, Any]) -> None:
    shutil.rmtree(place.forged, ignore_errors=True)
    shutil.copytree(place.trained.store, place.forged)
    (file,) = (place.forged / "probes").iterdir()
    rows = [vars(probe) for probe in read_probes(file.read_bytes(), 10**6, "probes")]
    schema = pa.schema([("row", pa.int64()), ("view", pa.int64()), ("sha256", pa.string()),
                        ("coarse", pa.binary())])  # fmt: skip
    file.write_bytes(write_table(pa.Table.from_pylist([row | change for row in rows], schema)))
    reseal(place.forged)
    result = try_command(place, kdcache, "store", "train")
    assert result.code == ("sha256" not in change), result.err
