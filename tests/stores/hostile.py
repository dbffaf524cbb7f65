"""Stores that someone made to do harm: sealed properly, with content that breaks the format."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache_stores.format.canonical_json import pretty_json
from kdcache_stores.format.manifest import (
    MANIFEST,
    SEAL,
    Entry,
    read_manifest,
    seal_text,
    sha256,
    write_manifest,
)


def reseal(path: Path, change: Callable[[dict[str, Entry]], None] = lambda entries: None) -> None:
    """Seal a store anew around whatever its objects hold now, after a change of the entries."""
    entries = read_manifest((path / MANIFEST).read_bytes(), "manifest")
    for key, entry in entries.items():
        data = (path / key).read_bytes()
        entries[key] = Entry(**{**vars(entry), "size": len(data), "sha256": sha256(data)})
    change(entries)
    manifest = write_manifest(entries.values())
    (path / MANIFEST).write_bytes(manifest)
    (path / SEAL).write_bytes(seal_text(sha256(manifest)))


def put(document: dict[str, Any], place: str, value: Any) -> bytes:
    """The document with one member, named by dots, replaced."""
    document = copy.deepcopy(document)
    *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    inner: Any = document
    for part in parents:
        inner = inner[part]
    inner[last] = value
    return pretty_json(document)


NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**400, -(2**63), 0.5, 1e308, "", "..",
    "/etc/passwd", "../../x", "NaN", "object", "pickle", "float16", "a" * 3000, "\x00", "é\ud800",
    [], [[]], [0], [2**40] * 3, [1] * 5000, {}, {"name": "pickle"}, {"name": "blosc"},
    {"a": {"b": {"c": {}}}},
]  # fmt: skip


def mutate(document: Any, rng: random.Random) -> Any:
    """A copy with one to three members replaced, removed or added, anywhere."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        inner, steps = document, 0
        while steps < 12:
            steps += 1
            if isinstance(inner, dict) and inner:
                key: Any = rng.choice(list(inner))
            elif isinstance(inner, list) and inner:
                key = rng.randrange(len(inner))
            else:
                break
            if isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.8:
                inner = inner[key]
                continue
            choice = rng.random()
            if choice < 0.8:
                inner[key] = copy.deepcopy(rng.choice(NASTY))
            elif choice < 0.9:
                del inner[key]
            elif isinstance(inner, dict):
                inner[f"x{rng.randrange(9)}"] = copy.deepcopy(rng.choice(NASTY))
            else:
                inner.append(copy.deepcopy(rng.choice(NASTY)))
            break
    return document


def scramble(data: bytes, rng: random.Random) -> bytes:
    """A copy with some bytes changed, cut out or repeated."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not changed:
            break
        at = rng.randrange(len(changed))
        choice = rng.random()
        if choice < 0.6:
            changed[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif choice < 0.8:
            del changed[at : at + rng.randint(1, 40)]
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 40)]
    return bytes(changed)
