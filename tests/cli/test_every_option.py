"""Every option of every command arrives: another value changes what the command asks of the library.

The library's functions are replaced by ones that note how they are called; those named in ``ends`` also
end the command there. An option that takes a text or a number gets one that click accepts; `VALUES`
holds what click cannot know.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock, NonCallableMagicMock

import click
import pytest

from kdcache.methods.record import Method, Option
from kdcache.methods.table import METHODS
from kdcache.runs import read_config
from kdcache_cli.app import COMMANDS, app
from kdcache_cli.options import deal
from tests.conftest import Result, Trained

PRINTING = {
    "as_json": "the form of the result",
    "quiet": "no progress and no page",
    "debug": "the traceback of an error",
    "verbose": "the length of the page",
}

Calls = list[Any]


def stand_in(**attributes: Any) -> Any:
    """An object of the library that does nothing."""
    return NonCallableMagicMock(**attributes)


class End(Exception):
    """The command has made its last call; what would follow is the work."""


@dataclass(frozen=True)
class Case:
    """A command with what it needs, and the functions of the library that it calls.

    Attributes:
        words: arguments without which it does not run.
        ends: noted, then the command ends.
        noted: noted, with the value to give.
        plain: replaced and not noted.
    """

    words: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    noted: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)


OPEN = "kdcache_stores:open_store"
RECIPE_STORE = "kdcache.training.settings:open_store"
LOAD = "kdcache.data.loading:DatasetSource.load"


def end(*args: Any, **kwargs: Any) -> None:
    raise End


#: A dump whose `run` is the last call.
PREPARED = stand_in(**{"__enter__.return_value.run": end, "__enter__.return_value.targets": []})

CASES = {
    "demo": Case(ends=("kdcache.demo:steps",)),
    "train-teacher": Case(
        ("--dataset", "digits", "--model", "resnet8", "--out", "run"),
        ("kdcache.training.preparation:train_together",),
    ),
    "dump-teacher": Case(
        ("--dataset", "digits", "--teacher", "t", "--out", "s.zarr"),
        noted={"kdcache.dumping.job:prepare_dump": PREPARED},
        plain={"kdcache_cli.dump_page:before": None, "kdcache_cli.dump_page:command_line": "the command"},
    ),
    "seal": Case(("s.zarr",), ("kdcache_stores:reopen",)),
    "train-student": Case(
        ("--dataset", "digits", "--student", "resnet8", "--method", "kd", "--store", "s.zarr",
         "--out", "run"),
        ("kdcache.training.preparation:train_together", "kdcache.training.generations:born_again"),
        plain={RECIPE_STORE: stand_in(), "kdcache_cli.student_runs:_tables": [{"method": "dkd"}]},
    ),
    "check": Case(
        ("s.zarr", "--method", "kd"),
        noted={
            "kdcache.checks.check:check_stores": [stand_in()],
            "kdcache.checks.check:CheckRequest.of_run": None,
        },
        plain={RECIPE_STORE: stand_in()},
    ),
    "evaluate": Case(
        ("run", "--dataset", "digits"),
        ("kdcache.evaluation.measured:evaluate",),
    ),
    "compare": Case(
        ("run", "int8.onnx", "--dataset", "digits"),
        ("kdcache.report.sections.comparison_section:write_comparison",),
        noted={"kdcache.evaluation.comparison:compare": {
            "dataset": "digits", "split": "test", "samples": 1, "threads": 1,
            "networks": [{"latency": {}}],
        }},
        plain={f"kdcache_cli.commands.evaluating:{name}": None for name in ("_compared", "show_table")},
    ),
    "export": Case(
        ("run",),
        ("kdcache.deploying.deploy:export", "kdcache.deploying.int8:export_int8"),
        {"kdcache.runs:load_run_model": stand_in(config={"data": {"name": "digits"}})},
    ),
    "report": Case(("run", "--out", "page"), ("kdcache.report.building:report",)),
    "bench": Case(noted={
        "kdcache.bench.claims:bench": {}, "kdcache_cli.options:resolve_device": "device",
    }),
    "inspect": Case(("s.zarr",), (OPEN,)),
    "verify": Case(
        ("s.zarr", "--teacher", "t", "--dataset", "digits"),
        ("kdcache.dumping.recheck:recheck_store",),
        {OPEN: stand_in()},
        {"kdcache_stores:verify": stand_in(ok=True)},
    ),
    "import": Case(
        ("logits.npz", "--out", "s.zarr", "--dataset", "digits"),
        ("kdcache_stores:import_npz", "kdcache.dumping.imported:import_for"),
        {LOAD: stand_in(remarks=[])},
        {"kdcache_cli.commands.making:command_line": "the command"},
    ),
    "export-views": Case(
        ("--dataset", "digits", "--out", "views.parquet"),
        ("kdcache.views.export:write_parameters",),
        {"kdcache.dumping.plans:choose_plan": (stand_in(), 4)},
    ),
    "push": Case(("s.zarr", "there"), ("kdcache_stores.share.push:push_store",)),
    "pull": Case(("there", "s.zarr"), ("kdcache_stores.share.pull:pull_store",)),
    "ls": Case((), ("kdcache_stores.share.store_list:list_stores",)),
    "diff": Case(("a", "b"), (OPEN,)),
    "card": Case(("s.zarr",), ("kdcache_stores.share.card:write_card",)),
    "cache": Case(
        (), ("kdcache_stores.objects.cache:ObjectCache.clear", "kdcache_stores.objects.cache:ObjectCache.state")
    ),
    "list": Case(("models",)),
}  # fmt: skip


@dataclass(frozen=True)
class Value:
    """Two ways to call the command that differ in one option.

    Attributes:
        words: with the option; after the words of the case.
        beside: what the option needs beside it; without the option.
        alone: leave out the words of the case.
    """

    words: tuple[str, ...]
    beside: tuple[str, ...] = ()
    alone: bool = False


def value(words: str, beside: str = "", alone: bool = False) -> Value:
    return Value(tuple(words.split()), tuple(beside.split()), alone)


def of_method(method: Method, option: Option, besides: str = "") -> Value:
    flag = f"--{method.flag(option).replace('_', '-')}"
    other = next((choice for choice in option.choices if choice != option.default), None)
    changed = other or type(option.default)(float(option.default) + 1)
    named = "" if method.name == "kd" else f"--method {method.name}"  # that of the cases
    named = f"{named} {besides}".strip()
    return value(f"{named} {flag} {changed}", named)


#: By option, and where a command's differs by "command option".
VALUES = {
    "--alpha": value("--alpha 0.5"),
    "--augment": value("--augment own.views:crop"),
    "--cache-size": value("--cache-size 2GB"),
    "--ablation": value("--ablation target-only"),
    "--add": value("--add dkd"),
    "--combine": value("--combine mean-probs"),
    "train-student --combine": value("--store t.zarr --combine mean-probs", "--store t.zarr"),
    "train-student --teacher-weights": value("--store t.zarr --teacher-weights 2,1", "--store t.zarr"),
    "train-student --resident-views": value("--schedule random --resident-views 3", "--schedule random"),
    "check --data-root": value("--dataset digits --data-root there", "--dataset digits"),
    "check --download": value("--dataset digits --download", "--dataset digits"),
    "check --seed": value("--dataset digits --seed 3", "--dataset digits"),
    "check --subset": value("--dataset digits --subset", "--dataset digits"),
    "evaluate --augment": value("--store s.zarr --augment own.views:crop", "--store s.zarr"),
    "compare --augment": value("--store s.zarr --augment own.views:crop", "--store s.zarr"),
    "compare --batch-size": value("--batch-size 3"),
    "--device": value("--device cpu:0"),
    "--ema": value("--ema 0.9"),
    "--image-column": value("--dataset hf:a --image-column x", "--dataset hf:a"),
    "--label-column": value("--dataset hf:a --label-column x", "--dataset hf:a"),
    "--lr-schedule": value("--lr-schedule cosine"),
    "--mean": value("--mean 0.4 --std 0.2", "--mean 0.5 --std 0.2"),
    "--method": value("--method dkd"),
    "--milestones": value("--milestones 0.5,0.7"),
    "--noise": value("--noise gaussian:0.1"),
    "--normalize": value("--normalize cifar10"),
    "--optimizer": value("--optimizer adamw"),
    "--part": value("--part 1/4"),
    "--precision": value("--precision bf16"),
    "--prune": value("--prune structured:0.5"),
    "--prune-by": value("--prune structured:0.5 --prune-by gradient", "--prune structured:0.5"),
    "--prune-epochs": value("--prune structured:0.5 --prune-epochs 3", "--prune structured:0.5"),
    "--recipe": value("--recipe cifar100/kd-ls", "--recipe cifar100/kd"),
    "--schedule": value("--schedule random"),
    "--std": value("--mean 0.5 --std 0.3", "--mean 0.5 --std 0.2"),
    "--teacher-weights": value("--teacher-weights 2,1"),
    "dump-teacher --out": value("--teacher u --out v.zarr", "--teacher u --out w.zarr"),
    "dump-teacher --teacher": value("--teacher u --out v.zarr", "--teacher t --out v.zarr"),
    "bench --out": value("--out found.json"),
    "check --run": value("s.zarr --run run", "s.zarr", alone=True),
    "check --recipe": value("s.zarr --recipe cifar100/kd-ls", "s.zarr --recipe cifar100/kd",
                            alone=True),
    "export --format": value("--format onnx"),
    "export --quantize": value("--format onnx --quantize int8", "--format onnx"),
} | {
    f"export {flag}": value(f"--format onnx --quantize int8 {flag} {text}", "--format onnx --quantize int8")
    for flag, text in {"--calibration": "9", "--store": "s.zarr", "--data-root": "there"}.items()
} | {
    "export --augment": value(
        "--format onnx --quantize int8 --store s.zarr --augment own.views:crop",
        "--format onnx --quantize int8 --store s.zarr",
    ),
    "pull --views": value("--views 1:3"),
} | {
    f"--{method.flag(option).replace('_', '-')}": of_method(method, option)
    for method in METHODS.values()
    for option in method.options
} | {
    f"train-student --{method.flag(option).replace('_', '-')}": of_method(method, option, "--online t")
    for method in METHODS.values() if method.online
    for option in method.options
}  # fmt: skip


def options_of(command: str) -> list[click.Option]:
    found = app.get_command(click.Context(app), command)
    assert found is not None
    return [param for param in found.params if isinstance(param, click.Option)]


def invented(option: click.Option) -> Value:
    """The option with a value that it does not have by default."""
    flag = max(option.opts, key=len)
    if option.is_flag:
        return Value((flag,))
    default = option.get_default(click.Context(click.Command("")))
    number = default if isinstance(default, (int, float)) else 0
    if isinstance(option.type, click.IntRange):
        return Value((flag, str(number + 3)))
    if isinstance(option.type, click.types.FloatParamType):
        return Value((flag, str(number + 0.25)))
    assert isinstance(option.type, (click.types.StringParamType, click.Path)), option.type
    return Value((flag, "another"))


def plain(thing: Any) -> Any:
    """What a call was given, in values that can be compared; objects by their type."""
    if is_dataclass(thing) and not isinstance(thing, type):
        return type(thing).__name__, {f.name: plain(getattr(thing, f.name)) for f in fields(thing)}
    if isinstance(thing, dict):
        return {key: plain(item) for key, item in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [plain(item) for item in thing]
    if isinstance(thing, (str, int, float, Path, range, type(None))):
        return thing
    return type(thing).__name__


def replaced(patch: pytest.MonkeyPatch, name: str, function: Callable[..., Any]) -> None:
    module, _, path = name.partition(":")
    owner: Any = import_module(module)
    *within, last = path.split(".")
    for part in within:
        owner = getattr(owner, part)
    assert hasattr(owner, last), f"{name} is not there any more"
    patch.setattr(owner, last, function)


@contextmanager
def noting(case: Case, calls: Calls) -> Iterator[None]:
    """The library replaced by the case's functions."""

    def noted(name: str, result: Any) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, plain(args), plain(kwargs)))
            if name in case.ends:
                raise End
            return result

        return function

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCACHE_CACHE_SIZE", "1GB")
        replaced(patch, "torch:set_num_threads", noted("torch:set_num_threads", None))
        for name in case.ends:
            replaced(patch, name, noted(name, None))
        for name, result in case.noted.items():
            replaced(patch, name, noted(name, result))
        for name, result in case.plain.items():
            replaced(patch, name, Mock(return_value=result))
        yield


def run(command: str, words: tuple[str, ...], folder: Path) -> Calls:
    """What a command does: its calls, its exit code, the files that it writes itself, the cache's size."""
    calls: Calls = []
    with noting(CASES[command], calls), pytest.MonkeyPatch.context() as patch:
        folder.mkdir()
        patch.chdir(folder)
        try:
            calls.append(app.main([command, *words, "-q"], standalone_mode=False))
        except End:
            calls.append("ended")
        files = sorted(file.name for file in folder.iterdir())
        return [*calls, files, os.environ["KDCACHE_CACHE_SIZE"]]


EVERY = [
    (command, max(option.opts, key=len))
    for command in COMMANDS
    for option in options_of(command)
    if option.name not in PRINTING
]


@pytest.mark.parametrize(("command", "flag"), EVERY)
def test_another_value_changes_the_call(command: str, flag: str, tmp_path: Path) -> None:
    (option,) = (option for option in options_of(command) if flag in option.opts)
    how = VALUES.get(f"{command} {flag}") or VALUES.get(flag) or invented(option)
    assert flag in how.words
    first = () if how.alone else CASES[command].words
    without = run(command, (*first, *how.beside), tmp_path / "without")
    assert run(command, (*first, *how.words), tmp_path / "with") != without


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_else_changes_the_call(command: str, tmp_path: Path) -> None:
    """The same twice is the same, so the difference above is the option's; and the calls are seen."""
    words = CASES[command].words
    first, again = (run(command, words, tmp_path / name) for name in ("first", "again"))
    assert first == again
    assert any(isinstance(call, tuple) for call in first) or command == "list"


def test_what_only_prints_is_everywhere() -> None:
    for command in COMMANDS:
        assert PRINTING.keys() - {"verbose"} <= {option.name for option in options_of(command)}


def test_the_table_of_values_names_options() -> None:
    named = {*EVERY}
    flags = {flag for _, flag in named}
    for name in VALUES:
        command, _, flag = name.rpartition(" ")
        assert (command, flag) in named if command else flag in flags


def test_the_schedule_of_the_views_is_not_that_of_the_rate(
    trained: Trained, tmp_path: Path, kdcache: Callable[..., Result]
) -> None:
    done = kdcache("train-student", "--store", trained.store, "--dataset", "digits", "--student", "resnet8",
                   "--recipe", "cifar100/kd-ls", "--schedule", "random", "--resident-views", 2,
                   "--lr-schedule", "cosine", "--epochs", 1, "--train-samples", 64, "--device", "cpu",
                   "--out", tmp_path / "run")  # fmt: skip
    assert done.code == 0, done.err
    config = read_config(tmp_path / "run")
    assert (config["data"]["schedule"], config["data"]["resident_views"]) == ("random", 2)
    assert config["training"]["lr_schedule"] == "cosine"


@dataclass(frozen=True)
class Steps:
    epochs: int = 1
    schedule: str = "step"


@dataclass(frozen=True)
class Views:
    count: int = 1


@dataclass(frozen=True)
class Shares(Views):
    schedule: str = "epoch"


def test_options_are_dealt_out_by_name() -> None:
    assert deal({"epochs": 3, "count": 2}, Steps, Views) == [{"epochs": 3}, {"count": 2}]
    with pytest.raises(TypeError, match="Steps and Shares both have schedule"):
        deal({"epochs": 3, "count": 2}, Steps, Shares)
    with pytest.raises(TypeError, match="no field for the options lr_schedule"):
        deal({"epochs": 3, "lr_schedule": "step"}, Steps, Views)
