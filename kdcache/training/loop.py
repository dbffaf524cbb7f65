"""The training loop: one for teachers and students, cached and online. It reads top to bottom."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.data.dataset import Dataset, Rows
from kdcache.distributed import Ranks
from kdcache.evaluation.scores import CleanImages, calibration, scores
from kdcache.methods.table import without_teacher
from kdcache.preprocessing import Inputs
from kdcache.runs import Run
from kdcache.teachers.teacher import Teacher
from kdcache.training.checkpoints import Pace
from kdcache.training.course import Course
from kdcache.training.learning.learner import paired
from kdcache.training.outcome import resolved, summarized
from kdcache.views.cached import Batch, CachedViews
from kdcache.views.sizes import view_size
from kdcache_stores import TrainingError


class Loop:
    """One training, or several side by side, from one stream of batches for each order of the samples.

    Args:
        courses: the trainings; what they are shown and where they run is the same for all.
        views: what they are shown.
        preprocessing: between the views and the networks.
        teachers: that run in the loop.
        testset: what is measured on.
        held_out: rows of the training set that are measured on too.
        pace: of the checkpoints.
    """

    def __init__(
        self,
        courses: Sequence[Course],
        views: CachedViews,
        preprocessing: Inputs,
        teachers: Sequence[Teacher],
        testset: Dataset,
        held_out: Rows,
        ranks: Ranks,
        pace: Pace,
    ) -> None:
        self.courses, self.views, self.preprocessing = list(courses), views, preprocessing
        self.teachers, self.ranks, self.pace = list(teachers), ranks, pace
        self.training = self.courses[0].training
        self.device = torch.device(self.training.device)
        self.clean = {"test": self._clean_images(testset, np.arange(len(testset)))}
        if len(held_out):
            self.clean["val"] = self._clean_images(views.dataset, held_out)

    def begin(self) -> None:
        """Open the runs."""
        for course in self.courses:
            course.begin(
                resolved(
                    course.training,
                    self.views,
                    self.preprocessing,
                    course.learner.objective.config,
                    self.teachers,
                    self.ranks.world,
                    getattr(course.learner.model, "spec", None),
                    [c.training.named for c in course.group] if len(course.group) > 1 else [],
                )
            )

    def run(self) -> list[Run]:
        """Train each from where its run stands to its end, and write its summary."""
        courses = [course for course in self.courses if course.run.summary() is None]
        if courses:
            self._train(courses)
            # Those from labels alone first: the others are compared with them.
            sound = [course for course in courses if course.failure is None]
            sound.sort(key=lambda course: not without_teacher(course.training.objective.method))
            for course, calibrated in zip(sound, self._calibration(sound), strict=True):
                summary = summarized(
                    course.training,
                    self.views,
                    course.records,
                    parameters=sum(p.numel() for p in course.learner.model.parameters()),
                    held_out="val" in self.clean,
                    test_samples=self.clean["test"][1],
                    teacher_forwards=course.teacher_forwards,
                    side_by_side=len(self.courses),
                )
                course.finish(summary | calibrated | course.learner.how_it_stepped())
            self.ranks.wait()
            if failures := [str(course.failure) for course in courses if course.failure]:
                raise TrainingError(*failures)
        return [course.run for course in self.courses]

    def _train(self, courses: Sequence[Course]) -> None:
        epochs, each = self.training.optimization.epochs, self.views.views_per_decode
        every = self.training.eval_every
        with ExitStack() as opened:
            for course in courses:
                opened.enter_context(course.resume(self.pace))
            for epoch in range(min(course.done for course in courses), epochs, each):
                # After an interruption one may be an epoch ahead of another.
                here = [c for c in courses if c.done <= epoch and c.failure is None]
                if not here:
                    continue
                records = dict(zip(here, self.train_epoch(epoch, here), strict=True))
                # One that lost what it knew ends here; the others go on.
                here = self._sound(here, epoch)
                for course in here:
                    self.ranks.share_buffers(course.learner.evaluated)
                tested: list[dict[str, float]] = [{} for _ in here]
                done = epoch + each
                if done // every > epoch // every or done == epochs:
                    tested = self._test(here)
                for course, test in zip(here, tested, strict=True):
                    course.log({"epoch": done} | records[course] | test)
                for course in here:
                    course.keep(each)

    def _sound(self, courses: Sequence[Course], epoch: int) -> list[Course]:
        """Those that can go on after an epoch: one that lost a student that teaches it cannot."""
        sound = [course for course in courses if course.is_sound(epoch)]
        for course in sound:
            lost = [str(peer.out) for peer in course.group if peer not in sound]
            if lost:
                course.failure = TrainingError(
                    f"{course.out} ends with {lost[0]}, whose student teaches it."
                )
        return [course for course in sound if course.failure is None]

    def train_epoch(
        self, epoch: int, courses: Sequence[Course] | None = None
    ) -> list[dict[str, Any]]:
        """One pass over the samples; sums stay on the device until its end, so nothing waits for it.

        Args:
            epoch: counted from 0; the first of the pass, where one counts as several.
            courses: those that take part (default: all).

        Returns:
            The record of each; times are those of all together.
        """
        courses = self.courses if courses is None else courses
        for course in courses:
            course.learner.begin_epoch(epoch, alone=len(courses) == 1)
        total, seen, waited, begun = len(self.views), 0, 0.0, time.perf_counter()
        number = epoch // self.views.views_per_decode
        streams = {
            seed: self.views.epoch(number, seed=seed)
            for seed in dict.fromkeys(course.training.stream_seed for course in courses)
        }
        for index in range(total):
            asked = time.perf_counter()
            batches = {seed: next(stream) for seed, stream in streams.items()}
            waited += time.perf_counter() - asked
            seen += next(iter(batches.values())).total
            shown = {seed: self._with_teachers(batch) for seed, batch in batches.items()}
            for course in courses:
                batch, forwards = shown[course.training.stream_seed]
                course.learner.learn(self._with_peers(batch, course), epoch, index)
                course.teacher_forwards += forwards
                course.watch.step(epoch + 1, index + 1, total)
        means = [course.learner.end_epoch(seen) for course in courses]
        seconds = time.perf_counter() - begun
        times = {
            "seconds": seconds,
            "data_wait_seconds": waited,
            "images_per_second": seen / seconds,
        }
        return [mean | times for mean in means]

    def _with_teachers(self, batch: Batch) -> tuple[Batch, int]:
        """The batch with the outputs of the teachers in the loop, and how many images they saw."""
        if not self.teachers:
            return batch, 0
        pairs = self.views.group == 2
        images = batch.images.flatten(0, 1) if pairs else batch.images
        outputs = tuple(paired(teacher(images), pairs) for teacher in self.teachers)
        return replace(batch, teachers=outputs), batch.total * self.views.group * len(outputs)

    def _with_peers(self, batch: Batch, course: Course) -> Batch:
        """The batch with the logits of the students that teach this one, if any do."""
        if not course.learner.objective.peers:
            return batch
        peers = [peer.learner for peer in course.group if peer is not course]
        return replace(batch, teachers=tuple({"logits": p.logits_now(batch.images)} for p in peers))

    # -- evaluation -----------------------------------------------------------------------------
    def _clean_images(self, dataset: Dataset, rows: Rows) -> tuple[CleanImages, int]:
        """This rank's part of some un-augmented samples, and how many all ranks have."""
        mine = rows[self.ranks.part(len(rows))]
        size = None if dataset.item else view_size(self.views.plan)
        return CleanImages(dataset, mine, size, self.device, self.training.workers), len(rows)

    def _logits(self, name: str, courses: Sequence[Course]) -> list[tuple[Tensor, Tensor]]:
        """Of each, logits and labels of the samples "test" or "val"; ranks divide them."""
        images, total = self.clean[name]
        for course in courses:
            course.learner.evaluated.eval()
        parts = images.logits_of([course.learner.logits for course in courses])
        gathered = [self.ranks.gather(part, total) for part in parts]
        return [(logits, labels) for logits, labels in gathered]

    def _test(self, courses: Sequence[Course]) -> list[dict[str, float]]:
        records = [
            {f"test_{name}": value for name, value in scores(*logits).items()}
            for logits in self._logits("test", courses)
        ]
        if "val" in self.clean:
            for record, logits in zip(records, self._logits("val", courses), strict=True):
                record["val_top1"] = scores(*logits)["top1"]
        return records

    def _calibration(self, courses: Sequence[Course]) -> list[dict[str, Any]]:
        """NLL and ECE of the test set at a temperature fitted to the final logits."""
        tests = self._logits("test", courses)
        if "val" not in self.clean:
            return [calibration(*test) | {"temperature_fitted_on": "test set"} for test in tests]
        return [
            calibration(*test, *fitted) | {"temperature_fitted_on": "held-out training samples"}
            for test, fitted in zip(tests, self._logits("val", courses), strict=True)
        ]
