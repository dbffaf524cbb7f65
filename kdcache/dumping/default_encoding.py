"""How the fields of a dump are encoded where nobody says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from kdcache.fields.spelling import stored_name, tap_of
from kdcache_stores import UsageError, begun_encodings

#: From so many views on, codes of a sample's views share enough to be worth a basis and a base.
MANY_VIEWS = 8
#: Of fewer classes a row of `float16` is small. At 10 classes of an ImageNet teacher, over resized crops,
#: `compact:2.5e-5` takes 11 bytes instead of 20 and moves logits by up to 0.2; at 1,000 it takes 743
#: beside its basis, and `float16` 2,000.
MANY_CLASSES = 32
#: Of fewer rows a class the basis, 4 bytes for each pair of classes, weighs more than `compact` saves: at 1,000
#: classes 4 MB, as much as 5,400 of its rows.
ROWS_PER_CLASS = 8


def choose_encodings(
    paths: Iterable[str | os.PathLike[str]],
    fields: Sequence[str],
    views: int,
    rows: int,
    classes: int,
    asked: str | Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The encoding of each field of a dump of so many views into these stores.

    A store that is there keeps its own, however many views it grows to. New logits are
    `compact:2.5e-5` from `MANY_VIEWS` views, `MANY_CLASSES` classes and `ROWS_PER_CLASS` rows a class on (a
    sixth of the bytes of `float16` at 16 views of 100 classes), else `float16`; every other new field is
    `float16`.

    Args:
        paths: of the stores.
        fields: their fields.
        views: of the dump.
        rows: of the dump: views times samples.
        classes: of the logits.
        asked: by field, however it is spelled, "attention" for its maps of all sizes; a name alone is
            that of the logits.

    Raises:
        UsageError: the stores differ in their encodings, or one is asked for a field that there is not.
    """
    asked = {"logits": asked} if isinstance(asked, str) else _by_stored_name(asked or {}, fields)
    if unknown := sorted(asked.keys() - set(fields)):
        raise UsageError(
            f"an encoding is given for {', '.join(unknown)}, and the fields of this dump are "
            f"{', '.join(fields)}: give it as FIELD=ENCODING for one of them"
        )
    begun = [begun_encodings(path) for path in paths]
    return {name: asked.get(name) or _default(name, begun, views, rows, classes) for name in fields}


def _by_stored_name(asked: Mapping[str, str], fields: Sequence[str]) -> dict[str, str]:
    """Encodings by the names of fields in a store."""
    maps = [name for name in fields if (tap := tap_of(name)) and tap.kind == "attention"]
    result = dict.fromkeys(maps, asked["attention"]) if maps and "attention" in asked else {}
    rest = {stored_name(field): encoding for field, encoding in asked.items()}
    if result:
        del rest["attention"]
    return result | rest


def _default(
    field: str, begun: Sequence[Mapping[str, str]], views: int, rows: int, classes: int
) -> str:
    begun_with = {encodings[field] for encodings in begun if field in encodings}
    if len(begun_with) > 1:
        raise UsageError(
            f"{field} of the stores is encoded as {', '.join(sorted(begun_with))}: dump into one of them "
            "at a time"
        )
    if begun_with:
        return begun_with.pop()
    many = views >= MANY_VIEWS and classes >= MANY_CLASSES and rows >= ROWS_PER_CLASS * classes
    return "compact:2.5e-5" if field == "logits" and many else "float16"
