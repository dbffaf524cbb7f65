"""What a dump will cost, measured before it starts, and whether the disk has room for it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kdcache.break_even import account
from kdcache.dumping.opening import Target, store_settings, target_encodings
from kdcache.views.batches import together
from kdcache.views.plan import ViewPlan
from kdcache_stores import Plan, Samples, StoreError, write_arrays
from kdcache_stores.write.outstanding import find_outstanding

#: The warm-up ends after so many batches of a view, or seconds; the first batch is not timed.
WARM_UP_BATCHES, WARM_UP_SECONDS = 8, 2.0
#: And where the outputs kept for measuring take so much memory.
WARM_UP_BYTES = 2**28
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
) -> Estimate:
    """Measure the first batches; nothing is written to the stores, and none is begun.

    Args:
        ranks: processes that will share the work, on a device each.
        epochs: of a student, for the comparison with distillation without a store.
        students: to be trained.

    The other arguments are those of `dump`. Raises what `dump` would raise on opening a store.
    """
    encodings = target_encodings(targets, views, encoding)
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
    outputs, speed = _warm_up(plan, targets, min(views_per_decode, views), batch_size,
                               torch.device(device), workers)  # fmt: skip
    labels, classes = plan.samples.labels, plan.dataset.classes
    encoded = [encoded_bytes(fields, labels, classes, encodings) for fields in outputs]
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
    """What a store lacks: rows, those of view 0 among them, and whether it was not begun at all."""

    rows: int
    first: int
    new: bool


class EncodedBytes(NamedTuple):
    """Bytes that encodings take: once per store, once per sample, and for every row; a row's by field."""

    store: float
    sample: float
    row: float
    fields: dict[str, float]

    def of(self, missing: Missing) -> float:
        """Bytes that are still to be written."""
        return self.store * missing.new + self.sample * missing.first + self.row * missing.rows


def _missing(
    plan: ViewPlan, target: Target, views: int, part: tuple[int, int], **settings: Any
) -> Missing:
    """What a store lacks, found without changing it."""
    work = find_outstanding(target.path, **store_settings(plan, target, views, **settings))
    pending = work.pending(part)
    first = sum(shard.rows for shard in pending if shard.view == 0)
    return Missing(sum(shard.rows for shard in pending), first, not work.begun)


def _warm_up(
    plan: ViewPlan,
    targets: Sequence[Target],
    views_per_decode: int,
    batch_size: int,
    device: torch.device,
    workers: int,
) -> tuple[list[dict[str, np.ndarray]], float]:
    """Of each teacher its fields float32 (views, n, *shape) of the first rows; rows per second of all.

    Two views of the rows where the plan has two: what later views cost beside the first differs.
    """
    views = range(min(2, plan.views or 2))
    starts = range(0, min(len(plan), WARM_UP_BATCHES * batch_size), batch_size)
    cuts = [np.arange(i, min(i + batch_size, len(plan))) for i in starts]
    # Views beyond the two are forwarded for the time that they take, and not kept.
    seen = range(max(len(views), min(views_per_decode, plan.views or views_per_decode)))
    decoded = [seen[i : i + views_per_decode] for i in range(0, len(seen), views_per_decode)]
    requests = [(rows, group) for rows in cuts for group in decoded]
    if len(requests) == 1:
        requests *= 2  # timed the second time
    outputs: list[dict[str, list[list[np.ndarray]]]] = [
        {name: [[] for _ in views] for name in target.teacher.fields} for target in targets
    ]
    begun, timed, kept = time.perf_counter(), 0, 0
    asked = (together(rows, group) for rows, group in requests)
    stream = plan.stream(asked, device=device, workers=workers)
    for number, ((_, group), batches) in enumerate(zip(requests, stream, strict=True)):
        for view, batch in zip(group, batches.by_view(len(group)), strict=True):
            for target, parts in zip(targets, outputs, strict=True):
                for name, values in target.teacher(batch.images).items():
                    if view in views:
                        parts[name][view].append(values.cpu().numpy())
                        kept += parts[name][view][-1].nbytes
        if number == 0:
            begun = time.perf_counter()
            continue
        timed += len(batches)
        enough = time.perf_counter() - begun > WARM_UP_SECONDS or kept > WARM_UP_BYTES
        if group[-1] == seen[-1] and enough:
            break
    seconds = time.perf_counter() - begun
    joined = [
        {
            name: np.stack([np.concatenate(rows)[: len(plan)] for rows in of_views])
            for name, of_views in parts.items()
        }
        for parts in outputs
    ]
    return joined, timed / seconds


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
