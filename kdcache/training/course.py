"""One training among those that share a stream of batches: its learner, and the run that it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.distributed import Ranks
from kdcache.run_schema import require_shape
from kdcache.runs import CHECKPOINT, METRICS, Run
from kdcache.training.checkpoints import Checkpoints, Pace
from kdcache.training.learning.learner import Learner
from kdcache.training.observer import TrainingObserver
from kdcache.training.preflight import Preflight
from kdcache_stores import DataError, MismatchError, TrainingError


class Course:
    """A learner on its way through the epochs.

    Under `torchrun` rank 0 alone writes and is watched.

    Args:
        learner: what is trained.
        out: the run's directory.
        watch: told of the progress.
        preflight: what the checks say of it; None where nothing is checked.
        stores: digests of the stores that are read.

    Attributes:
        group: the courses whose students teach each other, itself among them; else itself alone. They
            go through the epochs together, and each one's checkpoint holds the states of all, so that no
            interruption leaves them apart.
        done: epochs that are over.
        records: theirs.
        teacher_forwards: images that teachers in the loop have seen for it.
        failure: why it cannot go on.
    """

    def __init__(
        self,
        learner: Learner,
        out: Path,
        watch: TrainingObserver,
        preflight: Preflight | None,
        stores: list[str],
        ranks: Ranks,
    ) -> None:
        self.learner, self.out, self.watch, self.preflight = learner, out, watch, preflight
        self.stores, self.ranks = stores, ranks
        self.training = learner.training
        self.group: Sequence[Course] = [self]
        self.done, self.teacher_forwards = 0, 0
        self.failure: TrainingError | None = None
        self.records: list[dict[str, Any]] = []

    def begin(self, config: Mapping[str, Any]) -> None:
        """Open the run; what could be refused of the training was refused before anything is written."""
        # Rank 0 makes the run; the others then find the same one there, before anything is written.
        if not self.ranks.is_first:
            self.ranks.wait()
        self.run = Run(self.out, config)
        if self.ranks.is_first:
            self.ranks.wait()
        self.ranks.wait()

    def resume(self, pace: Pace) -> Checkpoints:
        """Load the checkpoint, if there is one, and go on to write them.

        Raises:
            MismatchError: it was trained from other stores.
            TrainingError: a student that teaches it is at its end already.
            DataError: it is of no training like this, or the metrics of its epochs are not there.
        """
        state = self._newest()
        if state is not None:
            self._load(state)
        gone = [c.run.path for c in self.group if c.run.summary() is not None]
        if gone and self.done < self.training.optimization.epochs:
            raise TrainingError(
                f"{self.run.path} is at epoch {self.done}, and {gone[0]}, whose student teaches it, is "
                "finished: delete both to train them anew, or give another --out."
            )
        self.records = [record for record in self.run.metrics() if record["epoch"] <= self.done]
        if (last := _last(self.records)) != self.done:
            raise DataError(
                f"{self.run.path / METRICS} ends with epoch {last}, and {CHECKPOINT} is of epoch "
                f"{self.done}: delete both to start this run again."
            )
        if self.ranks.is_first:
            self.run.keep_metrics(self.done)
            if changed := self.run.note_version(self.done):
                self.watch.note(changed)
        self.checkpoints = Checkpoints(self.run, pace)
        return self.checkpoints

    def _newest(self) -> dict[str, Any] | None:
        """The state to go on from: of its group's checkpoints, the one of the latest epoch."""
        saved = [course._saved() for course in self.group]
        if len(self.group) == 1:
            return saved[0]
        # Each logs an epoch before any of them keeps it: what one has no record of is none of its own.
        logged = min(_last(course.run.metrics()) for course in self.group)
        states = [state for state in saved if state and state["epochs_done"] <= logged]
        if not states:
            return None
        newest: dict[str, Any] = max(states, key=lambda state: state["epochs_done"])
        own = newest["group"].get(self.training.named)
        return require_shape(own, _STATE, _STATE, self.run.path / CHECKPOINT)

    def _saved(self) -> dict[str, Any] | None:
        state = self.run.load_checkpoint(self.learner.device)
        if state is None:
            return None
        needed = ("epochs_done", "group") if len(self.group) > 1 else _STATE
        return require_shape(state, _STATE | {"group": dict}, needed, self.run.path / CHECKPOINT)

    def _load(self, state: dict[str, Any]) -> None:
        if state["stores"] != self.stores:
            raise MismatchError(
                f"the checkpoint in {self.run.path} was trained from stores "
                f"{[d[:12] for d in state['stores']]}, given are {[d[:12] for d in self.stores]}. "
                "Give the same stores, or another --out."
            )
        try:
            self.learner.load_state(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.run.path / CHECKPOINT} is of no training like this ({type(error).__name__}: "
                f"{error}); delete it to start this run again."
            ) from error
        self.teacher_forwards, self.done = state["teacher_forwards"], state["epochs_done"]

    def _state(self) -> dict[str, Any]:
        counts = {"epochs_done": self.done, "teacher_forwards": self.teacher_forwards}
        return self.learner.state() | counts | {"stores": self.stores}

    def is_sound(self, epoch: int) -> bool:
        """Whether the losses of the epoch, counted from 0, are those of a training that can go on."""
        try:
            self.learner.losses.end(epoch, self.out)
        except TrainingError as error:
            self.failure = error
        return self.failure is None

    def log(self, record: dict[str, Any]) -> None:
        """The epochs up to the record's are over: write it."""
        self.done = record["epoch"]
        self.records.append(record)
        if self.ranks.is_first:
            self.run.log(record)

    def keep(self, epochs: int) -> None:
        """Write its state when that is due; every course of its group has logged the pass.

        Args:
            epochs: that the pass counts for.
        """
        if self.ranks.is_first:
            state = self._state()
            if len(self.group) > 1:
                group = {course.training.named: course._state() for course in self.group}
                state = {"epochs_done": self.done, "stores": self.stores, "group": group}
            self.checkpoints.keep(state, epochs)
            self.watch.epoch(self.records[-1], self.training.optimization.epochs)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """All epochs are over: write the weights and the summary."""
        if self.ranks.is_first:
            warnings = {"warnings": self._warnings(summary["test_samples"])}
            self.run.finish(self.learner.finished(), {**summary, **warnings})

    def _warnings(self, test_samples: int) -> list[dict[str, str]]:
        """What was said before the first step, and what the training showed since."""
        if self.preflight is None:
            return []
        late = self.preflight.after(self.records, test_samples)
        for finding in late:
            self.watch.note(f"warning: {finding}")
        return [finding.to_dict() for finding in (*self.preflight.findings, *late)]


#: What a checkpoint says beside the states of a learner's parts.
_STATE: dict[str, Any] = {"stores": list, "epochs_done": int, "teacher_forwards": int}


def _last(records: Sequence[Mapping[str, Any]]) -> int:
    """The last epoch that there is a record of; 0 without any."""
    last: int = records[-1]["epoch"] if records else 0
    return last
