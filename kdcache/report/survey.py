"""Statistics of a store's logits, measured view by view in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcache_stores import Shard, Store

BUDGET = 4e8
"""Logits that are read at most (1.6 GB once decoded): more are sampled, and the page says so."""
FEW_VIEWS = 16

Floats = NDArray[np.float64]
T = TypeVar("T")


@dataclass
class Survey:
    """Statistics of a store's logits.

    Attributes:
        views: which were read.
        rows: int64, which were read.
        labelled: how many of the rows have a label.
        top1: view -> top-1 of the teacher in [0, 1]; empty without labels.
        class_hits, class_rows: int64 (K,), correct predictions and rows over all views, by true class.
        statistics: "mean", "std", "entropy" -> float32 (rows x views,), of each row's logits; the
            entropy is that of the softmax at T=1, in nats.
        variation: float64 (rows,): root mean square over classes of a logit's std over the views.
    """

    views: list[int]
    rows: NDArray[np.int64]
    labelled: int
    top1: dict[int, float] = field(default_factory=dict)
    class_hits: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    class_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    statistics: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    variation: Floats = field(default_factory=lambda: np.zeros(0))

    def most_varied(self, count: int) -> NDArray[np.int64]:
        """Rows of the store whose logits vary most over the views, most first."""
        order = np.argsort(-self.variation, kind="stable")[:count]
        chosen: NDArray[np.int64] = self.rows[order]
        return chosen


def survey(store: Store, budget: float = BUDGET, few_views: int = FEW_VIEWS) -> Survey:
    """Read a store, or an even sample of its views and then of its shards where it is very large.

    Args:
        budget: logits to read at most (but at least a shard of a view).
        few_views: so many views are read, of fewer samples, where the budget is not enough for them.
    """
    views, shards = _chosen(store, budget, few_views)
    labels, classes = store.labels, store.classes
    rows = np.concatenate([np.arange(shard.start, shard.stop) for shard in shards])
    hits = dict.fromkeys(views, 0)
    class_hits, class_rows = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    parts: dict[str, list[NDArray[np.float32]]] = {"mean": [], "std": [], "entropy": []}
    variation = []
    for shard in shards:
        part = slice(shard.start, shard.stop)
        known = labels[part] >= 0
        total, squares = np.zeros((shard.rows, classes)), np.zeros((shard.rows, classes))
        first: NDArray[np.float32] | None = None
        for view in views:
            logits = store.read(view, part)
            for name, values in _statistics(logits).items():
                parts[name].append(values)
            # Sums of the distance to the first view: far from the cancellation of large squares.
            first = logits if first is None else first
            total += logits - first
            squares += np.square(logits - first, dtype=np.float64)
            right = (logits.argmax(axis=1) == labels[part]) & known
            hits[view] += int(right.sum())
            class_hits += np.bincount(labels[part][right], minlength=classes)
            class_rows += np.bincount(labels[part][known], minlength=classes)
        spread = squares / len(views) - np.square(total / len(views))
        variation.append(np.sqrt(np.maximum(spread, 0).mean(axis=1)))
    labelled = int((labels[rows] >= 0).sum())
    return Survey(
        views=views,
        rows=rows,
        labelled=labelled,
        top1={view: hits[view] / labelled for view in views} if labelled else {},
        class_hits=class_hits,
        class_rows=class_rows,
        statistics={name: np.concatenate(chunks) for name, chunks in parts.items()},
        variation=np.concatenate(variation),
    )


def _chosen(store: Store, budget: float, few_views: int) -> tuple[list[int], list[Shard]]:
    """Views and shards (of view 0, for their rows) that stay within the budget, evenly spaced."""
    views, shards = list(store.view_range), store.shards(store.first_view)
    size = len(store) * store.classes
    most = max(few_views, int(budget / size))
    views = _even(views, most)
    share = budget / (size * len(views))
    return views, _even(shards, max(1, int(share * len(shards))))


def _even(items: list[T], most: int) -> list[T]:
    if len(items) <= most:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _statistics(logits: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    mean, std = logits.mean(axis=1), logits.std(axis=1)
    shifted = logits - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=1)
    entropy = np.log(total) - (weights * shifted).sum(axis=1) / total
    return {"mean": mean, "std": std, "entropy": np.maximum(entropy, 0)}
