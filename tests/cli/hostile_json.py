"""Documents of which one node is something else: a number beyond any, another type, too deep, absent."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdcache_stores.format.canonical_json import digest
from tests.stores.hostile import reseal

#: As they are written, since some of them are no value of Python's.
TOKENS = [
    "1e400", "-1e400", "NaN", "Infinity", "null", "true", "false", "0", "-1", "1", "3", "0.5", "1e308",
    "5e-324", "2147483648", "9223372036854775808", "-9223372036854775808", "18446744073709551616",
    "1" + "0" * 400, '""', '"x"', '"nan"', '"logits"', '"\\ud800"', '"\\u0000"', '"../../x"',
    '"' + "a" * 5000 + '"',
    "[]", "[[]]", "[0]", "[1e400]", "[null]", '["a", 1]', "[[[[[1]]]]]", "[" * 40 + "]" * 40, "{}",
    '{"a": {"b": null}}', '{"name": "pickle"}', '{"": 1}', '{"torch": 1e400}',
]  # fmt: skip
_MARK = "TOKEN-4f1c"


def nodes(document: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values within a document, itself first."""
    yield place
    inner: Any = ()
    if isinstance(document, dict):
        inner = document.items()
    elif isinstance(document, list):
        inner = enumerate(document)
    for key, value in inner:
        yield from nodes(value, (*place, key))


def forged(document: Any, place: tuple[Any, ...], change: str) -> str:
    """The document as text, with a value replaced by a token, taken out ("-") or given a neighbour ("+")."""
    copy = json.loads(json.dumps(document))
    if not place:
        return change if change not in "+-" else "{}"
    *parents, last = place
    inner = copy
    for key in parents:
        inner = inner[key]
    if change == "-":
        del inner[last]
    elif change == "+" and isinstance(inner, dict):
        inner["added"] = {"x": [None]}
    elif change == "+":
        inner.append(inner[last])
    else:
        inner[last] = _MARK

    def text() -> str:
        return json.dumps(copy).replace(f'"{_MARK}"', change)

    _agree(copy, json.loads(text()))
    return text()


def _agree(document: Any, meant: Any) -> None:
    """A root's digests of plan and teacher made to agree with what it will say, where there are any."""
    for name, members in (
        ("plan", ("fingerprint", "augmentation", "seed")),
        ("teacher", ("weights_sha256", "preprocessing", "precision")),
    ):
        with suppress(KeyError, TypeError, ValueError, IndexError):
            value = meant["attributes"]["kdcache"][name]
            agreeing = digest(name, {key: value[key] for key in members})
            document["attributes"]["kdcache"][name]["digest"] = agreeing


def forge(whole: Path, target: Path, key: str, text: str) -> None:
    """A copy of a sealed store with one document replaced, and sealed anew; the rest are links."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target, copy_function=os.link)
    for name in (key, "manifest.parquet", "manifest.sha256"):
        data = (target / name).read_bytes()
        (target / name).unlink()
        (target / name).write_bytes(data if name != key else text.encode("utf-8", "surrogatepass"))
    reseal(target)


def documents(whole: Path) -> dict[str, Any]:
    """The JSON documents of a store by key."""
    return {
        file.relative_to(whole).as_posix(): json.loads(file.read_bytes())
        for file in sorted(whole.rglob("*.json"))
    }


def any_forgery(found: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """A document's key and forged text."""
    key = rng.choice(list(found))
    place = rng.choice(list(nodes(found[key])))
    return key, forged(found[key], place, rng.choice([*TOKENS, "+", "-"]))
