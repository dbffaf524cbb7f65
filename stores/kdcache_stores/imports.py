"""Existing logits into a store: from arrays in memory, or from an .npz file."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.canonical import Json
from kdcache_stores.encoding import LearnedEncoding
from kdcache_stores.encodings import make_encoding
from kdcache_stores.errors import DataError, UsageError
from kdcache_stores.fidelity import require_faithful
from kdcache_stores.nouns import FieldSpec, Plan, Probe, Samples, Shard, Teacher
from kdcache_stores.once import lesson_rows
from kdcache_stores.reader import LogitStore
from kdcache_stores.writer import StoreWriter

FIXED_VIEW: dict[str, Json] = {"name": "fixed"}
"""Augmentation of a plan whose one view is whatever the logits were computed on."""

PROBABILITIES = "probabilities"
"""What `kind_of_rows` calls rows that are not usable as logits."""


def kind_of_rows(rows: NDArray[Any]) -> str | None:
    """What rows meant as logits are instead, where their numbers show it.

    Args:
        rows: float (N, K).

    Returns:
        `PROBABILITIES` where every row is positive and sums to 1; a remark where every row is of
        log-probabilities (as good as logits: a softmax does not see the constant) or all numbers lie
        between 0 and 1; else None.
    """
    if rows.shape[0] < 2 or rows.shape[1] < 2:
        return None
    values = rows.astype(np.float64)
    if (values >= 0).all() and (np.abs(values.sum(1) - 1) < 1e-2).all():
        return PROBABILITIES
    if (values <= 1e-2).all() and (np.abs(np.log(np.exp(values).sum(1))) < 1e-2).all():
        return "log-probabilities, which serve as logits"
    if values.min() >= 0 and values.max() <= 1 and values.std() > 0:
        return "numbers between 0 and 1, as sigmoids do: were logits meant?"
    return None


def write_arrays(
    path: str | os.PathLike[str],
    arrays: Mapping[str, NDArray[Any]] | NDArray[Any],
    *,
    samples: Samples,
    plan: Plan | None = None,
    teacher: Teacher | None = None,
    encoding: str = "float16",
    probes: Callable[[Shard], Sequence[Probe]] | None = None,
    **options: Any,
) -> LogitStore:
    """Write arrays that are in memory as a sealed store.

    Args:
        path: folder of the store.
        arrays: logits, float (N, K) for one view or (V, N, K); or such arrays by field name, each
            (V, N, *shape), with "logits" among them.
        samples: keys and labels, in row order.
        plan: the view plan; by default one fixed view of an unnamed dataset.
        teacher: whose logits these are; by default unknown, told apart by the logits' own SHA-256.
        encoding: of every field.
        probes: proofs of the pixels of some rows of a shard.
        options: further arguments of `StoreWriter`.

    Raises what `StoreWriter` raises, `DataError` for arrays that do not fit the samples, and
    `UsageError` for several views without a plan.
    """
    fields = dict(arrays) if isinstance(arrays, Mapping) else {"logits": np.asarray(arrays)}
    if "logits" not in fields:
        raise DataError(f"expected an array of logits, found {sorted(fields)}")
    fields = {
        name: values[None] if name == "logits" and values.ndim == 2 else values
        for name, values in fields.items()
    }
    logits = fields["logits"]
    for name, values in fields.items():
        if values.ndim < 3 or values.shape[:2] != (logits.shape[0], len(samples)):
            raise DataError(
                f"{name} must be (views, {len(samples)}, ...), as many views as the logits, "
                f"found {values.shape}"
            )
    views, _, classes = logits.shape
    if plan is None:
        if views != 1:
            raise UsageError(f"{views} views need a plan: without one there is one fixed view")
        plan = Plan("imported", "train", classes, samples.fingerprint, FIXED_VIEW, seed=0)
    if teacher is None:
        content = np.ascontiguousarray(logits, dtype="<f4").tobytes()
        identity = hashlib.sha256(b"kdcache unknown teacher\n" + content).hexdigest()
        teacher = Teacher("unknown", identity, {}, "unknown", classes)
    _judge(encoding, logits[0], samples)
    specs = {name: FieldSpec(values.shape[2:], encoding) for name, values in fields.items()}
    with StoreWriter(
        path, plan=plan, teacher=teacher, samples=samples, views=views, fields=specs, **options
    ) as writer:
        if (lesson := writer.lesson) is not None:
            writer.prepare({name: values[:2, lesson] for name, values in fields.items()})
        for shard in writer.pending():
            rows = slice(shard.start, shard.stop)
            part = {name: values[shard.view, rows] for name, values in fields.items()}
            writer.write(shard, part, probes(shard) if probes else ())
        writer.seal()
    return LogitStore(writer.files)


def _judge(encoding: str, logits: NDArray[Any], samples: Samples) -> None:
    """Refuse logits (N, K) that the encoding loses before a store is begun for them.

    Encodings that learn are judged once they have; what is not finite, as it is written.
    """
    kind, rows = make_encoding(encoding), lesson_rows(len(samples), logits.shape[-1])
    with np.errstate(over="ignore"):
        chosen = logits[rows].astype(np.float32)
    if not isinstance(kind, LearnedEncoding) and np.isfinite(chosen).all():
        require_faithful(kind, chosen, samples.labels[rows])


def import_npz(
    file: str | os.PathLike[str], path: str | os.PathLike[str], **options: Any
) -> LogitStore:
    """Write the logits in an .npz file as a sealed store of one fixed view.

    Args:
        file: see `read_npz`; without labels the samples are unlabelled.
        path: folder of the store.
        options: further arguments of `write_arrays`.

    Raises what `read_npz` and `write_arrays` raise.
    """
    logits, keys, labels = read_npz(file)
    labels = np.full(len(keys), -1) if labels is None else labels
    return write_arrays(path, logits, samples=Samples(keys, labels), **options)


def read_npz(
    file: str | os.PathLike[str],
) -> tuple[NDArray[Any], list[str], NDArray[Any] | None]:
    """The logits, keys and labels in an .npz file.

    Args:
        file: with the arrays `logits`, float (N, K) or (V, N, K), and `keys`, text (N,); `labels`,
            integer (N,), is optional.

    Raises `DataError` for a file that is not there, lacks these, holds pickled objects, or
    probabilities for logits.
    """
    try:
        # Opened here: NumPy leaves a file that is no archive open.
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{file} holds one array, not an archive of named ones")
            if missing := sorted({"logits", "keys"} - set(archive.files)):
                raise DataError(f"{file} lacks {missing}: it must hold logits and keys")
            logits, keys = archive["logits"], archive["keys"]
            labels = archive["labels"] if "labels" in archive.files else None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, DataError):
            raise
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{file}: there is no such file") from None
        raise DataError(f"{file} is no .npz file of plain arrays: {error}") from None
    if keys.dtype.kind != "U" or keys.ndim != 1:
        raise DataError(f"{file}: keys must be text (N,), found {keys.dtype} {keys.shape}")
    if logits.ndim not in (2, 3) or logits.dtype.kind != "f" or logits.shape[-2] != len(keys):
        raise DataError(
            f"{file}: logits must be floats ({len(keys)}, classes) or (views, {len(keys)}, classes), a "
            f"row for each key, found {logits.dtype} {logits.shape}"
        )
    if kind_of_rows(logits.reshape(-1, logits.shape[-1])) == PROBABILITIES:
        raise DataError(
            f"{file}: logits are probabilities, every row sums to 1, and a softmax of that is nearly "
            "uniform at any temperature. Save what comes before the softmax, or "
            "np.log(p.clip(1e-12)), which serves as logits"
        )
    return logits, keys.tolist(), labels
