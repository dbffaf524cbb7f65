"""Stores of teacher outputs: format, writer, reader, encodings, verification. NumPy, no torch."""

from kdcache_stores.encodings.encoding_names import ENCODINGS
from kdcache_stores.errors import (
    CorruptStore,
    DataError,
    FormatError,
    KDCacheError,
    MismatchError,
    RemoteError,
    StoreError,
    StoreInUse,
    StoreNotFound,
    TrainingError,
    UnfinishedStore,
    UnknownName,
    UsageError,
)
from kdcache_stores.format.probing import item_digest, make_probe
from kdcache_stores.read.describing import describe
from kdcache_stores.read.join import common_views, join_fields
from kdcache_stores.read.reader import Store, open_store
from kdcache_stores.read.verifying import Problem, VerifyReport, verify
from kdcache_stores.types import LOGITS, FieldSpec, Plan, Probe, Samples, Shard, StoredTeacher
from kdcache_stores.write.importing import import_npz, write_arrays
from kdcache_stores.write.reopen import begun_encodings, reopen
from kdcache_stores.write.writer import StoreWriter

__all__ = [
    "ENCODINGS",
    "LOGITS",
    "CorruptStore",
    "DataError",
    "FieldSpec",
    "FormatError",
    "KDCacheError",
    "MismatchError",
    "Plan",
    "Probe",
    "Problem",
    "RemoteError",
    "Samples",
    "Shard",
    "Store",
    "StoreError",
    "StoreInUse",
    "StoreNotFound",
    "StoreWriter",
    "StoredTeacher",
    "TrainingError",
    "UnfinishedStore",
    "UnknownName",
    "UsageError",
    "VerifyReport",
    "begun_encodings",
    "common_views",
    "describe",
    "import_npz",
    "item_digest",
    "join_fields",
    "make_probe",
    "open_store",
    "reopen",
    "verify",
    "write_arrays",
]
