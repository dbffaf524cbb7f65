"""What a dump will cost, measured before it starts, and whether the disk has room for it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kdcache.break_even import account
from kdcache.data.dataset import Rows
from kdcache.dumping.calibration import union
from kdcache.dumping.first_rows import FirstRows, allowed, first_rows
from kdcache.dumping.opening import Target, store_settings, target_encodings
from kdcache.views.plan import ViewPlan
from kdcache_stores import Plan, Samples, Store, StoreError, write_arrays
from kdcache_stores.write.fitting import calibration_rows
from kdcache_stores.write.outstanding import find_outstanding

#: Room asked for beyond the estimate.
MARGIN = 1.05


@dataclass(frozen=True)
class Estimate:
    """What a dump will do.

    Attributes:
        rows: rows to forward; with several teachers, each by every teacher.
        stored: rows that the stores hold already.
        encodings: of every field.
        bytes_per_row: of what is to be written, by encoding two views of the first rows.
        field_bytes: of a row of each field, without what its views share.
        nbytes: that all stores will grow by.
        free_bytes: on the fullest of their disks.
        rows_per_second: of all teachers together, from a warm-up.
        seconds: until the end.
        forwards: teacher forwards that the finished stores stand for.
        online_forwards: teacher forwards of as many epochs and students without a store.
        break_even_epochs: epochs of students, all together, after which the store has paid off.
    """

    rows: int
    stored: int
    encodings: dict[str, str]
    bytes_per_row: float
    field_bytes: dict[str, float]
    nbytes: int
    free_bytes: int
    rows_per_second: float
    seconds: float
    forwards: int
    online_forwards: int
    break_even_epochs: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def estimate(
    plan: ViewPlan,
    targets: Sequence[Target],
    views: int,
    *,
    encoding: str | Mapping[str, str] | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 0,
    views_per_decode: int = 1,
    part: tuple[int, int] = (0, 1),
    ranks: int = 1,
    hash_keys: bool = False,
    shard_rows: int | None = None,
    epochs: int = 240,
    students: int = 1,
    look: Callable[[FirstRows], None] = lambda first: None,
) -> Estimate:
    """Measure the first rows; nothing is written to the stores, and none is begun.

    Args:
        ranks: processes that will share the work, on a device each.
        epochs: of a student, for the comparison with distillation without a store.
        students: to be trained.
        look: is given those rows before anything is made of them, and may refuse them.

    The other arguments are those of `dump`. Raises what `dump` would raise on opening a store.
    """
    encodings = target_encodings(targets, views, views * len(plan.dataset), encoding)
    todo = [
        _missing(plan, target, views, part, encodings=encodings, batch_size=batch_size,
                 device=device, hash_keys=hash_keys, shard_rows=shard_rows)
        for target in targets
    ]  # fmt: skip
    rows = max(missing.rows for missing in todo)
    online = account(len(plan), views, plan.augmentation.describe())
    done = Estimate(
        rows=0,
        stored=views * len(plan) - rows if part == (0, 1) else 0,
        encodings=encodings,
        bytes_per_row=0.0,
        field_bytes={},
        nbytes=0,
        free_bytes=_require_room([target.path for target in targets], [0] * len(targets)),
        rows_per_second=0.0,
        seconds=0.0,
        forwards=online.spent * len(targets),
        online_forwards=epochs * students * online.saved_per_epoch * len(targets),
        break_even_epochs=online.epochs,
    )
    if not rows:
        return done
    first = first_rows(
        plan,
        [target.teacher for target in targets],
        union({f"{i}": missing.calibration for i, missing in enumerate(todo)}),
        batch_size=batch_size,
        device=torch.device(device),
        workers=workers,
        views_per_decode=min(views_per_decode, views),
        most=allowed(rows) // 2,
    )
    look(first)
    speed = first.rows_per_second
    labels, classes = plan.samples.labels[first.rows], plan.dataset.classes
    encoded = [
        missing.stored or _marginal_bytes(fields, labels, classes, encodings, first.calibration)
        for fields, missing in zip(first.outputs, todo, strict=True)
    ]
    nbytes = [round(each.of(missing)) for each, missing in zip(encoded, todo, strict=True)]
    return replace(
        done,
        rows=rows,
        bytes_per_row=sum(nbytes) / sum(missing.rows for missing in todo),
        field_bytes=encoded[0].fields,
        nbytes=sum(nbytes),
        free_bytes=_require_room([target.path for target in targets], nbytes),
        rows_per_second=speed * ranks,
        seconds=rows / (speed * ranks),
    )


class Missing(NamedTuple):
    """What a store lacks, and what is known of it.

    Attributes:
        rows, shards: that are to be written.
        first: of the rows, those of view 0.
        new: whether it was not begun at all.
        calibration: int64 (n,), the rows that its encodings are still to be fitted to.
        stored: bytes of the views that it holds, where it is sealed and holds several.
    """

    rows: int
    shards: int
    first: int
    new: bool
    calibration: Rows
    stored: EncodedBytes | None


class EncodedBytes(NamedTuple):
    """Bytes that encodings take: per store, sample, row and shard; a row's by field."""

    store: float
    sample: float
    row: float
    fields: dict[str, float]
    shard: float = 0.0

    def of(self, missing: Missing) -> float:
        """Bytes that are still to be written."""
        shared = self.store * missing.new + self.sample * missing.first
        return shared + self.row * missing.rows + self.shard * missing.shards


def _missing(
    plan: ViewPlan, target: Target, views: int, part: tuple[int, int], **settings: Any
) -> Missing:
    """What a store lacks, found without changing it."""
    work = find_outstanding(target.path, **store_settings(plan, target, views, **settings))
    pending = work.pending(part)
    first = sum(shard.rows for shard in pending if shard.view == 0)
    fields = () if work.begun else work.header.fields.values()
    chosen = {field.name: calibration_rows(field, work.header.samples) for field in fields}
    fits = union({name: rows for name, rows in chosen.items() if rows is not None})
    stored = None if work.base is None or work.base.n_views < 2 else _stored_bytes(work.base)
    rows = sum(shard.rows for shard in pending)
    return Missing(rows, len(pending), first, not work.begun, fits, stored)


def _stored_bytes(store: Store) -> EncodedBytes:
    """Bytes of the last view of a store: what more views will take."""
    of_field = dict.fromkeys(store.fields, 0.0)
    for key, entry in store.source.entries.items():
        if entry.kind == "shard" and entry.view == store.view_range[-1]:
            of_field[key.split("/")[0]] += entry.size / len(store)
    return EncodedBytes(0.0, 0.0, sum(of_field.values()), of_field)


def _marginal_bytes(
    fields: Mapping[str, np.ndarray],
    labels: np.ndarray,
    classes: int,
    encodings: Mapping[str, str],
    fitted: bool,
) -> EncodedBytes:
    """`encoded_bytes`; of a few rows, the bytes that a shard takes beside its rows are kept apart.

    Args:
        fitted: whether these rows are those that encodings are fitted to.
    """
    whole, n = encoded_bytes(fields, labels, classes, encodings), len(labels)
    if fitted or n < 2:
        return whole
    half = encoded_bytes(
        {name: values[:, : n // 2] for name, values in fields.items()}, labels, classes, encodings
    )
    row = (whole.row * n - half.row * (n // 2)) / (n - n // 2)
    share = row / whole.row
    each = {name: size * share for name, size in whole.fields.items()}
    return whole._replace(row=row, fields=each, shard=(whole.row - row) * n)


def encoded_bytes(
    fields: Mapping[str, np.ndarray],
    labels: np.ndarray,
    classes: int,
    encodings: Mapping[str, str],
) -> EncodedBytes:
    """Bytes that encodings take on the disk, by writing a store of these rows.

    Args:
        fields: by name, each float32 (views, n, *shape), one view or two.
        labels: int64, of n rows at least.
        classes: that labels count.
        encodings: by field, as `FieldSpec` takes them.
    """
    views, n = next(iter(fields.values())).shape[:2]
    samples = Samples([str(row) for row in range(n)], labels[:n])
    plan = Plan("rows", "train", classes, samples.fingerprint, {"name": "none"}, seed=0)
    chosen = {name: encodings[name] for name in fields}
    with tempfile.TemporaryDirectory(prefix="kdcache-") as folder:
        store = write_arrays(folder, fields, samples=samples, plan=plan, encoding=chosen)
        entries = store.source.entries.values()
        first, last = (
            sum(e.size for e in entries if e.kind == "shard" and e.view == view)
            for view in (0, views - 1)
        )
        shared = [entry for entry in entries if entry.kind == "once"]
        base = sum(entry.size for entry in shared if entry.start is not None)
        basis = sum(entry.size for entry in shared if entry.start is None)
        of_field = dict.fromkeys(fields, 0.0)
        for key, entry in store.source.entries.items():
            if entry.kind == "shard" and entry.view == views - 1:
                of_field[key.split("/")[0]] += entry.size / n
    return EncodedBytes(basis, (base + first - last) / n, last / n, of_field)


def _require_room(paths: Sequence[str | os.PathLike[str]], nbytes: Sequence[int]) -> int:
    """Free bytes of the disk with the least; raises `StoreError` where they do not suffice."""
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for path, size in zip(paths, nbytes, strict=True):
        folder = Path(path).absolute()
        while not folder.exists():
            folder = folder.parent
        disk = folder.stat().st_dev
        folders[disk], needed[disk] = folder, needed.get(disk, 0) + size
    free = {disk: shutil.disk_usage(folder).free for disk, folder in folders.items()}
    for disk, size in needed.items():
        if size * MARGIN > free[disk]:
            raise StoreError(
                f"{folders[disk]}: the stores need about {size / 1e9:.3g} GB more, and the disk has "
                f"{free[disk] / 1e9:.3g} GB free. Make room, choose another disk, fewer --views, or "
                "a smaller --encoding."
            )
    return min(free.values())
