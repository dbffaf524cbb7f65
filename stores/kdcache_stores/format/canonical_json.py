"""Canonical JSON, digests of it, and the first difference between two JSON values."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from kdcache_stores.errors import FormatError, UsageError

Json = Any
"""What `json` reads and writes: None, bool, int, float, str, lists, and dicts with str keys."""

DEEPEST = 32
"""Levels of lists and objects within a JSON object, at most."""


def plain(value: Json, what: str) -> Json:
    """The value as JSON gives it back (tuples become lists); raises `UsageError` if it is none."""
    try:
        return json.loads(canonical_json(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{what} must be plain JSON without NaN, found {value!r}: {error}"
        ) from None


def canonical_json(value: Json) -> str:
    """One text per value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def pretty_json(value: Json) -> bytes:
    """The form of every metadata object in a store: sorted keys, two spaces, a final newline."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def parse_json(data: bytes, where: str) -> dict[str, Json]:
    """The JSON object in `data`: all metadata that a store or a server gives comes through here.

    Raises `FormatError` naming `where` for anything else, and for what no other program reads alike:
    numbers that are not finite in float64 or beyond 64 bits, text that is not Unicode, more than
    `DEEPEST` levels.
    """
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
        _check_values(value)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is no JSON that this kdcache reads: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where} must hold a JSON object, found {type(value).__name__}")
    return value


def _check_values(value: Json) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Json] = []
        for item in level:
            if isinstance(item, str):
                item.encode()  # raises a ValueError for half of a surrogate pair
            elif isinstance(item, int) and not -(2**63) <= item < 2**64:
                raise ValueError("an integer beyond 64 bits")
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("a number beyond float64")
            elif isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, list):
                inner += item
        level = inner
        if not level:
            return
    raise ValueError(f"more than {DEEPEST} levels of lists and objects")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def digest(kind: str, value: Json) -> str:
    """SHA-256 (hex) of `kdcache <kind>`, a newline and the canonical JSON of `value`."""
    return hashlib.sha256(f"kdcache {kind}\n{canonical_json(value)}".encode()).hexdigest()


def first_difference(actual: Json, expected: Json, name: str) -> tuple[str, Json, Json] | None:
    """Where two JSON values first differ: (dotted name, found, expected), or None."""
    if isinstance(actual, Mapping) and isinstance(expected, Mapping):
        for key in sorted(actual.keys() | expected.keys(), key=str):
            if key not in actual or key not in expected:
                return f"{name}.{key}", actual.get(key), expected.get(key)
            if difference := first_difference(actual[key], expected[key], f"{name}.{key}"):
                return difference
        return None
    if isinstance(actual, list) and isinstance(expected, list) and len(actual) == len(expected):
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            if difference := first_difference(a, b, f"{name}[{index}]"):
                return difference
        return None
    if canonical_json(actual) == canonical_json(expected):
        return None
    return name, actual, expected
