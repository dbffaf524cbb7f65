"""A few thousand logits of a few views, evenly chosen: what the rules about stores look at.

What it costs: at most `VIEWS` views of a store are opened, and of each as many whole shards as fit into
`BUDGET` for all of them (two at least, or all there are): 40 MB for CIFAR-100 in float16, half a gigabyte
for ImageNet. Of these, `ROWS` rows are decoded. Nothing else is fetched from a remote store, and no view that
the training will not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.data.dataset import Rows
from kdcache_stores import Store

VIEWS = 4
ROWS, PER_CLASS, MOST_ROWS = 2000, 20, 4000
BUDGET = 256 * 2**20

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """Logits of the same rows and views of every store.

    Attributes:
        rows: int64 (R,), rows of the stores, of the student's samples.
        labels: int64 (R,), -1 where unlabelled.
        views: the numbers of the views, (V,).
        logits: per store float32 (V, R, K).
        rest: of the first store, float32 (S, K), rows of the first of the views that the student does
            not train on; S is 0 where it trains on all.
        rest_labels: int64 (S,), of those rows.
    """

    rows: Rows
    labels: Rows
    views: tuple[int, ...]
    logits: tuple[Logits, ...]
    rest: Logits
    rest_labels: Rows


def draw(stores: Sequence[Store], views: Sequence[int], rows: Rows | None = None) -> Sample:
    """Read a sample.

    Args:
        stores: of one plan, one at least, each with logits.
        views: numbers of stored views to choose from.
        rows: rows of the stores that the student trains on (default: all).
    """
    first = stores[0]
    every = np.arange(len(first))
    rows = every if rows is None else np.sort(rows)
    chosen = _even(np.asarray(views, np.int64), VIEWS)
    near = _near(stores, len(chosen), rows)
    wanted = min(max(ROWS, PER_CLASS * first.classes), MOST_ROWS)
    own = _even(np.intersect1d(rows, near), wanted)
    others = _even(np.setdiff1d(near, rows), wanted // 2)
    both = np.concatenate([own, others])
    rest = np.zeros((0, first.classes), np.float32)
    logits = []
    for number, store in enumerate(stores):
        read = np.empty((len(chosen), len(own), store.classes), np.float32)
        for place, view in enumerate(chosen):
            with_rest = number == 0 and place == 0
            rows_read = store.read(int(view), both if with_rest else own)
            read[place] = rows_read[: len(own)]
            rest = rows_read[len(own) :] if with_rest else rest
        logits.append(read)
    return Sample(
        own,
        first.labels[own],
        tuple(int(v) for v in chosen),
        tuple(logits),
        rest,
        first.labels[others],
    )


def _near(stores: Sequence[Store], views: int, rows: Rows) -> Rows:
    """All rows of some shards that hold wanted ones, evenly spaced, as many as the budget allows."""
    first = stores[0]
    shards = first.shards(first.first_view)
    starts = np.array([shard.start for shard in shards], np.int64)
    touched = np.unique(np.searchsorted(starts, rows, side="right") - 1)
    size = sum(store.nbytes_of("logits") / store.n_views for store in stores) / len(shards)
    numbers = _even(touched, max(2, int(BUDGET / (views * max(size, 1)))))
    return np.concatenate([np.arange(shards[n].start, shards[n].stop) for n in numbers])


def _even(items: Rows, most: int) -> Rows:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return items[np.linspace(0, len(items) - 1, most).round().astype(np.int64)]
