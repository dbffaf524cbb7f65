"""Existing outputs into a store: from arrays in memory, or from an .npz file."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encodings.encoding_names import make_encoding
from kdcache_stores.encodings.fidelity import ROWS, require_faithful
from kdcache_stores.encodings.protocol import FittedEncoding
from kdcache_stores.errors import DataError, StoreError, UnknownName, UsageError
from kdcache_stores.format.canonical_json import Json
from kdcache_stores.format.manifest import CARD, CROISSANT, ROOT
from kdcache_stores.objects.files import LocalFiles
from kdcache_stores.read.reader import Store
from kdcache_stores.types import LOGITS, FieldSpec, Plan, Probe, Samples, Shard, StoredTeacher
from kdcache_stores.write.writer import StoreWriter

FIXED_VIEW: dict[str, Json] = {"name": "fixed"}
"""Augmentation of a plan whose one view is whatever the logits were computed on."""

PROBABILITIES = "probabilities"
"""What `kind_of_rows` calls rows that are not usable as logits."""


def kind_of_rows(rows: NDArray[Any]) -> str | None:
    """What else than logits the rows are, where their numbers show it.

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
    teacher: StoredTeacher | None = None,
    encoding: str | Mapping[str, str] = "float16",
    probes: Callable[[Shard], Sequence[Probe]] | None = None,
    **options: Any,
) -> Store:
    """Write arrays that are in memory as a sealed store.

    Args:
        path: folder of the store.
        arrays: any set of fields by name, each float (V, N, *shape); or, of one view, each
            (N, *shape), where logits (N, K) are among them. An array alone is of logits.
        samples: keys and labels, in row order.
        plan: the view plan; by default one fixed view of an unnamed dataset, with as many classes as
            the logits.
        teacher: whose outputs these are; by default unknown, told apart by the SHA-256 of the logits
            (without logits, of all arrays).
        encoding: of every field, or by field (float16 for one that is not named).
        probes: proofs of the pixels of some rows of a shard.
        options: further arguments of `StoreWriter`.

    Raises what `StoreWriter` raises, `DataError` for arrays that do not fit the samples or each other,
    and `UsageError` for several views, or no logits, without a plan. A store that was begun here and
    cannot be finished is removed again.
    """
    fields = dict(arrays) if isinstance(arrays, Mapping) else {LOGITS: np.asarray(arrays)}
    if LOGITS in fields and fields[LOGITS].ndim == 2:
        fields = {name: values[None] for name, values in fields.items()}
    if not fields:
        raise UsageError("expected an array for each field, found none")
    views = len(next(iter(fields.values())))
    for name, values in fields.items():
        if values.ndim < 3 or values.shape[:2] != (views, len(samples)):
            raise DataError(
                f"{name} must be (views, {len(samples)}, ...), as many views as the other fields, "
                f"found {values.shape}"
            )
    if plan is None:
        if views != 1 or LOGITS not in fields:
            raise UsageError(
                f"{views} views of {', '.join(sorted(fields))} need a plan: without one there is one "
                "fixed view, and the logits give the number of classes"
            )
        classes = fields[LOGITS].shape[2]
        plan = Plan("imported", "train", classes, samples.fingerprint, FIXED_VIEW, seed=0)
    if teacher is None:
        teacher = StoredTeacher("unknown", _identity(fields), {}, "unknown", plan.classes)
    names = dict.fromkeys(fields, encoding) if isinstance(encoding, str) else dict(encoding)
    if unknown := sorted(names.keys() - fields.keys()):
        raise UnknownName("field", unknown[0], fields)
    specs = {
        name: FieldSpec(values.shape[2:], names.get(name, "float16"))
        for name, values in fields.items()
    }
    if LOGITS in fields:
        _require_faithful(specs[LOGITS].encoding, fields[LOGITS][0], samples)
    begun, folder = LocalFiles(path).size(ROOT) is not None, os.path.isdir(path)
    try:
        return _write(path, fields, probes, plan=plan, teacher=teacher, samples=samples, views=views,
                      fields=specs, **options)  # fmt: skip
    except BaseException:
        if not begun:
            _discard(LocalFiles(path, options.get("disk")), folder=not folder)
        raise


def _write(
    path: str | os.PathLike[str],
    arrays: Mapping[str, NDArray[Any]],
    probes: Callable[[Shard], Sequence[Probe]] | None,
    **options: Any,
) -> Store:
    """Fit, write and seal arrays (V, N, *shape)."""
    with StoreWriter(path, **options) as writer:
        calibration = writer.calibration_rows
        writer.fit({name: arrays[name][:2, rows] for name, rows in calibration.items()})
        for shard in writer.pending():
            rows = slice(shard.start, shard.stop)
            part = {name: values[shard.view, rows] for name, values in arrays.items()}
            writer.write(shard, part, probes(shard) if probes else ())
        writer.seal()
    return Store(writer.files)


def _discard(files: LocalFiles, folder: bool) -> None:
    """Remove the store that was begun here, its root last, and its `folder` too, if told to."""
    with suppress(
        OSError, StoreError
    ):  # a disk that refuses even this: the store stays, unfinished
        if files.size(ROOT) is not None:  # or else nothing here is ours
            keys = [key for key in files.walk() if key not in (CARD, CROISSANT, ROOT)]
            for key in [*keys, ROOT]:
                files.remove(key)
        for parent, _, _ in os.walk(files.root, topdown=False):
            if folder or parent != files.root:
                with suppress(OSError):  # not empty: it is not ours alone
                    os.rmdir(parent)


def _require_faithful(encoding: str, logits: NDArray[Any], samples: Samples) -> None:
    """Refuse logits (N, K) that the encoding loses before a store is begun for them.

    Encodings that are fitted are checked once they are; what is not finite, as it is written.
    """
    kind = make_encoding(encoding)
    chosen = np.linspace(0, len(logits) - 1, min(ROWS, len(logits))).round().astype(np.int64)
    with np.errstate(over="ignore"):
        rows = logits[chosen].astype(np.float32)
    if not isinstance(kind, FittedEncoding) and np.isfinite(rows).all():
        require_faithful(kind, rows, samples.labels[chosen])


def _identity(fields: Mapping[str, NDArray[Any]]) -> str:
    """What stands for the weights of a teacher that nobody named: a digest of its outputs."""
    content = hashlib.sha256(b"kdcache unknown teacher\n")
    for name in [LOGITS] if LOGITS in fields else sorted(fields):
        content.update(np.ascontiguousarray(fields[name], dtype="<f4").tobytes())
    return content.hexdigest()


def import_npz(file: str | os.PathLike[str], path: str | os.PathLike[str], **options: Any) -> Store:
    """Write the outputs in an .npz file as a sealed store of one fixed view.

    Args:
        file: see `read_npz`; without labels the samples are unlabelled.
        path: folder of the store.
        options: further arguments of `write_arrays`.

    Raises what `read_npz` and `write_arrays` raise.
    """
    arrays, keys, labels = read_npz(file)
    labels = np.full(len(keys), -1) if labels is None else labels
    return write_arrays(path, arrays, samples=Samples(keys, labels), **options)


def read_npz(
    file: str | os.PathLike[str],
) -> tuple[dict[str, NDArray[Any]], list[str], NDArray[Any] | None]:
    """The outputs by field, the keys and the labels in an .npz file.

    Args:
        file: with the arrays `logits`, float (N, K) or (V, N, K), and `keys`, text (N,); `labels`,
            integer (N,), is optional. Any other array is a field, float (N, *shape) or (V, N, *shape)
            as the logits are.

    Raises `DataError` for a file that is not there, lacks these, holds pickled objects, or
    probabilities for logits.
    """
    try:
        # Opened here: NumPy leaves a file that is no archive open.
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{file} holds one array, not an archive of named ones")
            if missing := sorted({LOGITS, "keys"} - set(archive.files)):
                raise DataError(f"{file} lacks {missing}: it must hold logits and keys")
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, DataError):
            raise
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{file}: there is no such file") from None
        raise DataError(f"{file} is no .npz file of plain arrays: {error}") from None
    keys, labels = arrays.pop("keys"), arrays.pop("labels", None)
    if keys.dtype.kind != "U" or keys.ndim != 1:
        raise DataError(f"{file}: keys must be text (N,), found {keys.dtype} {keys.shape}")
    logits = arrays[LOGITS]
    if logits.ndim not in (2, 3) or logits.dtype.kind != "f" or logits.shape[-2] != len(keys):
        raise DataError(
            f"{file}: logits must be floats ({len(keys)}, classes) or (views, {len(keys)}, classes), a "
            f"row for each key, found {logits.dtype} {logits.shape}"
        )
    for name, values in arrays.items():
        if values.size == 0:
            raise DataError(
                f"{file}: {name} of shape {values.shape} holds no value: save what there is"
            )
    if kind_of_rows(logits.reshape(-1, logits.shape[-1])) == PROBABILITIES:
        raise DataError(
            f"{file}: logits are probabilities, every row sums to 1, and a softmax of that is nearly "
            "uniform at any temperature. Save what comes before the softmax, or "
            "np.log(p.clip(1e-12)), which serves as logits"
        )
    for name, values in arrays.items():
        lead = logits.shape[:-1]
        if (
            values.dtype.kind != "f"
            or values.shape[: len(lead)] != lead
            or values.ndim <= len(lead)
        ):
            raise DataError(
                f"{file}: {name} must be floats {lead} and the shape of a row, as a field beside the "
                f"logits, found {values.dtype} {values.shape}"
            )
    return arrays, keys.tolist(), labels
