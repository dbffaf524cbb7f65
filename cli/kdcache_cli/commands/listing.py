"""list: the names that options take."""

from __future__ import annotations

import click

from kdcache_cli import groups
from kdcache_cli.app import common
from kdcache_cli.names import KINDS, SPELLING, page_of
from kdcache_cli.output import answer, emit


@groups.command("list", "kdcache list methods", "kdcache list augmentations rand-augment")
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("name", required=False)
@common
def list_names(kind: str, name: str | None, as_json: bool, quiet: bool) -> None:
    """The names of KIND; with NAME, all there is to say of that one."""
    if name is not None:
        page = page_of(kind, name)
        emit({"name": name, "what": page}, as_json)
        for line in page.splitlines():
            answer(line, as_json)
        return
    names = KINDS[kind]()
    emit([{"name": name, "what": what} for name, what in names.items()], as_json)
    width = max((len(name) for name in names), default=0)
    for name, what in names.items():
        answer(f"{name:<{width}}  {what}".rstrip(), as_json)
    if kind in SPELLING:
        answer("", quiet)
        answer(SPELLING[kind], quiet)
