"""The encodings that there are, by name.

To add one: a frozen dataclass with the members of `Encoding`, its parameters as its fields, and its
name in `ENCODINGS`. Nothing else in the package depends on which encoding it is.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kdcache_stores.encodings.channels import Channels
from kdcache_stores.encodings.compact import Compact
from kdcache_stores.encodings.floats import Float16, Float32
from kdcache_stores.encodings.protocol import Encoding
from kdcache_stores.encodings.quantized import Quantized
from kdcache_stores.encodings.topk import TopK
from kdcache_stores.errors import FormatError, UnknownName
from kdcache_stores.format.canonical_json import Json

ENCODINGS: dict[str, type[Encoding]] = {
    "float32": Float32,
    "float16": Float16,
    "quantized": Quantized,
    "topk": TopK,
    "compact": Compact,
    "channels": Channels,
}


def make_encoding(text: str) -> Encoding:
    """The encoding named by "float16", "topk:10", "compact:3e-4"; raises `UnknownName`."""
    name, _, parameter = text.partition(":")
    if name not in ENCODINGS:
        raise UnknownName("encoding", name, ENCODINGS)
    return ENCODINGS[name].parse(parameter if ":" in text else None)


def encoding_to_dict(encoding: Any) -> dict[str, Json]:
    """Name and parameters, plain JSON."""
    return {"name": encoding.name, **asdict(encoding)}


def encoding_from_dict(value: Json, where: str) -> Encoding:
    """The inverse of `encoding_to_dict`; raises `FormatError`, also for an unknown encoding."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise FormatError(f"{where}: expected an encoding with a name, found {value!r:.80}")
    if value["name"] not in ENCODINGS:
        raise FormatError(
            f"{where}: encoding {value['name']!r:.40} is not known to this kdcache "
            f"({', '.join(ENCODINGS)}): a newer version may read it"
        )
    parameters = {key: item for key, item in value.items() if key != "name"}
    try:
        return ENCODINGS[value["name"]](**parameters)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{where}: wrong parameters of {value['name']}: {error}") from None
