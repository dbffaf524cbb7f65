"""What commands print and where: results on stdout, the way to them on stderr, no word broken."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import cloup
import pytest
from click.shell_completion import ShellComplete
from rich.console import Console

from kdcache_cli import output
from kdcache_cli.app import COMMANDS, app
from kdcache_cli.groups import GROUPS
from kdcache_cli.names import KINDS, page_of
from kdcache_stores.errors import UnknownName
from tests.conftest import Result, Trained

Run = Callable[..., Result]


def command(name: str) -> cloup.Command:
    found = app.get_command(click.Context(app), name)
    assert isinstance(found, cloup.Command)
    return found


# -- stdout and stderr ----------------------------------------------------------------------------
def test_what_looks_prints_its_result_on_stdout(trained: Trained, kdcache: Run) -> None:
    commands: dict[Sequence[object], str] = {
        ("inspect", trained.store): "content digest",
        ("verify", trained.store): "is whole",
        ("ls", trained.store.parent): "teacher resnet8",
        ("list", "methods"): "dkd",
        ("diff", trained.store, trained.store): "plan: the same",
        ("check", trained.store, "--epochs", 4): "nothing to warn of",
        ("evaluate", trained.teacher, "--dataset", "digits", "--device", "cpu"): "top-1",
    }
    for words, expected in commands.items():
        done = kdcache(*words)
        assert done.code == 0, done.err
        assert expected in done.out
        assert done.err == "" or words[0] == "evaluate"  # which says how it prepares images
        quiet = kdcache(*words, "-q")
        assert quiet.err == ""
        assert quiet.out == ("" if words[0] != "list" else quiet.out)


def test_nothing_is_broken_where_nobody_looks(trained: Trained, kdcache: Run) -> None:
    done = kdcache("inspect", trained.store)
    digest = kdcache("inspect", trained.store, "--json").json["digest"]
    assert re.search(rf"content digest +{digest}$", done.out, re.MULTILINE)
    assert re.search(r"pays off after \d+ student epochs", done.out)


def test_a_dump_ends_with_five_lines(trained: Trained, kdcache: Run, tmp_path: Path) -> None:
    dump = ("dump-teacher", "--dataset", "digits", "--teacher", trained.teacher, "--views", 2,
            "--device", "cpu", "--out")  # fmt: skip
    done = kdcache(*dump, tmp_path / "a.zarr")
    rows, size, top1, fidelity, following = done.out.splitlines()
    assert rows.startswith(f"{tmp_path / 'a.zarr'}: 2,874 rows, 2 views of 1,437 samples; ")
    assert re.fullmatch(r"size: [\d.]+ kB; logits as float16, 20\.0 bytes a row", size)
    assert re.fullmatch(
        r"teacher resnet8, top-1: [\d.]+% ± [\d.]+% on \d+ clean train images, [\d.]+% ± [\d.]+% on \d+ "
        r"clean test images, [\d.]+% of the views",
        top1,
    )
    assert re.fullmatch(
        r"stored logits against live ones: KL \S+ nats at T=1, the same top-1 in .*", fidelity
    )
    assert following.startswith("next: kdcache train-student --store ")
    assert "estimate: 2,874 rows" in done.err
    whole = kdcache(*dump, tmp_path / "b.zarr", "--verbose")
    assert "content digest" in whole.out
    assert "rows written" in whole.out


# -- tables ---------------------------------------------------------------------------------------
ROWS = [("compact:2.5e-05, of a long name", "112.3", "1.2e-05", "1.2e-05", "100.00%"),
        ("topk", "1.0", "0.5", "1", "9%")]  # fmt: skip
COLUMNS = ("", "bytes a row", "KL T=1", "KL Z, tau=2", "same top-1")


@pytest.mark.parametrize("width", [200, 80, 60, 50, 30])
def test_no_word_of_a_table_is_broken(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Console(width=width, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(output, "stdout", terminal)
    output.show_table("what was measured", COLUMNS, ROWS)
    text = capsys.readouterr().out
    assert all(len(line) <= width for line in text.splitlines())
    words = set(re.findall(r"[^\s│╭╮╰╯├┤─┬┴┼]+", text))
    wanted = {word for row in (COLUMNS, *ROWS) for cell in row for word in cell.split()}
    assert wanted <= words


def test_a_table_in_a_file_has_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_table("t", COLUMNS, [("name " * 50, "1", "2", "3", "4")])
    assert len(capsys.readouterr().out.splitlines()) == 6


# -- help -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_in_its_group(name: str) -> None:
    page = command(name)
    assert page.get_ungrouped_options(page.context_class(page)) == [
        page.get_help_option(page.context_class(page))
    ]
    titles = [group.title for group in page.option_groups]
    order = [group.title for group in GROUPS]
    assert titles == sorted(titles, key=order.index)
    assert titles[-1] == "Output"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_of_the_command_s_own_options(name: str) -> None:
    pages = {other: command(other) for other in COMMANDS}  # several of them share a module
    shown = [option for group in pages[name].option_groups for option in group.options]
    own = [param for param in pages[name].params if isinstance(param, click.Option)]
    assert {id(option) for option in shown} == {id(option) for option in own}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_can_be_typed(name: str) -> None:
    page = command(name)
    _, _, text = (page.epilog or "").partition("Examples:\n")
    examples = text.splitlines()
    assert len(examples) == 2
    for example in examples:
        program, first, *words = shlex.split(example)
        assert (program, first) == ("kdcache", name)
        context = page.make_context(name, words)
        assert not context.args
    shown = page.get_help(page.context_class(page, info_name=name))
    assert all(example in shown for example in examples)


# -- names ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        (["train-student", "--method"], "dk", ["dkd"]),
        (["train-student", "--student"], "resnet8", ["resnet8", "resnet8x4"]),
        (["train-student", "--recipe"], "cifar100/kd", ["cifar100/kd", "cifar100/kd-ls"]),
        (["dump-teacher", "--augment"], "pad", ["pad-crop-flip"]),
        (["dump-teacher", "--dataset"], "cifar100", ["cifar100"]),
        (["list"], "enc", ["encodings"]),
    ],
)
def test_the_shell_completes_names(words: list[str], incomplete: str, expected: list[str]) -> None:
    complete = ShellComplete(app, {}, "kdcache", "_KDCACHE_COMPLETE")
    assert [item.value for item in complete.get_completions(words, incomplete)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_has_a_page(kind: str) -> None:
    for name in KINDS[kind]():
        assert page_of(kind, name)
    with pytest.raises(UnknownName):
        page_of(kind, "no such name")


def test_a_page_gives_options_and_defaults(kdcache: Run) -> None:
    assert "--dkd-beta 8.0: weight of the non-target part" in kdcache("list", "methods", "dkd").out
    page = kdcache("list", "augmentations", "pad-crop-flip").out
    assert "flip: whether to mirror." in page
    assert "Defaults: mode=constant" in page
    assert "--temperature 2.0" in kdcache("list", "recipes", "cifar100/kd-ls").out
    assert "NAME:option=value" in kdcache("list", "augmentations").out
    data = kdcache("list", "methods", "kd", "--json")
    assert data.json["name"] == "kd"
    assert "did you mean 'dkd'" in kdcache("list", "methods", "dkdd").err


# -- what a place is ------------------------------------------------------------------------------
def test_a_run_and_a_store_are_told_apart(trained: Trained, kdcache: Run, tmp_path: Path) -> None:
    for words in (("inspect", trained.teacher), ("verify", trained.teacher), ("check", trained.teacher),
                  ("train-student", "--store", trained.teacher, "--dataset", "digits", "--student",
                   "resnet8", "--method", "kd", "--out", tmp_path / "run")):  # fmt: skip
        done = kdcache(*words)
        assert done.code == 2
        assert f"{trained.teacher} is the run of a training" in done.err
        assert f"kdcache evaluate {trained.teacher} --dataset NAME" in done.err
    for words in (("evaluate", trained.store, "--dataset", "digits"),
                  ("dump-teacher", "--dataset", "digits", "--teacher", trained.store, "--views", 1,
                   "--out", tmp_path / "t.zarr")):  # fmt: skip
        done = kdcache(*words)
        assert done.code == 2
        assert f"{trained.store} is a store of a teacher's outputs" in done.err
        assert f"kdcache inspect {trained.store}" in done.err


def test_a_misspelt_teacher_is_told_before_views_are_asked_for(
    kdcache: Run, tmp_path: Path
) -> None:
    dump = ("dump-teacher", "--dataset", "digits", "--out", tmp_path / "t.zarr", "--teacher")
    assert "unknown model 'resnet9'; did you mean 'resnet8'" in kdcache(*dump, "resnet9@w.pth").err
    assert "there is no such directory" in kdcache(*dump, "runs/teacher").err
    assert "torchvision:resnet18" in kdcache(*dump, "resnet18").err


def test_a_store_says_its_dataset(trained: Trained, kdcache: Run, tmp_path: Path) -> None:
    words = ("export-views", "--out", tmp_path / "views.parquet")
    done = kdcache(*words, "--store", trained.store)
    assert done.code == 0, done.err
    assert "rows" in done.out
    assert "Missing option '--dataset'." in kdcache(*words, "--views", 1).err


def test_a_misspelt_name_is_refused_before_anything_is_loaded(kdcache: Run, tmp_path: Path) -> None:
    words = ("train-student", "--dataset", "nowhere", "--student", "x", "--out", tmp_path / "run")
    assert "unknown method 'kdd'; did you mean 'kd'" in kdcache(*words, "--method", "kdd").err
    assert "unknown recipe" in kdcache(*words, "--recipe", "cifar100/kdls").err
