"""The replay proof: do the pixels here equal those that the teacher saw?

A store keeps, for a few (sample, view) pairs, the SHA-256 of the augmented pixels and a coarse
fingerprint: the values of a lattice of single pixels. A reader recomputes them before it trains:

    identical    every digest is equal
    equivalent   lattices differ by at most `MEAN_TOLERANCE` grey levels on average and
                 `MAX_TOLERANCE` anywhere: another decoder or device rounded differently
    refused      anything else: `MismatchError` with the likely causes

Items that are no images are compared in the same way, relative to their largest value, with
`ITEM_TOLERANCE`; token ids, and items most of whose values are 0, must be identical.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import PIL
import PIL.features
import torch
import torchvision
from numpy.typing import NDArray

from kdcache.data.dataset import Rows
from kdcache.data.encoded.decoding import decoder
from kdcache.data.item import Item
from kdcache.philox import derive_seed
from kdcache.stages import counted
from kdcache.views.plan import ViewPlan
from kdcache_stores import Probe, Store
from kdcache_stores.errors import MismatchError, StoreError, about
from kdcache_stores.format.probing import make_probe
from kdcache_stores.read.verifying import require_probes

PROBES_PER_VIEW = 8
PROBES_CHECKED = 32
MEAN_TOLERANCE = 0.5
MAX_TOLERANCE = 4
ITEM_TOLERANCE = 1e-4


class _Scale(NamedTuple):
    """In what differences between lattices are stated, and how large they may be."""

    unit: str
    mean: float
    most: float

    @classmethod
    def of(cls, item: Item | None) -> _Scale:
        if item is None:
            return cls("of 255 grey levels", MEAN_TOLERANCE, MAX_TOLERANCE)
        tolerance = ITEM_TOLERANCE if item.dtype == "float32" else 0
        return cls("of their largest value", tolerance, tolerance)

    def differ(self, mean: float, most: float) -> str:
        return f"by {mean:.3g} {self.unit} on average, at most {most:.3g}"

    def __str__(self) -> str:
        return f"tolerance {self.mean:g} and {self.most:g}"


@dataclass(frozen=True)
class Replayed:
    """The outcome of a check that passed.

    Attributes:
        status: "identical" or "equivalent".
        checked: number of probes recomputed.
        identical: how many were equal bit by bit.
        mean_difference: mean absolute difference over the lattices, in grey levels of 255, or of the
            largest value of items that are no images.
        max_difference: the largest one.
        changes: what differs in versions since the dump, "name: then -> now".
        item: what the views are where they are no images.
    """

    status: str
    checked: int
    identical: int
    mean_difference: float
    max_difference: float
    changes: list[str]
    item: Item | None = None

    def __str__(self) -> str:
        if self.status == "identical":
            return f"replay: {self.checked} probed views are identical to those of the dump"
        scale = _Scale.of(self.item)
        return (
            f"replay: {self.checked - self.identical} of {self.checked} probed views differ from "
            f"those of the dump {scale.differ(self.mean_difference, self.max_difference)} ({scale}): "
            "equivalent" + (f"; changed since: {', '.join(self.changes)}" if self.changes else "")
        )


def probe_rows(plan: ViewPlan, view: int) -> Rows:
    """The rows to probe in a view: int64, ascending, spread evenly from an offset of the view's
    own.
    """
    count = min(PROBES_PER_VIEW, len(plan))
    offset = derive_seed(plan.seed, "probe", view) % len(plan)
    return np.sort((offset + np.arange(count) * len(plan) // count) % len(plan))


def measure(rows: Sequence[int] | Rows, view: int, images: torch.Tensor) -> list[Probe]:
    """Probes of views that are at hand.

    Args:
        rows: (B,) rows of the plan.
        view: their view.
        images: uint8 (B, C, H, W), or other items, as `ViewPlan.stream` gave them.
    """
    pixels = images.cpu()
    return [
        make_probe(int(row), int(view), image.numpy())
        for row, image in zip(rows, pixels, strict=True)
    ]


def check(plan: ViewPlan, store: Store, device: str | torch.device = "cpu") -> Replayed:
    """Recompute up to `PROBES_CHECKED` probes of a store, spread over its views.

    Raises:
        StoreError: the store holds no probes.
        MismatchError: the pixels here are not those of the dump.
    """
    with about(store.where):
        return _check(plan, store, device)


def _check(plan: ViewPlan, store: Store, device: str | torch.device) -> Replayed:
    require_probes(store)
    probes = [p for p in store.probes if plan.has(p.row)]
    if not probes:
        raise StoreError(
            "the store holds no probes of these samples, so its views cannot be verified"
        )
    count = min(PROBES_CHECKED, len(probes))
    chosen = [probes[i * len(probes) // count] for i in range(count)]
    rows = np.array([probe.row for probe in chosen], dtype=np.int64)
    views = np.array([probe.view for probe in chosen], dtype=np.int64)
    batches = [(rows, views)]
    if plan.dataset.images is None:  # decode one by one: no size must fit another
        batches = [(rows[i : i + 1], views[i : i + 1]) for i in range(count)]
    now = [
        probe
        for batch in counted(
            plan.stream(batches, device), "replaying views", "batches", len(batches)
        )
        for row, view, image in zip(batch.rows, batch.views, batch.images, strict=True)
        for probe in measure([row], int(view), image[None])
    ]
    return compare(plan, store, chosen, now)


def compare(plan: ViewPlan, store: Store, stored: list[Probe], recomputed: list[Probe]) -> Replayed:
    """Compare recomputed probes with the stored ones; see the module."""
    changes, item = _changes(store.provenance), plan.dataset.item
    scale = _Scale.of(item)
    equal = [then.sha256 == now.sha256 for then, now in zip(stored, recomputed, strict=True)]
    total, worst, entries = 0.0, 0.0, 0
    far = []
    for then, now in zip(stored, recomputed, strict=True):
        a, b = (_lattice(probe, item) for probe in (then, now))
        if a.shape != b.shape:
            raise _refused(plan, store, changes, equal, [then], "the views have another shape")
        difference = np.abs(a - b)
        if item is not None:
            difference /= max(np.abs(a).max(), np.finfo(np.float32).tiny)
        total, entries = total + float(difference.sum()), entries + len(difference)
        worst = max(worst, float(difference.max()))
        beyond = difference.mean() > 2 * scale.mean or difference.max() > scale.most
        unknown = item is not None and then.sha256 != now.sha256 and not _is_dense(a, item)
        if beyond or unknown:
            far.append(then)
    mean = total / entries
    if far or mean > scale.mean:
        raise _refused(plan, store, changes, equal, far, scale.differ(mean, worst))
    status = "identical" if all(equal) else "equivalent"
    return Replayed(status, len(equal), sum(equal), mean, worst, changes, item)


def _is_dense(lattice: NDArray[np.float64], item: Item) -> bool:
    """Whether a few values of an item stand for all: not of token ids, nor where most values are 0."""
    return item.dtype == "float32" and 2 * int(np.count_nonzero(lattice)) >= len(lattice)


def _lattice(probe: Probe, item: Item | None) -> NDArray[np.float64]:
    """The values that a probe keeps of a view."""
    return np.frombuffer(probe.coarse, np.uint8 if item is None else "<f8").astype(np.float64)


def _refused(
    plan: ViewPlan,
    store: Store,
    changes: list[str],
    equal: list[bool],
    far: list[Probe],
    what: str,
) -> MismatchError:
    causes = []
    things, maker = (
        ("images", "decoder") if plan.dataset.item is None else ("items", "way to make them")
    )
    here, stored = plan.to_store(), store.plan
    if here.augmentation != stored.augmentation:
        causes.append(f"augmentation: {stored.augmentation} then, {here.augmentation} now")
    if here.seed != stored.seed:
        causes.append(f"seed: {stored.seed} then, {here.seed} now")
    if here.fingerprint != stored.fingerprint:
        causes.append(
            f"dataset: fingerprint {stored.fingerprint[:16]} then, {here.fingerprint[:16]} now"
        )
    if not causes:
        keys = [plan.samples.keys[probe.row] for probe in far[:3]]
        if any(equal):
            causes.append(f"dataset: these {things} were changed, re-encoded or replaced: {keys}")
        else:
            causes.append(
                f"dataset: same keys and labels, but all {things} differ: shifted rows, re-encoded or "
                f"resized files (e.g. {keys}); or another {maker}"
            )
        causes += [f"version: {change}" for change in changes]
    return MismatchError(
        f"replay: {len(equal) - sum(equal)} of {len(equal)} probed views are not those that the "
        "teacher "
        f"saw; they differ {what} ({_Scale.of(plan.dataset.item)}). "
        f"Likely causes: {'; '.join(causes)}"
    )


def versions() -> dict[str, str]:
    """Everything outside the plan that pixels can depend on; a dump keeps it as provenance."""
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "libjpeg": str(
            PIL.features.version_feature("libjpeg_turbo") or PIL.features.version_codec("jpg")
        ),
        "decoder": decoder(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def _changes(provenance: dict[str, Any]) -> list[str]:
    then = provenance.get("versions", {})
    return [
        f"{name}: {then[name]} -> {now}"
        for name, now in versions().items()
        if name in then and then[name] != now
    ]
