"""The attributes of a store's groups: what it holds, of which teacher, in which encodings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from kdcache_stores.canonical import Json, pretty_json
from kdcache_stores.encoding import Encoding, LearnedEncoding
from kdcache_stores.encodings import (
    encoding_from_dict,
    encoding_to_dict,
    make_encoding,
)
from kdcache_stores.errors import FormatError, StoreNotFound, UsageError
from kdcache_stores.nouns import FieldSpec, Plan, Teacher

FORMAT = (1, 0)
"""Format version (major, minor). A reader refuses a newer major and reads a newer minor."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_RESERVED = ("records", "probes", "once")


@dataclass(frozen=True)
class Field:
    """A field as the store holds it: shape per row and encoding."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding

    @classmethod
    def make(cls, name: str, spec: FieldSpec) -> Field:
        """From what a caller asks for; raises `UsageError`."""
        shape = tuple(int(size) for size in spec.shape)
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise UsageError(f"a field's name must be a-z, 0-9 and _, found {name!r}")
        if not shape or min(shape) < 1:
            raise UsageError(f"field {name}: sizes must be positive, found shape {shape}")
        return cls(name, shape, make_encoding(spec.encoding))

    @property
    def learns(self) -> bool:
        """Whether its encoding keeps arrays once, and learns before the first shard."""
        return isinstance(self.encoding, LearnedEncoding)

    @property
    def metadata_key(self) -> str:
        """Key of the field's group."""
        return f"{self.name}/zarr.json"

    def to_dict(self) -> dict[str, Json]:
        """Shape and encoding, plain JSON."""
        return {"shape": list(self.shape), "encoding": encoding_to_dict(self.encoding)}

    def document(self) -> bytes:
        """The bytes of the field's `zarr.json`."""
        return group({"kdcache": self.to_dict()})


def group(attributes: dict[str, Json]) -> bytes:
    """The bytes of a Zarr v3 group's `zarr.json`."""
    return pretty_json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


@dataclass(frozen=True)
class Header:
    """What the root group says of a store.

    Args:
        plan, teacher: as given to the writer.
        fields: by name.
        samples: N.
        keys: "plain", or "sha256" where the keys are published hashed.
        config: what a resumed dump must share (batch size, ...).
        provenance: time, command, versions, device: in no digest, compared with nothing.
    """

    plan: Plan
    teacher: Teacher
    fields: dict[str, Field]
    samples: int
    keys: str = "plain"
    config: dict[str, Json] = field(default_factory=dict)
    provenance: dict[str, Json] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Json]:
        """What every digest of the store's data is bound to."""
        return {
            "format": FORMAT[0],
            "plan": self.plan.digest,
            "teacher": self.teacher.digest,
            "samples": self.samples,
            "fields": {name: item.to_dict() for name, item in self.fields.items()},
        }

    def to_dict(self) -> dict[str, Json]:
        """All of it, plain JSON, with the digests of plan and teacher for people to read."""
        return {
            "format": list(FORMAT),
            "plan": {**self.plan.to_dict(), "digest": self.plan.digest},
            "teacher": {**self.teacher.to_dict(), "digest": self.teacher.digest},
            "fields": {name: item.to_dict() for name, item in self.fields.items()},
            "samples": self.samples,
            "keys": self.keys,
            "config": self.config,
            "provenance": self.provenance,
        }

    def comparable(self) -> dict[str, Json]:
        """What a writer that resumes must agree with: all but provenance and measurements."""
        value = self.to_dict()
        del value["provenance"], value["format"], value["plan"]["notes"]
        for name in ("digest", "file_sha256", "clean_top1", "notes"):
            del value["teacher"][name]
        del value["plan"]["digest"]
        return value

    def document(self) -> bytes:
        """The bytes of the root `zarr.json`."""
        return group({"kdcache": self.to_dict()})


def read_header(document: dict[str, Json], where: str) -> Header:
    """The header in a root `zarr.json`.

    Raises `StoreNotFound` if it is a Zarr group but no store, `FormatError` for a newer major
    version or metadata that breaks the format.
    """
    attributes = document.get("attributes")
    value = attributes.get("kdcache") if isinstance(attributes, dict) else None
    if not isinstance(value, dict):
        raise StoreNotFound(f"{where} holds zarr.json, but no kdcache store")
    version = value.get("format")
    if not (isinstance(version, list) and len(version) == 2 and all(_is_int(n) for n in version)):
        raise FormatError(f"{where}: format must be [major, minor], found {version!r:.60}")
    if version[0] != FORMAT[0]:
        raise FormatError(
            f"{where} has format {version[0]}.{version[1]}; this kdcache reads "
            f"{FORMAT[0]}.x: use a version of kdcache that knows it"
        )
    plan = Plan.from_dict(value.get("plan"))
    teacher = Teacher.from_dict(value.get("teacher"))
    for name, item in (("plan", plan), ("teacher", teacher)):
        if value[name].get("digest") != item.digest:
            raise FormatError(
                f"{where}: {name}.digest is {value[name].get('digest')!r:.80}, "
                f"but its content gives {item.digest}"
            )
    samples, keys = value.get("samples"), value.get("keys")
    if not _is_int(samples) or not 0 < samples < 2**40:
        raise FormatError(f"{where}: samples must be a positive integer, found {samples!r:.60}")
    if keys not in ("plain", "sha256"):
        raise FormatError(f"{where}: keys must be 'plain' or 'sha256', found {keys!r:.60}")
    for name in ("config", "provenance"):
        if not isinstance(value.get(name), dict):
            raise FormatError(f"{where}: {name} must be a JSON object")
    listed = value.get("fields")
    if not isinstance(listed, dict) or not 0 < len(listed) <= 64:
        raise FormatError(f"{where}: fields must name 1 to 64 fields")
    fields = {name: _read_field(name, item, where) for name, item in listed.items()}
    return Header(plan, teacher, fields, samples, keys, value["config"], value["provenance"])


def _read_field(name: str, value: Json, where: str) -> Field:
    where = f"{where}: field {name!r:.80}"
    if not _NAME.fullmatch(name) or name in _RESERVED or not isinstance(value, dict):
        raise FormatError(f"{where} has no proper name or description")
    shape = value.get("shape")
    if (
        not isinstance(shape, list)
        or not 0 < len(shape) <= 8
        or not all(_is_int(size) and 0 < size < 2**32 for size in shape)
    ):
        raise FormatError(f"{where}: shape must be 1 to 8 positive integers, found {shape!r:.80}")
    return Field(name, tuple(shape), encoding_from_dict(value.get("encoding"), where))


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
