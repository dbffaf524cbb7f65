"""The checks of a training, before its first step and after its last; see `preparation`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.checks.all_rules import OF_THE_END, run_rules
from kdcache.checks.case import Case
from kdcache.checks.earlier_runs import Baseline, Fit, Pruned, baseline_beside, read_baseline
from kdcache.checks.finding import Finding
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
        self.training, self.out, self.named = training, out, baseline is not None
        self.wanted = {
            "model.name": training.model,
            "data.fingerprint": views.dataset.fingerprint,
        }
        fetched = [store.where for store in stores if not store.keeps]
        if fetched:
            stores = []
            self.notes.append(
                f"{', '.join(fetched)}: the logits were not checked before the training, which without "
                "a cache (--cache-size) would fetch some of them twice; `kdcache check` does"
            )
        first = None
        if training.objective.needs_teacher:
            first = self._beside() if baseline is None else read_baseline(baseline, self.wanted)
        self.case = Case(
            stores=stores,
            objective=training.objective,
            labels=views.plan.samples.labels[views.rows],
            rows=views.rows,
            views=range(views.first, views.first + (views.views or 0)),
            epochs=training.optimization.epochs,
            batch_size=training.optimization.batch_size,
            baseline=first,
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

    def after(
        self, records: Sequence[Mapping[str, Any]], test_samples: int | None = None
    ) -> list[Finding]:
        """What the records of all epochs show that nothing showed before.

        Where the user named no baseline, it is now the one beside of as many epochs and the same seed,
        which may have been trained side by side.

        Args:
            test_samples: that the accuracies are of.
        """
        end = Fit.of(records, test_samples)
        if end is None:
            return []
        alike = {
            "training.epochs": self.training.optimization.epochs,
            "training.seed": self.training.seed,
        }
        case = self.case.finished(end, self.case.baseline if self.named else self._beside(alike))
        before = {finding.rule for finding in self.findings}
        return [finding for finding in run_rules(case, OF_THE_END) if finding.rule not in before]

    def _beside(self, alike: Mapping[str, Any] | None = None) -> Baseline | None:
        """A baseline beside that saw as many samples, and is alike in this too."""
        samples = {"data.train_samples": self.training.train_samples}
        return baseline_beside(self.out, self.wanted | samples | dict(alike or {}))
