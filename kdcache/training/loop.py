"""The training loop: one for teachers and students, cached and online. It reads top to bottom."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdcache.data.dataset import Dataset, Rows
from kdcache.distributed import Ranks
from kdcache.evaluation.scores import calibration, clean_logits, scores
from kdcache.methods.step import Step
from kdcache.models.taps import as_fields, tapped
from kdcache.models.weights import load_weights
from kdcache.models.zoo import build_model
from kdcache.philox import derive_seed
from kdcache.precision import autocast
from kdcache.preprocessing import normalisation
from kdcache.runs import Run
from kdcache.teachers.teacher import Teacher
from kdcache.training.assembly import assembled, nets_of, student_shapes
from kdcache.training.explosion import LossWatch
from kdcache.training.gathering import gather_batch
from kdcache.training.observer import TrainingObserver
from kdcache.training.outcome import resolved, summarized
from kdcache.training.preflight import Preflight
from kdcache.training.settings import Training
from kdcache.views.cached import Batch, CachedViews
from kdcache.views.sizes import view_size
from kdcache_stores import MismatchError, UsageError


class Loop:
    """One training, from its set-up to its summary."""

    def __init__(
        self,
        training: Training,
        testset: Dataset,
        held_out: Rows,
        views: CachedViews,
        teachers: list[Teacher],
        watch: TrainingObserver,
        ranks: Ranks,
        preflight: Preflight | None = None,
        fields: Sequence[str] = (),
    ) -> None:
        self.training, self.views, self.watch, self.ranks = training, views, watch, ranks
        self.preflight = preflight
        self.testset, self.held_out, self.teachers = testset, held_out, teachers
        self.device = torch.device(training.device)
        self.preprocessing = normalisation(views.dataset)
        self.height, self.size = view_size(views.plan)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.model = build_model(
                training.model, views.dataset.classes, self.preprocessing.channels, self.size
            )
            if training.init_weights:
                load_weights(training.init_weights).apply(self.model)
            image = (self.preprocessing.channels, self.height, self.size)
            student = student_shapes(self.model, training.objective, image)
            nets = nets_of(views, student, fields, teachers)
            self.model, self.objective = assembled(self.model, training.objective, nets)
        self.objective.check(views.labels, len(teachers) or len(views.teachers))
        self.model.to(self.device)
        if training.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.objective.to(self.device)
        self._require_last_batch()
        taps = tapped(self.model, self.objective.student_fields)
        self.forward = ranks.wrap(taps, self.device)
        if training.compile:
            self.forward = cast(nn.Module, torch.compile(self.forward))
        self.average = None
        if training.ema:
            rule = get_ema_multi_avg_fn(training.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=rule, use_buffers=True)
        optimization = training.optimization
        learned = [
            parameter
            for parameter in (*self.model.parameters(), *self.objective.parameters())
            if parameter.requires_grad
        ]
        self.optimizer = optimization.make_optimizer(learned)
        self.scheduler = optimization.make_scheduler(self.optimizer, len(views))
        # From torch's own 65536 the gradients of a standardized loss overflow in the first steps.
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=2.0**10, enabled=training.precision == "fp16"
        )
        self.losses = LossWatch(len(views) * optimization.epochs, self.device)
        self.stores_read = views.digests
        self.teacher_forwards = 0

    def begin(self, out: Path) -> None:
        """Open the run; what could be refused of the training was refused before anything is written."""
        config = resolved(
            self.training,
            self.views,
            self.preprocessing,
            self.objective.config,
            self.teachers,
            self.ranks.world,
            getattr(self.model, "spec", None),
        )
        # Rank 0 makes the run; the others then find the same one there, before anything is written.
        if not self.ranks.is_first:
            self.ranks.wait()
        self.run_directory = Run(out, config)
        if self.ranks.is_first:
            self.ranks.wait()
        self.ranks.wait()

    def _require_last_batch(self) -> None:
        """Refuse now, not at the end of an epoch, a last batch too small for batch norm."""
        samples, size = len(self.views.rows), self.training.optimization.batch_size
        last = samples % size or size
        if last // self.ranks.world > 1 or self.objective.needs_pair:
            return
        sample = torch.zeros(
            1, self.preprocessing.channels, self.height, self.size, device=self.device
        )
        try:
            with torch.no_grad():
                copy.deepcopy(self.model).train()(sample)
        except ValueError as error:
            raise UsageError(
                f"{samples} samples in batches of {size} end with a batch that gives a process a single "
                f"sample, and batch norm of {self.training.model} at {self.size} pixels needs two: use "
                "another --batch-size, or --train-samples."
            ) from error

    def run(self) -> Run:
        """Train from where the run stands to its end, and write its summary."""
        run, epochs = self.run_directory, self.training.optimization.epochs
        if run.summary() is not None:
            return run
        first = self._resume()
        records = run.metrics()[:first]
        if self.ranks.is_first:
            run.keep_metrics(first)
            if changed := run.note_version(first):
                self.watch.note(changed)
        for epoch in range(first, epochs):
            record = {"epoch": epoch + 1} | self.train_epoch(epoch)
            self.ranks.share_buffers(self._evaluated)
            record |= self._test()
            records.append(record)
            if self.ranks.is_first:
                run.log(record)
                run.save_checkpoint(self._state(epoch + 1))
                self.watch.epoch(record, epochs)
        calibrated = self._calibration()
        if self.ranks.is_first:
            warnings = {"warnings": self._warnings(records)}
            summary = summarized(
                self.training,
                self.views,
                records,
                parameters=sum(p.numel() for p in self.model.parameters()),
                held_out=len(self.held_out) > 0,
                teacher_forwards=self.teacher_forwards,
            )
            run.finish(self._evaluated, summary | calibrated | warnings)
        self.ranks.wait()
        return run

    def _warnings(self, records: list[dict[str, Any]]) -> list[dict[str, str]]:
        """What was said before the first step, and what the training showed since."""
        if self.preflight is None:
            return []
        late = self.preflight.after(records)
        for finding in late:
            self.watch.note(f"warning: {finding}")
        return [finding.to_dict() for finding in (*self.preflight.findings, *late)]

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the samples; sums stay on the device until its end, so nothing waits for it."""
        self.forward.train()
        # Layers with randomness of their own (dropout) draw the same after a resume.
        torch.manual_seed(derive_seed(self.training.seed, "layers", epoch, self.ranks.rank))
        rate, total = self.optimizer.param_groups[0]["lr"], len(self.views)
        sums: dict[str, Tensor] = {}
        seen, waited, begun = 0, 0.0, time.perf_counter()
        batches = self.views.epoch(epoch)
        for index in range(total):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            loss, parts = self._step(batch, epoch, index)
            self.losses.add(index, loss)
            seen += batch.total
            for name, value in ({"loss": loss} | parts).items():
                sums[name] = sums.get(name, 0) + value.detach() * batch.total
            self.watch.step(epoch + 1, index + 1, total)
        means = {f"train_{name}": value.item() / seen for name, value in sums.items()}
        seconds = time.perf_counter() - begun
        times = {
            "seconds": seconds,
            "data_wait_seconds": waited,
            "images_per_second": seen / seconds,
        }
        self.losses.end(epoch, self.run_directory.path)
        return means | {"lr": rate} | times

    def _step(self, batch: Batch, epoch: int, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward, loss, backward, update; the loss and its parts, on the device."""
        training = self.training
        images = batch.images
        if pairs := self.objective.needs_pair:
            images = images.flatten(0, 1)
        if self.teachers:
            outputs = [teacher(images) for teacher in self.teachers]
            batch = replace(batch, teachers=tuple(_paired(fields, pairs) for fields in outputs))
            self.teacher_forwards += batch.total * (2 if pairs else 1) * len(self.teachers)
        inputs = self.preprocessing(images)
        if training.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, training.precision):
            given = self.forward(inputs)
        student, batch = gather_batch(self.ranks, _paired(as_fields(given), pairs), batch)
        step = Step(
            epoch=epoch,
            index=index,
            epochs=training.optimization.epochs,
            seed=training.seed,
            keys=batch.keys,
            views=batch.views,
        )
        targets = batch.teachers, batch.labels, step, batch.mix
        if index == 0:
            self.objective.eval()  # what it remembers and fits is of the student
            with torch.no_grad():
                nothing = {name: torch.zeros_like(values) for name, values in student.items()}
                uniform, _ = self.objective(nothing, *targets)
            self.objective.train()
            self.losses.begin(uniform, len(self.views))
        loss, parts = self.objective(student, *targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if training.optimization.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), training.optimization.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss.detach(), parts

    # -- evaluation -----------------------------------------------------------------------------
    @property
    def _evaluated(self) -> nn.Module:
        """What is measured and saved: the weights, or their moving average."""
        return self.model if self.average is None else self.average.module

    def _clean_logits(self, dataset: Dataset, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        """Logits and labels of un-augmented samples; each rank forwards a part of them."""
        module = self._evaluated.eval()
        rows = np.arange(len(dataset)) if rows is None else rows

        def network(images: Tensor) -> Tensor:
            return as_fields(module(self.preprocessing(images)))["logits"]

        mine = rows[self.ranks.part(len(rows))]
        size = self.height, self.size
        part = clean_logits(network, dataset, mine, size, self.device, self.training.workers)
        logits, labels = self.ranks.gather(part, len(rows))
        return logits, labels

    def _test(self) -> dict[str, float]:
        tested = scores(*self._clean_logits(self.testset))
        record = {f"test_{name}": value for name, value in tested.items()}
        if len(self.held_out):
            record["val_top1"] = scores(*self._clean_logits(self.views.dataset, self.held_out))[
                "top1"
            ]
        return record

    def _calibration(self) -> dict[str, Any]:
        """NLL and ECE of the test set at a temperature fitted to the final logits."""
        test = self._clean_logits(self.testset)
        if not len(self.held_out):
            return calibration(*test) | {"temperature_fitted_on": "test set"}
        fitted = self._clean_logits(self.views.dataset, self.held_out)
        return calibration(*test, *fitted) | {"temperature_fitted_on": "held-out training samples"}

    # -- state ----------------------------------------------------------------------------------
    def _stateful(self) -> dict[str, Any]:
        parts = {"model": self.model, "objective": self.objective, "optimizer": self.optimizer,
                 "scheduler": self.scheduler, "scaler": self.scaler, "losses": self.losses}  # fmt: skip
        return parts if self.average is None else parts | {"average": self.average}

    def _state(self, epochs_done: int) -> dict[str, Any]:
        states = {name: part.state_dict() for name, part in self._stateful().items()}
        counts = {"epochs_done": epochs_done, "teacher_forwards": self.teacher_forwards}
        return states | counts | {"stores": self.stores_read}

    def _resume(self) -> int:
        """Load the checkpoint, if there is one; the number of epochs already done."""
        state = self.run_directory.load_checkpoint(self.device)
        if state is None:
            return 0
        if state["stores"] != self.stores_read:
            raise MismatchError(
                f"the checkpoint in {self.run_directory.path} was trained from stores "
                f"{[d[:12] for d in state['stores']]}, given are {[d[:12] for d in self.stores_read]}. "
                "Give the same stores, or another --out."
            )
        for name, part in self._stateful().items():
            if name != "losses" or name in state:  # checkpoints of 0.1.0 have none
                part.load_state_dict(state[name])
        self.teacher_forwards = state["teacher_forwards"]
        done: int = state["epochs_done"]
        return done


def _paired(outputs: Mapping[str, Tensor], pairs: bool) -> dict[str, Tensor]:
    """Fields (2 B, ...) of weak and strong views in turn as (B, 2, ...); others as they are."""
    if not pairs:
        return dict(outputs)
    return {name: values.view(-1, 2, *values.shape[1:]) for name, values in outputs.items()}
