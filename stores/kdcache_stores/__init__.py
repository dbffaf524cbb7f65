"""Stores of teacher outputs: format, writer, reader, encodings, verification. NumPy, no torch."""

from kdcache_stores.describing import describe
from kdcache_stores.encoding_names import ENCODINGS
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
from kdcache_stores.importing import import_npz, write_arrays
from kdcache_stores.join import common_views, join_fields
from kdcache_stores.nouns import LOGITS, FieldSpec, Plan, Probe, Samples, Shard, Teacher
from kdcache_stores.probing import item_digest, make_probe
from kdcache_stores.reader import Store, open_store
from kdcache_stores.reopen import begun_encodings, reopen
from kdcache_stores.verifying import Problem, Report, verify
from kdcache_stores.writer import StoreWriter

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
    "Report",
    "Samples",
    "Shard",
    "Store",
    "StoreError",
    "StoreInUse",
    "StoreNotFound",
    "StoreWriter",
    "Teacher",
    "TrainingError",
    "UnfinishedStore",
    "UnknownName",
    "UsageError",
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
