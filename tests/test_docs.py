"""The pages do what they say: their Python runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import functools
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from PIL import Image

from kdcache.deploying.deploy import export
from kdcache.runs import load_run_model
from kdcache_cli.app import COMMANDS, app
from kdcache_cli.names import KINDS
from tests.conftest import Result, Trained

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PAGES = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in FILES}
RECORDS, OUTSIDE, EXECUTED = (
    runpy.run_path(str(DOCS / "_site" / f"{name}.py"))
    for name in ("records", "outside", "executed")
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.M | re.S)
OWN_FILE = re.compile(r"# (\w+\.py)\n")


@functools.cache
def made_of_records() -> dict[str, str]:
    pages: dict[str, str] = RECORDS["pages"]()
    return pages


def blocks(page: str, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(PAGES[page]) if name == language]


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


def lines(page: str) -> Iterator[list[str]]:
    """What a page says to type; of a block with prompts, the lines that have one."""
    for block in blocks(page, "console"):
        text = block.replace("\\\n", " ").splitlines()
        typed = [line.removeprefix("$ ") for line in text if line.startswith("$ ")] or text
        yield from filter(None, (shlex.split(line, comments=True) for line in typed))


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    kinds = {name for page in PAGES.values() for name, _ in FENCE.findall(page)}
    assert kinds == {"", "python", "console", "toml", "diff"}
    assert {
        page: len(re.findall(r"^```", text, flags=re.M)) % 2 for page, text in PAGES.items()
    } == dict.fromkeys(PAGES, 0)
    assert {page for page in PAGES if blocks(page, "")} == {"README.md", "docs/index.md"}


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(
    page: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.store, tmp_path / "teacher.zarr")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    if page == "docs/howto/export.md":
        export(load_run_model(trained.teacher), "torch-export", "student.pt2")
        Image.new("RGB", (30, 20), "navy").save("photo.png")
    for code in blocks(page, "python"):
        if own := OWN_FILE.match(code):
            (tmp_path / own[1]).write_text(code)
            monkeypatch.delitem(sys.modules, own[1].removesuffix(".py"), raising=False)
    shown = EXECUTED["run"](PAGES[page], page)
    assert shown.count("<figure>") == (page == "docs/explanation/zscore.md")


def test_your_own_parts_train(
    kdcache: type[Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = "docs/howto/own-parts.md"
    (own,) = (code for code in blocks(page, "python") if OWN_FILE.match(code))
    (words,) = lines(page)
    (tmp_path / "my_parts.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    done = kdcache(*words[1:], "--device", "cpu", "--json")
    assert done.code == 0, done.err
    assert done.json["model"] == "my_parts:tiny"


@pytest.mark.parametrize("page", pages_with("console"))
def test_commands_can_be_typed(page: str) -> None:
    context = app.make_context("kdcache", ["-h"], resilient_parsing=True)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for words in lines(page):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.M), words
        elif words[:2] == ["pip", "install"]:
            name, _, extra = words[2].rstrip("]").partition("[")
            assert name == "kdcache"
            assert not extra or extra in extras, words
        else:
            place = words.index("kdcache")
            assert not place or words[:place][-1] == "-m"
            command = app.get_command(context, words[place + 1])
            assert command is not None, words
            command.make_context(words[place + 1], words[place + 2 :]).close()


def test_tables_of_runs_are_toml() -> None:
    (text,) = blocks("docs/howto/students.md", "toml")
    assert [sorted(run) for run in tomllib.loads(text)["run"]] == [
        ["method", "name", "temperature"], ["recipe", "seed"],
    ]  # fmt: skip
    assert pages_with("toml") == ["docs/howto/students.md"]


@pytest.mark.parametrize("code", blocks("docs/TRAINERS.md", "diff"))
def test_a_patched_trainer_is_python(code: str) -> None:
    before, after = (
        "\n".join(line[1:] for line in code.splitlines() if line[:1] != removed) + "\n"
        for removed in "+-"
    )
    assert before != after
    compile(before, "before", "exec")
    compile(after, "after", "exec")


def test_patches_are_of_trainers_alone() -> None:
    assert pages_with("diff") == ["docs/TRAINERS.md"]


def anchors(markdown: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", markdown), flags=re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for path, anchor in OUTSIDE["LINK"].findall(PAGES[page]) + [
        ("", anchor) for anchor in re.findall(r"\]\((#[^)]+)\)", PAGES[page])
    ]:
        file = folder / path if path else ROOT / page
        assert file.exists(), path
        assert not anchor or anchor[1:] in anchors(file.read_text(encoding="utf-8")), path + anchor


def test_links_lead_somewhere_in_the_site() -> None:
    places = {str(file.relative_to(DOCS)) for file in DOCS.rglob("*") if file.is_file()}
    made = OUTSIDE["pages"]()
    places |= {*made, *made_of_records()}
    places |= {f"source/{file.relative_to(ROOT)}" for file in ROOT.glob("evidence/*.json")}
    written = {str(file.relative_to(DOCS)): file.read_text() for file in DOCS.rglob("*.md")}
    written |= {place: made[place] for place in OUTSIDE["PAGES"].values()}
    for place, markdown in written.items():
        for link, _ in OUTSIDE["LINK"].findall(OUTSIDE["relinked"](markdown, place)):
            target = (DOCS / place).parent.joinpath(link).resolve().relative_to(DOCS)
            assert str(target) in places, (place, link)


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"[-:] (\S+\.md)$", config.partition("\nnav:\n")[2], flags=re.M)
    made = {*made_of_records(), *OUTSIDE["PAGES"].values()}
    assert sorted(listed) == sorted(
        {str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md")} | made
    )


def test_the_reference_is_made_of_the_records() -> None:
    pages = made_of_records()
    commands = pages["reference/commands.md"]
    context = app.make_context("kdcache", ["-h"], resilient_parsing=True)
    for name in COMMANDS:
        section = commands.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        command = app.get_command(context, name)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.opts[-1] in section, (name, option.opts)
        assert f"kdcache {name}" in section.rpartition("```console")[2]
    for kind in KINDS:
        page = pages[f"reference/{kind}.md"]
        assert [name for name in KINDS[kind]() if f"`{name}`" not in page] == []


def test_signs_of_markdown_are_kept_as_they_are() -> None:
    assert RECORDS["_plain"]("a_b `c_d` <e> [f]") == "a&#95;b `c_d` &#60;e> &#91;f]"


def test_equations_can_be_drawn() -> None:
    equations = [tex for text in PAGES.values() for tex in EXECUTED["EQUATION"].findall(text)]
    assert len(equations) >= 7
    for tex in equations:
        drawn = EXECUTED["equation"](tex)
        assert "currentColor" in drawn
        assert "<path" in drawn


def test_a_page_whose_assertion_fails_is_not_built() -> None:
    with pytest.raises(AssertionError):
        EXECUTED["run"]("```python\nassert 1 + 1 == 3\n```\n", "page.md")
