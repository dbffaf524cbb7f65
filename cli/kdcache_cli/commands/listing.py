"""list: the names that options take."""

from __future__ import annotations

from collections.abc import Callable

import click

from kdcache.methods.record import Method
from kdcache.methods.table import METHODS
from kdcache_cli.app import common
from kdcache_cli.output import emit


def _models() -> dict[str, str]:
    from kdcache.models.zoo import MODELS

    others = {
        "torchvision:NAME": "A classifier of torchvision; @WEIGHTS takes its own weights.",
        "timm:NAME": "A classifier of timm (extra `timm`).",
        "pkg.module:factory": "Your own function of (classes, channels, size), or (classes, shape).",
    }
    return dict.fromkeys(MODELS, "") | others


def _datasets() -> dict[str, str]:
    from kdcache.data.loading import DATASETS, PREFIXES

    return {name: first_line(loader) for name, loader in DATASETS.items()} | PREFIXES


def _methods() -> dict[str, str]:
    def line(method: Method) -> str:
        reads = ", ".join(method.teacher_fields) or "no teacher"
        return f"{method.title} ({method.source}) [{reads}]"

    return {name: line(method) for name, method in METHODS.items()}


def _augmentations() -> dict[str, str]:
    from kdcache.augment.specs import AUGMENTATIONS

    return {name: first_line(kind) for name, kind in AUGMENTATIONS.items()}


def _fields() -> dict[str, str]:
    from kdcache.fields.spelling import FIELDS

    own = {"NAME": "A field that your own module gives: its forward returns {NAME: tensor}."}
    return FIELDS | own


def _encodings() -> dict[str, str]:
    from kdcache_stores import ENCODINGS

    return {name: first_line(kind) for name, kind in ENCODINGS.items()}


def _recipes() -> dict[str, str]:
    from kdcache.recipes.published import names

    return names()


KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "models": _models,
    "datasets": _datasets,
    "methods": _methods,
    "fields": _fields,
    "augmentations": _augmentations,
    "encodings": _encodings,
    "recipes": _recipes,
}


def first_line(thing: object) -> str:
    """The first paragraph of a docstring, on one line."""
    paragraph = (thing.__doc__ or "").strip().partition("\n\n")[0]
    return " ".join(paragraph.split())


@click.command("list")
@click.argument("kind", type=click.Choice(list(KINDS)))
@common
def list_names(kind: str, as_json: bool, quiet: bool) -> None:
    """The names of KIND."""
    names = KINDS[kind]()
    if as_json:
        emit([{"name": name, "what": what} for name, what in names.items()], True)
        return
    width = max((len(name) for name in names), default=0)
    for name, what in names.items():
        click.echo(f"{name:<{width}}  {what}".rstrip())
