"""Stores of teacher logits: format, writer, reader, encodings, verification. NumPy, no torch."""

from kdcache_stores.encodings import ENCODINGS
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
from kdcache_stores.imports import import_npz
from kdcache_stores.nouns import FieldSpec, Plan, Probe, Samples, Shard, Teacher
from kdcache_stores.reader import LogitStore, open_store
from kdcache_stores.reopen import begun_encoding, reopen
from kdcache_stores.samples import Join
from kdcache_stores.verify import Problem, Report
from kdcache_stores.writer import StoreWriter

__all__ = [
    "ENCODINGS",
    "CorruptStore",
    "DataError",
    "FieldSpec",
    "FormatError",
    "Join",
    "KDCacheError",
    "LogitStore",
    "MismatchError",
    "Plan",
    "Probe",
    "Problem",
    "RemoteError",
    "Report",
    "Samples",
    "Shard",
    "StoreError",
    "StoreInUse",
    "StoreNotFound",
    "StoreWriter",
    "Teacher",
    "TrainingError",
    "UnfinishedStore",
    "UnknownName",
    "UsageError",
    "begun_encoding",
    "import_npz",
    "open_store",
    "reopen",
]
