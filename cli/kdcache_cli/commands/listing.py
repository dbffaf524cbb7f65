"""list: the names that options take."""

from __future__ import annotations

import click

from kdcache_cli import groups
from kdcache_cli.app import common
from kdcache_cli.names import KINDS, SPELLING, page_of
from kdcache_cli.output import emit


@groups.command("list", "kdcache list methods", "kdcache list augmentations rand-augment")
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("name", required=False)
@common
def list_names(kind: str, name: str | None, as_json: bool, quiet: bool) -> None:
    """The names of KIND; with NAME, all there is to say of that one."""
    if name is not None:
        page = page_of(kind, name)
        emit({"name": name, "what": page}, as_json)
        if not as_json:
            click.echo(page)
        return
    names = KINDS[kind]()
    emit([{"name": name, "what": what} for name, what in names.items()], as_json)
    if as_json:
        return
    width = max((len(name) for name in names), default=0)
    for name, what in names.items():
        click.echo(f"{name:<{width}}  {what}".rstrip())
    if kind in SPELLING and not quiet:
        click.echo(f"\n{SPELLING[kind]}")
