"""Reference pages that are made from the records: commands, methods, and the names that options take.

A hook of MkDocs; `pages` needs no more than kdcache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kdcache_cli.app import COMMANDS, app
from kdcache_cli.names import KINDS, SPELLING, page_of

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

TITLES = {
    "models": "Networks by name, of a teacher or a student.",
    "datasets": "What `--dataset` takes.",
    "methods": "What `--method` takes, with the published weights and temperature of each.",
    "fields": "What `--fields` takes: the outputs of a network that a store can hold.",
    "augmentations": "What `--augment` takes.",
    "encodings": "What `--encoding` takes: how a field's rows become bytes.",
    "recipes": "What `--recipe` takes: published settings, and ours where a line says so.",
    "words": "The words of kdcache.",
}


def pages() -> dict[str, str]:
    """Every page, Markdown by its place in the site."""
    return {"reference/commands.md": _commands()} | {
        f"reference/{kind}.md": _names(kind) for kind in KINDS
    }


def _commands() -> str:
    context = app.make_context("kdcache", ["-h"], resilient_parsing=True)
    parts = ["# Commands", "Every command also has `-h`, `--json`, `--quiet` and `--debug`."]
    for name in COMMANDS:
        command = app.get_command(context, name)
        assert command is not None
        parts += [f"## {name}", *_command(command, name)]
    return "\n\n".join(parts) + "\n"


def _command(command: click.Command, name: str) -> list[str]:
    context = command.make_context(name, ["-h"], resilient_parsing=True)
    usage = " ".join(["kdcache", name, *command.collect_usage_pieces(context)])
    parts = [f"```text\n{usage}\n```", *_paragraphs(command.help or "")]
    for group in getattr(command, "option_groups", ()):
        records = [option.get_help_record(context) for option in group.options]
        lines = [f"- `{flags}`: {_plain(text)}" for flags, text in filter(None, records)]
        if lines:
            parts += [f"**{group.title}**", "\n".join(lines)]
    _, _, examples = (command.epilog or "").partition("Examples:\n")
    lines = [line.strip() for line in examples.splitlines()]
    return [*parts, "```console\n" + "\n".join(lines) + "\n```"]


def _names(kind: str) -> str:
    parts = [f"# {kind.capitalize()}", TITLES[kind]]
    if kind in SPELLING:
        parts.append(_plain(SPELLING[kind]))
    for name, line in KINDS[kind]().items():
        page = page_of(kind, name)
        if "\n" in page:
            parts += [f"## `{name}`", f"```text\n{page}\n```"]
        else:
            parts.append(f"- `{name}`{': ' + _plain(line) if line else ''}")
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> list[str]:
    return [_plain(" ".join(part.split())) for part in text.split("\n\n") if part.strip()]


def _plain(text: str) -> str:
    """Text whose signs are no Markdown; what is between backticks stays."""
    parts = text.split("`")
    for at in range(0, len(parts), 2):
        for sign in "\\*_<[":
            parts[at] = parts[at].replace(sign, f"&#{ord(sign)};")
    return "`".join(parts)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to the site."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files
