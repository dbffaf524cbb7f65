"""The training loop: one for teachers and students, cached and online. It reads top to bottom."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdcache._version import __version__
from kdcache.cached import Batch, CachedViews
from kdcache.datasets import Dataset
from kdcache.evaluation import clean_logits, scores
from kdcache.models import build_model
from kdcache.objectives import Objective, Step
from kdcache.preprocessing import PREPROCESSINGS, Preprocessing
from kdcache.resident import Rows
from kdcache.runs import Run
from kdcache.teachers import Teacher
from kdcache.weights import load_weights
from kdcache_stores import MismatchError, TrainingError, UsageError

if TYPE_CHECKING:
    from kdcache.training import Training

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Observer(Protocol):
    """What a caller may watch of a training."""

    def step(self, epoch: int, done: int, total: int) -> None:
        """``done`` of ``total`` steps of the epoch (from 1) are through."""

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """An epoch ended with this record of ``metrics.jsonl``."""


class Silent:
    """Watches nothing."""

    def step(self, epoch: int, done: int, total: int) -> None:
        """Ignore it."""

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """Ignore it."""


def images_of(dataset: Dataset) -> tuple[int, int]:
    """Channels that a network for the dataset sees, and the side of its images in pixels.

    Raises:
        UsageError: the images differ in size.
    """
    if dataset.image_shape is None:
        raise UsageError(
            f"the images of {dataset.name} differ in size; a network of kdcache needs one size: use "
            "an augmentation that gives it, such as resized-crop-flip."
        )
    return dataset.image_shape[0], dataset.image_shape[-1]


def normalisation(dataset: Dataset) -> Preprocessing:
    """Mean and std for a network trained on the dataset: the published ones, else as measured."""
    if dataset.name in PREPROCESSINGS:
        return PREPROCESSINGS[dataset.name]
    if dataset.images is None:
        return PREPROCESSINGS["imagenet"]
    return Preprocessing.measured(dataset.images)


class Loop:
    """One training, from its set-up to its summary."""

    def __init__(
        self,
        training: Training,
        out: Path,
        testset: Dataset,
        held_out: Rows,
        views: CachedViews,
        teachers: list[Teacher],
        watch: Observer,
    ) -> None:
        self.training, self.views, self.watch = training, views, watch
        self.testset, self.held_out, self.teachers = testset, held_out, teachers
        self.device = torch.device(training.device)
        self.preprocessing = normalisation(views.dataset)
        size = images_of(views.dataset)[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.model = build_model(
                training.model, views.dataset.classes, self.preprocessing.channels, size
            )
            self.objective = Objective(training.objective)
        if training.init_weights:
            load_weights(training.init_weights).apply(self.model)
        self.model.to(self.device)
        if training.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.objective.to(self.device)
        self.forward: nn.Module = self.model
        if training.compile:
            self.forward = torch.compile(self.model)  # type: ignore[assignment]
        self.average = None
        if training.ema:
            rule = get_ema_multi_avg_fn(training.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.model, multi_avg_fn=rule, use_buffers=True)
        optimization = training.optimization
        learned = [*self.model.parameters(), *self.objective.parameters()]
        self.optimizer = optimization.make_optimizer(learned)
        self.scheduler = optimization.make_scheduler(self.optimizer, len(views))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.precision == "fp16")
        self.stores_read = [store.digest for store in views.stores]
        self.teacher_forwards = 0
        self.run_directory = Run(out, self._config(size))

    def _config(self, size: int) -> dict[str, Any]:
        t, dataset, plan = self.training, self.views.dataset, self.views.plan.to_store()
        config = {
            "kdcache": __version__,
            "data": {
                "name": t.dataset, "root": t.data_root, "fingerprint": dataset.fingerprint,
                "train_samples": t.train_samples, "val_split": t.val_split, "subset": t.subset,
                "augmentation": plan.augmentation, "view_seed": plan.seed, "views": self.views.views,
                "schedule": t.schedule, "resident_views": t.resident_views,
            },
            "model": {
                "name": t.model, "classes": dataset.classes, "channels": self.preprocessing.channels,
                "size": size, "init_weights": t.init_weights,
            },
            "preprocessing": self.preprocessing.to_dict(),
            "objective": self.objective.config.to_dict(),
            "training": asdict(t.optimization) | {
                "seed": t.seed, "precision": t.precision, "channels_last": t.channels_last,
                "compile": t.compile, "ema": t.ema, "device": t.device, "threads": t.threads,
            },
            "online": [teacher.to_store().digest for teacher in self.teachers],
            "stores": [
                {"digest": s.digest, "plan": s.plan.digest, "views": s.view_digests}
                for s in self.views.stores
            ],
            "store_paths": list(t.stores),
        }  # fmt: skip
        return {key: value for key, value in _without_none(config).items() if value not in ({}, [])}

    def run(self) -> Run:
        """Train from where the run stands to its end, and write its summary."""
        run, epochs = self.run_directory, self.training.optimization.epochs
        if run.summary() is not None:
            return run
        first = self._resume()
        records = run.keep_metrics(first)
        for epoch in range(first, epochs):
            record = {"epoch": epoch + 1} | self._train_epoch(epoch)
            if not np.isfinite(record["train_loss"]):
                raise TrainingError(
                    f"the loss became {record['train_loss']} in epoch {epoch + 1} of {run.path}, first "
                    f"at step {record['bad_step']}. The checkpoint holds epoch {epoch}; use a lower "
                    "--lr, lower loss weights, or --precision float32."
                )
            record |= self._test()
            run.log(record)
            records.append(record)
            run.save_checkpoint(self._state(epoch + 1))
            self.watch.epoch(record, epochs)
        run.finish(self._evaluated, self._summary(records))
        return run

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the samples; sums stay on the device until its end, so nothing waits for it."""
        self.forward.train()
        # Layers with randomness of their own (dropout) draw the same after a resume.
        torch.manual_seed(hash((self.training.seed, epoch)) % 2**63)
        rate, total = self.optimizer.param_groups[0]["lr"], len(self.views)
        sums: dict[str, Tensor] = {}
        finite = torch.full((), total, device=self.device)
        seen, waited, begun = 0, 0.0, time.perf_counter()
        batches = self.views.epoch(epoch)
        for index in range(total):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            loss, parts = self._step(batch, epoch, index)
            finite = torch.where(loss.isfinite(), finite, finite.clamp(max=index))
            count = len(batch.rows)
            seen += count
            for name, value in ({"loss": loss} | parts).items():
                sums[name] = sums.get(name, 0) + value.detach() * count
            self.watch.step(epoch + 1, index + 1, total)
        means = {f"train_{name}": value.item() / seen for name, value in sums.items()}
        times = {"seconds": time.perf_counter() - begun, "data_wait_seconds": waited}
        bad = {} if np.isfinite(means["train_loss"]) else {"bad_step": int(finite.item()) + 1}
        return means | {"lr": rate} | times | bad

    def _step(self, batch: Batch, epoch: int, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward, loss, backward, update; the loss and its parts, on the device."""
        training = self.training
        logits, images = batch.logits, batch.images
        if pairs := self.objective.needs_pair:
            images = images.flatten(0, 1)
        if self.teachers:
            logits = tuple(teacher(images) for teacher in self.teachers)
            self.teacher_forwards += len(images) * len(self.teachers)
            if pairs:
                logits = tuple(one.view(-1, 2, one.shape[1]) for one in logits)
        step = Step(
            epoch=epoch,
            index=index,
            epochs=training.optimization.epochs,
            seed=training.seed,
            keys=batch.keys,
            views=torch.from_numpy(batch.views).to(self.device),
        )
        images = self.preprocessing(images)
        if training.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        dtype = AUTOCAST.get(training.precision)
        with torch.autocast(self.device.type, dtype) if dtype else nullcontext():
            student = self.forward(images)
        if pairs:
            student = student.view(-1, 2, student.shape[1])
        loss, parts = self.objective(student, logits, batch.labels, step, batch.mix)
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

    @property
    def _evaluated(self) -> nn.Module:
        """What is measured and saved: the weights, or their moving average."""
        return self.model if self.average is None else self.average.module

    def _test(self) -> dict[str, float]:
        module = self._evaluated.eval()

        def network(images: Tensor) -> Tensor:
            logits: Tensor = module(self.preprocessing(images))
            return logits

        workers = self.training.workers
        found = scores(*clean_logits(network, self.testset, device=self.device, workers=workers))
        record = {f"test_{name}": value for name, value in found.items()}
        if len(self.held_out):
            held = clean_logits(network, self.views.dataset, self.held_out, self.device, workers)
            record["val_top1"] = scores(*held)["top1"]
        return record

    # -- state ----------------------------------------------------------------------------------
    def _stateful(self) -> dict[str, Any]:
        parts = {"model": self.model, "objective": self.objective, "optimizer": self.optimizer,
                 "scheduler": self.scheduler, "scaler": self.scaler}  # fmt: skip
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
            part.load_state_dict(state[name])
        self.teacher_forwards = state["teacher_forwards"]
        done: int = state["epochs_done"]
        return done

    def _summary(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        chosen_on = "val_top1" if len(self.held_out) else "test_top1"
        last, best = records[-1], max(records, key=lambda record: record[chosen_on])
        seconds = sum(record["seconds"] for record in records)
        return {
            "method": self.objective.config.method,
            "model": self.training.model,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "epochs": len(records),
            "last_top1": last["test_top1"],
            "last_top5": last["test_top5"],
            "best_top1": best["test_top1"],
            "best_top5": best["test_top5"],
            "best_epoch": best["epoch"],
            "best_chosen_on": "held-out training samples" if len(self.held_out) else "test set",
            "last_nll": last["test_nll"],
            "last_ece": last["test_ece"],
            "seconds_per_epoch": float(np.median([record["seconds"] for record in records])),
            "data_wait_fraction": sum(r["data_wait_seconds"] for r in records) / max(seconds, 1e-9),
            "teacher_forwards": self.teacher_forwards,
            "train_samples": len(self.views.rows),
            "stores": self.stores_read,
        }


def _without_none(value: Any) -> Any:
    """TOML has no null: what is not set is not written."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value
