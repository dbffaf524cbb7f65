"""The rows that teachers forward before a dump begins: for its checks, its estimate and its fits alike.

All that looks at a teacher before the first stored row costs at most `allowed` forwards of it. An encoding
that must be fitted has calibration rows beyond that: they are forwarded once, and serve all three.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdcache.data.dataset import Rows
from kdcache.stages import stage
from kdcache.teachers.teacher import Teacher
from kdcache.views.batches import together
from kdcache.views.plan import ViewPlan

#: Forwards of each teacher that may be spent before its dump: so many, or this share of its rows.
FEWEST, SHARE = 128, 0.02
#: Of them, what loading a teacher spends on the shapes of its fields.
LOADING = 8
#: The rows that are not calibration rows end after so many batches of a view, or seconds.
BATCHES, SECONDS = 8, 2.0
#: And where the outputs kept for measuring take so much memory.
BYTES = 2**28


def allowed(rows: int) -> int:
    """How many forwards of a teacher may be spent before a dump of so many rows, loading it left out."""
    return max(FEWEST, int(SHARE * rows)) - LOADING


@dataclass(frozen=True)
class FirstRows:
    """What the teachers gave for some rows, in their first two views.

    Attributes:
        rows: int64 (n,), of the plan.
        outputs: of each teacher its fields, float32 (views, n, *shape); one view where the plan has one.
        calibration: whether these are the rows that encodings are fitted to.
        forwards: of each teacher.
        seconds, timed: of the forwards that were timed, and how many rows those were.
    """

    rows: Rows
    outputs: list[dict[str, np.ndarray]]
    calibration: bool
    forwards: int
    seconds: float
    timed: int

    @property
    def rows_per_second(self) -> float:
        """Of all teachers together."""
        return self.timed / max(self.seconds, 1e-9)


def first_rows(
    plan: ViewPlan,
    teachers: Sequence[Teacher],
    calibration: Rows,
    *,
    batch_size: int,
    device: torch.device,
    workers: int,
    views_per_decode: int = 1,
    most: int = FEWEST // 2,
) -> FirstRows:
    """Forward the calibration rows, or a few of the first ones where there are none.

    Batches are of one view, so a row of the calibration is forwarded in the same batch by every dump.

    Args:
        calibration: int64 (n,), sorted; all of them are forwarded. Without any, the first rows are.
        most: forwards of each teacher at most, where these are no calibration rows.

    The other arguments are those of `dump`.
    """
    views = range(min(2, plan.views or 2))
    # Views beyond the two are forwarded for the time that they take, and not kept.
    seen = range(max(len(views), min(views_per_decode, plan.views or views_per_decode)))
    rows, fits = calibration, len(calibration) > 0
    size = batch_size
    if fits:
        seen = views
    else:
        size = min(batch_size, max(1, most // (2 * len(seen))))
        rows = np.arange(min(len(plan), size * min(BATCHES, max(2, most // (size * len(seen))))))
    cuts = [rows[i : i + size] for i in range(0, len(rows), size)]
    decoded = [seen[i : i + views_per_decode] for i in range(0, len(seen), views_per_decode)]
    requests = [(cut, group) for cut in cuts for group in decoded]
    kept: list[dict[str, list[list[np.ndarray]]]] = [
        {name: [[] for _ in views] for name in teacher.fields} for teacher in teachers
    ]
    what = "forwarding calibration rows" if fits else "forwarding the first rows"
    begun, timed, nbytes, done = time.perf_counter(), 0, 0, 0
    asked = (together(cut, group) for cut, group in requests)
    with stage(what, "rows", len(rows) * len(seen)) as advance:
        stream = plan.stream(asked, device=device, workers=workers)
        for number, ((_, group), batches) in enumerate(zip(requests, stream, strict=True)):
            for view, batch in zip(group, batches.by_view(len(group)), strict=True):
                for teacher, parts in zip(teachers, kept, strict=True):
                    for name, values in teacher(batch.images).items():
                        if view in views:
                            parts[name][view].append(values.cpu().numpy())
                            nbytes += parts[name][view][-1].nbytes
            done += len(batches)
            advance(len(batches))
            if number == 0 and len(requests) > 1:  # whatever is made at the first one is not timed
                begun = time.perf_counter()
                continue
            timed += len(batches)
            enough = time.perf_counter() - begun > SECONDS or nbytes > BYTES
            if not fits and group[-1] == seen[-1] and enough:
                break
    seconds = time.perf_counter() - begun
    outputs = [
        {
            name: np.stack([np.concatenate(rows) for rows in of_views])
            for name, of_views in of.items()
        }
        for of in kept
    ]
    count = next(iter(outputs[0].values())).shape[1]
    return FirstRows(rows[:count], outputs, fits, done, seconds, timed)
