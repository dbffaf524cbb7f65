"""The replay proof: do the pixels here equal those that the teacher saw?

A store keeps, for a few (sample, view) pairs, the SHA-256 of the augmented pixels and a coarse
fingerprint: the values of a lattice of single pixels. A reader recomputes them before it trains:

    identical    every digest is equal
    equivalent   lattices differ by at most `MEAN_TOLERANCE` grey levels on average and
                 `MAX_TOLERANCE` anywhere: another decoder or device rounded differently
    refused      anything else: `MismatchError` with the likely causes
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import PIL.features
import torch
import torchvision

from kdcache.data.dataset import Rows
from kdcache.data.encoded.decoding import decoder
from kdcache.philox import derive_seed
from kdcache.stages import counted
from kdcache.views.plan import ViewPlan
from kdcache_stores import Probe, Store
from kdcache_stores.errors import MismatchError, StoreError
from kdcache_stores.format.probing import make_probe

PROBES_PER_VIEW = 8
PROBES_CHECKED = 32
MEAN_TOLERANCE = 0.5
MAX_TOLERANCE = 4


@dataclass(frozen=True)
class Replayed:
    """The outcome of a check that passed.

    Attributes:
        status: "identical" or "equivalent".
        checked: number of probes recomputed.
        identical: how many were equal bit by bit.
        mean_difference: mean absolute difference over the lattices, in grey levels of 255.
        max_difference: the largest one.
        changes: what differs in versions since the dump, "name: then -> now".
    """

    status: str
    checked: int
    identical: int
    mean_difference: float
    max_difference: int
    changes: list[str]

    def __str__(self) -> str:
        if self.status == "identical":
            return f"replay: {self.checked} probed views are identical to those of the dump"
        return (
            f"replay: {self.checked - self.identical} of {self.checked} probed views differ from "
            "those of "
            f"the dump by {self.mean_difference:.3f} of 255 grey levels on average, at most "
            f"{self.max_difference} (tolerance {MEAN_TOLERANCE} and {MAX_TOLERANCE}): equivalent"
            + (f"; changed since: {', '.join(self.changes)}" if self.changes else "")
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
        images: uint8 (B, C, H, W), as `ViewPlan.stream` gave them.
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
    changes = _changes(store.provenance)
    equal = [then.sha256 == now.sha256 for then, now in zip(stored, recomputed, strict=True)]
    total = worst = entries = 0
    far = []
    for then, now in zip(stored, recomputed, strict=True):
        a, b = (np.frombuffer(probe.coarse, np.uint8).astype(np.int64) for probe in (then, now))
        if a.shape != b.shape:
            raise _refused(plan, store, changes, equal, [then], "the views have another shape")
        difference = np.abs(a - b)
        total, entries = total + int(difference.sum()), entries + len(difference)
        worst = max(worst, int(difference.max()))
        if difference.mean() > 2 * MEAN_TOLERANCE or difference.max() > MAX_TOLERANCE:
            far.append(then)
    mean = total / entries
    if far or mean > MEAN_TOLERANCE:
        what = f"by {mean:.2f} of 255 grey levels on average, at most {worst}"
        raise _refused(plan, store, changes, equal, far, what)
    status = "identical" if all(equal) else "equivalent"
    return Replayed(status, len(equal), sum(equal), mean, worst, changes)


def _refused(
    plan: ViewPlan,
    store: Store,
    changes: list[str],
    equal: list[bool],
    far: list[Probe],
    what: str,
) -> MismatchError:
    causes = []
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
            causes.append(f"dataset: these images were changed, re-encoded or replaced: {keys}")
        else:
            causes.append(
                "dataset: same keys and labels, but all images differ: shifted rows, re-encoded or "
                f"resized files (e.g. {keys}); or another decoder"
            )
        causes += [f"version: {change}" for change in changes]
    return MismatchError(
        f"replay: {len(equal) - sum(equal)} of {len(equal)} probed views are not those that the "
        "teacher "
        f"saw; they differ {what} (tolerance {MEAN_TOLERANCE} and {MAX_TOLERANCE}). "
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
