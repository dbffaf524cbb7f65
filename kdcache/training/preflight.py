"""The checks of a training, before its first step and after its last; see `preparation`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.checks.all_rules import run_rules
from kdcache.checks.case import Case
from kdcache.checks.earlier_runs import Baseline, Fit, Pruned, baseline_beside, read_baseline
from kdcache.checks.finding import Finding
from kdcache.checks.rules.smaller import pruned_too_far
from kdcache.checks.rules.view_count import fit
from kdcache.training.settings import Training
from kdcache.views.cached import CachedViews
from kdcache_stores import Store, TrainingError


class Preflight:
    """What the checks say of a training before its first step, and after its last.

    Args:
        training: what will be trained.
        views: what it reads.
        stores: those of which it reads logits.
        out: the run's directory, which is not touched; finished runs beside it may be the baseline.
        baseline: the run of the student's baseline, if the user names one.

    Attributes:
        findings: before the first step.
        notes: what was not checked, and why.
    """

    def __init__(
        self,
        training: Training,
        views: CachedViews,
        stores: Sequence[Store],
        out: Path,
        baseline: str | os.PathLike[str] | None = None,
    ) -> None:
        self.notes: list[str] = []
        fetched = [store.where for store in stores if not store.keeps]
        if fetched:
            stores = []
            self.notes.append(
                f"{', '.join(fetched)}: the logits were not checked before the training, which without "
                "a cache (--cache-size) would fetch some of them twice; `kdcache check` does"
            )
        distills = training.objective.needs_teacher
        self.case = Case(
            stores=stores,
            objective=training.objective,
            labels=views.plan.samples.labels[views.rows],
            rows=views.rows,
            views=range(views.first, views.first + (views.views or 0)),
            epochs=training.optimization.epochs,
            batch_size=training.optimization.batch_size,
            baseline=_baseline(training, views, out, baseline) if distills else None,
            prune=Pruned.of(training.pruning, training.init_weights),
        )
        self.findings = run_rules(self.case)

    def require_no_findings(self) -> None:
        """Refuse to train where there is a finding.

        Raises:
            TrainingError: naming all of them.
        """
        if self.findings:
            raise TrainingError(
                f"{len(self.findings)} warning(s), which --strict makes errors:",
                *(f"- {finding}" for finding in self.findings),
            )

    def after(self, records: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """What the records of all epochs show that nothing showed before."""
        end = Fit.of(records)
        if not self.case.stores or end is None:
            return []
        case = self.case.finished(end)
        return [*fit(case), *pruned_too_far(case)]


def _baseline(
    training: Training, views: CachedViews, out: Path, given: str | os.PathLike[str] | None
) -> Baseline | None:
    wanted = {"model.name": training.model, "data.fingerprint": views.dataset.fingerprint}
    if given is not None:
        return read_baseline(given, wanted)
    return baseline_beside(out, wanted | {"data.train_samples": training.train_samples})
