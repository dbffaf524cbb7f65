"""Cached equals online, measured: targets, first loss and gradients, and the drift of two epochs.

A cached and an online run are not equal bit for bit: a teacher gives other last bits in batches of another
size, and training amplifies them. So the drift between a cached and an online run is put beside that
of a control: two online runs whose teacher is forwarded in batches of different sizes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from kdcache.methods import METHODS, Objective, ObjectiveConfig, Step
from kdcache.models import build_model
from kdcache.preprocessing import normalisation
from kdcache.runs import WEIGHTS, read_metrics
from kdcache.teachers import Teacher
from kdcache.training import Training, prepared, train
from kdcache.training.outcome import view_shape
from kdcache.views.cached import Batch, CachedViews

#: Every method with its published defaults, on logits as they are and, where it has that form, standardized.
OBJECTIVES = {name: ObjectiveConfig(method=name) for name in METHODS} | {
    f"{name}+std": ObjectiveConfig(method=name, standardize="unbiased")
    for name, method in METHODS.items()
    if method.standardized
}


def first_step(
    views: CachedViews, teacher: Teacher, model: str, config: ObjectiveConfig, seed: int = 0
) -> dict[str, float]:
    """Largest differences between cached and live in the first step of a training.

    Args:
        views: of one store, with logits.
        teacher: the store's.
        model: the student.

    Returns:
        target (largest difference of a logit), target_scale (largest logit), loss (relative
        difference) and gradient (norm of the difference over the norm).
    """
    batch = next(views.epoch(0))
    images = batch.images.flatten(0, 1) if batch.images.ndim == 5 else batch.images
    live = (teacher(images).view(batch.logits[0].shape),) if batch.logits else ()
    results = []
    for logits in (batch.logits, live):
        torch.manual_seed(seed)
        preprocessing = normalisation(views.dataset)
        size = view_shape(views.plan)[1]
        student = build_model(model, views.dataset.classes, preprocessing.channels, size)
        results.append(_loss(student, preprocessing(images), batch, logits, config))
    (loss, gradient), (live_loss, live_gradient) = results
    target = max(
        [(a - b).abs().max().item() for a, b in zip(batch.logits, live, strict=True)] + [0.0]
    )
    return {
        "target": target,
        "target_scale": max([one.abs().max().item() for one in live] + [0.0]),
        "loss": abs(loss - live_loss) / abs(live_loss),
        "gradient": ((gradient - live_gradient).norm() / live_gradient.norm()).item(),
    }


def _loss(
    student: torch.nn.Module,
    inputs: Tensor,
    batch: Batch,
    logits: tuple[Tensor, ...],
    config: ObjectiveConfig,
) -> tuple[float, Tensor]:
    outputs = student(inputs)
    if batch.images.ndim == 5:
        outputs = outputs.view(len(batch.rows), 2, -1)
    step = Step(epochs=2, keys=batch.keys, views=batch.views)
    teachers = [{"logits": one} for one in logits]
    loss, _ = Objective(config)({"logits": outputs}, teachers, batch.labels, step, batch.mix)
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    return loss.item(), torch.cat([g.flatten() for g in gradients])


def drift(training: Training, teacher: str, folder: Path, control: int = 1) -> dict[str, float]:
    """How far cached and online runs drift apart, beside live against live.

    Args:
        training: a student of one store.
        teacher: the store's.
        folder: for the three runs.
        control: images per forward pass of the control's teacher.

    Returns:
        cached and control: relative distance of the final weights from those of the online run;
        cached_loss and control_loss: the largest difference of an epoch's mean loss.
    """
    online = replace(training, online=(teacher,) if training.objective.record.needs_teacher else ())
    runs = {"cached": train(training, folder / "cached").path}
    runs["online"] = train(online, folder / "online").path
    with prepared(online, folder / "control") as loop:
        loop.teachers = [replace(one, batch_size=control) for one in loop.teachers]
        runs["control"] = loop.run().path
    weights = {name: _flat(run) for name, run in runs.items()}
    losses = {
        name: np.array([r["train_loss"] for r in read_metrics(r)]) for name, r in runs.items()
    }
    found: dict[str, float] = {}
    for name in ("cached", "control"):
        distance: Any = (weights[name] - weights["online"]).norm() / weights["online"].norm()
        found[name] = distance.item()
        found[f"{name}_loss"] = float(np.abs(losses[name] - losses["online"]).max())
    return found


def _flat(run: Path) -> Tensor:
    state = safetensors.torch.load_file(run / WEIGHTS)
    return torch.cat([state[name].double().flatten() for name in sorted(state)])
