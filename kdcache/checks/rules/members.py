"""Rules about several teachers: does each of them count, and does it add something?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from kdcache.checks.case import Case
from kdcache.checks.finding import Finding
from kdcache.methods.ensembles import shares

#: Ratio of the weighted spreads of two teachers' logits from which the mean is the larger one's: it then
#: has 80% of the variance. The teachers published for CIFAR-100 differ by 1.8 at most (resnet110 3.88,
#: resnet32x4 2.11 on average over the test set).
SCALES = 2.0

#: Mean correlation over the classes of two teachers' logits above which they are one teacher. Two seeds of a
#: resnet20, both right on 98% of the test digits, have 0.909; one resnet20 on CIFAR-100 run with its own
#: and with ImageNet's normalisation has 0.990.
ALIKE = 0.99


def scales(case: Case) -> Iterator[Finding]:
    """A mean of logits that one teacher decides alone."""
    loss = case.loss
    if len(case.stores) < 2 or loss.combine != "mean-logits":
        return
    fixed = None if isinstance(loss.weights, str) else loss.weights
    spreads = [float(z.std(-1).mean()) for z in case.sample.logits]
    parts = [w * s for w, s in zip(shares(fixed, len(spreads)), spreads, strict=True)]
    parts = [part for part in parts if part > 0]
    uneven = len(parts) > 1 and max(parts) > SCALES * min(parts)
    if not uneven or max(spreads) <= SCALES * min(spreads):  # uneven weights alone are wanted
        return
    largest, smallest = int(np.argmax(spreads)), int(np.argmin(spreads))
    even = ",".join(f"{min(spreads) / spread:.2g}" for spread in spreads)
    yield Finding(
        "scales",
        f"The logits of {case.stores[largest].where} spread by {spreads[largest]:.2g}, those of "
        f"{case.stores[smallest].where} by {spreads[smallest]:.2g}: with these weights one has "
        f"{max(parts) / min(parts):.1f} times the other's part in the mean of logits and decides it alone.",
        f"--combine mean-zscores with --standardize, or --combine mean-probs, or "
        f"--teacher-weights {even}.",
    )


def alike(case: Case) -> Iterator[Finding]:
    """Teachers whose logits are alike for every sample: more stores to read, and nothing more to learn.

    By Pearson's correlation over the classes of each row: of two teachers that are right everywhere
    it still shows whether they agree on the other classes.
    """
    if len(case.stores) < 2:
        return
    pairs = list(combinations(range(len(case.stores)), 2))
    correlations = [correlation(case.sample.logits[a], case.sample.logits[b]) for a, b in pairs]
    if min(correlations) <= ALIKE:
        return
    yield Finding(
        "alike",
        f"The {len(case.stores)} teachers are alike: their logits correlate by {min(correlations):.4f} "
        "over the classes of a sample. Nothing is gained over one of them.",
        "a single --store, or teachers of another seed or architecture.",
    )


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over rows of Pearson's correlation over the last axis; constant rows are left out."""
    x, y = (z.astype(np.float64) - z.mean(-1, keepdims=True) for z in (a, b))
    size = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    known = size > 0
    return float(((x * y).sum(-1)[known] / size[known]).mean()) if known.any() else 1.0
