"""Students trained side by side: their means over seeds, and what each gains over labels alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kdcache.report.collect import Difference, Spread, baseline_of, difference, grouped, read_run


class Means(NamedTuple):
    """Runs that differ only in their seed, over these.

    Attributes:
        label: tells them apart from the others.
        top1: on the test set after the last epoch, 0 to 1.
        baseline: label of those from labels alone that they are compared with; None without any.
        gain: over it, see `difference`.
    """

    label: str
    top1: Spread
    baseline: str | None = None
    gain: Difference | None = None


def means_over_seeds(paths: Sequence[Path]) -> list[Means]:
    """The means of finished runs, in order of appearance; of two equal runs the first counts.

    Raises:
        DataError: not a run, or a damaged one.
    """
    groups = grouped([read_run(path) for path in paths], equal=True)
    means = []
    for group in groups:
        values = group.values("last_top1")
        top1 = Spread.of(values.values())
        if top1 is None:
            continue
        base = baseline_of(group, groups)
        theirs = base.values("last_top1") if base else {}
        gain = difference(values, theirs)
        if base is None or gain is None:
            means.append(Means(group.label, top1))
            continue
        means.append(Means(group.label, top1, base.label, gain))
    return means
