"""The attributes of a store's groups: what it holds, of which teacher, in which encodings."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from kdcache_stores.encodings.encoding_names import (
    encoding_from_dict,
    encoding_to_dict,
    make_encoding,
)
from kdcache_stores.encodings.protocol import DENSE_BYTES, Encoding
from kdcache_stores.errors import FormatError, StoreNotFound, UsageError
from kdcache_stores.format.canonical_json import Json, pretty_json
from kdcache_stores.types import LOGITS, FieldSpec, Plan, StoredTeacher

FORMAT = (1, 1)
"""The newest format (major, minor) that is written here, where a store needs it. A reader refuses another
major and reads a newer minor."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_RESERVED = ("records", "probes", "once")
HEAD = "head"


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
        if not _NAME.fullmatch(name):
            raise UsageError(f"a field's name must be a-z, 0-9 and _, found {name!r}")
        if name in (*_RESERVED, HEAD):
            raise UsageError(f"{name} is no name for a field: a store keeps something else there")
        if not shape or min(shape) < 1:
            raise UsageError(f"field {name}: sizes must be positive, found shape {shape}")
        if 4 * math.prod(shape) > DENSE_BYTES:
            raise UsageError(
                f"field {name}: rows of shape {shape} are larger than {DENSE_BYTES} bytes as float32"
            )
        return cls(name, shape, make_encoding(spec.encoding))

    @property
    def is_logits(self) -> bool:
        """Whether its rows are over classes, with a top-1 and a fidelity in nats."""
        return self.name == LOGITS

    @property
    def has_error(self) -> bool:
        """Whether what its encoding loses is measured as a relative squared error (format 1.1)."""
        return not self.is_logits and not self.encoding.plain

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
    """What the root group states about a store.

    Args:
        plan, teacher: as given to the writer.
        fields: by name.
        samples: N.
        keys: "plain", or "sha256" where the keys are published hashed.
        config: what a resumed dump must share (batch size, ...).
        provenance: time, command, versions, device: in no digest, compared with nothing.
        head: (K, D) of the teacher's last linear layer, where the store keeps that.
        format: (major, minor) that the store is written in; None: the oldest that holds all this.
    """

    plan: Plan
    teacher: StoredTeacher
    fields: dict[str, Field]
    samples: int
    keys: str = "plain"
    config: dict[str, Json] = field(default_factory=dict)
    provenance: dict[str, Json] = field(default_factory=dict)
    head: tuple[int, int] | None = None
    format: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.format is None:
            fields = self.fields.values()
            since = [item.encoding.since for item in fields] + [
                int(item.has_error) for item in fields
            ]
            minor = max([*since, int(self.head is not None), int(self.plan.item is not None)])
            object.__setattr__(self, "format", (FORMAT[0], minor))

    @property
    def minor(self) -> int:
        """Minor version of the store's format."""
        assert self.format is not None
        return self.format[1]

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
            "format": [FORMAT[0], self.minor],
            "plan": {**self.plan.to_dict(), "digest": self.plan.digest},
            "teacher": {**self.teacher.to_dict(), "digest": self.teacher.digest},
            "fields": {name: item.to_dict() for name, item in self.fields.items()},
            "samples": self.samples,
            "keys": self.keys,
            "config": self.config,
            "provenance": self.provenance,
            **({} if self.head is None else {"head": list(self.head)}),
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
    if version[0] != FORMAT[0] or version[1] < 0:
        raise FormatError(
            f"{where} has format {version[0]}.{version[1]}; this kdcache reads "
            f"{FORMAT[0]}.x: use a version of kdcache that knows it"
        )
    plan = Plan.from_dict(value.get("plan"), f"{where}: plan")
    if version[1] == 0 and plan.item is not None:
        raise FormatError(f"{where}: plan.item, which format {version[0]}.0 does not have")
    teacher = StoredTeacher.from_dict(value.get("teacher"), f"{where}: teacher")
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
    _check_provenance(value["provenance"], where)
    listed = value.get("fields")
    if not isinstance(listed, dict) or not 0 < len(listed) <= 64:
        raise FormatError(f"{where}: fields must name 1 to 64 fields")
    fields = {name: _read_field(name, item, where) for name, item in listed.items()}
    if LOGITS in fields and fields[LOGITS].shape != (plan.classes,):
        raise FormatError(
            f"{where}: logits must have shape ({plan.classes},), a value for each class of the plan, "
            f"found {fields[LOGITS].shape}"
        )
    for stored in fields.values():
        if stored.encoding.since > version[1]:
            raise FormatError(
                f"{where}: {stored.name} has the encoding {stored.encoding.name}, which format "
                f"{version[0]}.{version[1]} does not have"
            )
    head = None
    if version[1] > 0 and "head" in value:
        head = _read_head(value["head"], plan.classes, fields, where)
    about = value["config"], value["provenance"]
    return Header(plan, teacher, fields, samples, keys, *about, head, (version[0], version[1]))


def _check_provenance(value: dict[str, Json], where: str) -> None:
    """Those of its members that are shown or compared are text; raises `FormatError`."""
    versions = value.get("versions", {})
    if not isinstance(versions, dict):
        raise FormatError(
            f"{where}: provenance: versions must be a JSON object, found {versions!r:.80}"
        )
    named = {name: value.get(name, "") for name in ("time", "command")} | versions
    for name, item in named.items():
        if not isinstance(item, str):
            raise FormatError(f"{where}: provenance: {name} must be text, found {item!r:.80}")


def _read_head(value: Json, classes: int, fields: dict[str, Field], where: str) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(_is_int(size) and 0 < size < 2**32 for size in value)
        or value[0] != classes
    ):
        raise FormatError(
            f"{where}: head must be [{classes}, D], a row of weights for each class of the plan, "
            f"found {value!r:.80}"
        )
    if HEAD in fields:
        raise FormatError(f"{where}: a store with a head has no field of that name")
    return value[0], value[1]


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
    if 4 * math.prod(shape) > DENSE_BYTES:
        raise FormatError(
            f"{where}: rows of shape {shape!r:.80} are larger than {DENSE_BYTES} bytes"
        )
    return Field(name, tuple(shape), encoding_from_dict(value.get("encoding"), where))


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
