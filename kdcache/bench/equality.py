"""Cached equals online, measured: targets, first loss and gradients, and the drift of two epochs.

A cached and an online run are not equal bit for bit: a teacher gives other last bits in batches of another
size, and training amplifies them. So the drift between a cached and an online run is put beside that
of a control: two online runs whose teacher is forwarded in batches of different sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.objective import Objective
from kdcache.methods.step import Step
from kdcache.methods.table import METHODS
from kdcache.models.taps import as_fields, tapped
from kdcache.preprocessing import normalisation
from kdcache.runs import WEIGHTS, read_metrics
from kdcache.teachers.teacher import Teacher
from kdcache.training.assembly import assembled, build_network, nets_of, student_shapes
from kdcache.training.preparation import prepared, train
from kdcache.training.settings import Training
from kdcache.views.cached import Batch, CachedViews
from kdcache.views.sizes import input_shape

#: Every method that can be cached with its published defaults, on logits as they are and, where it has that
#: form, standardized.
OBJECTIVES = {
    name: ObjectiveConfig(method=name)
    for name, method in METHODS.items()
    if not method.online and not method.peers
} | {
    f"{name}+std": ObjectiveConfig(method=name, standardize="unbiased")
    for name, method in METHODS.items()
    if method.standardized
}


def first_step(
    views: CachedViews, teacher: Teacher, model: str, config: ObjectiveConfig, seed: int = 0
) -> dict[str, float]:
    """Largest differences between cached and live in the first step of a training.

    Args:
        views: of one teacher, with the fields that the method reads.
        teacher: the store's, giving them.
        model: the student.

    Returns:
        target (largest difference of a value), target_scale (largest value), loss (relative
        difference) and gradient (norm of the difference over the norm).
    """
    batch = next(views.epoch(0))
    images = batch.images.flatten(0, 1) if batch.images.ndim == 5 else batch.images
    cached = batch.teachers
    live: tuple[Mapping[str, Tensor], ...] = ()
    if cached:
        outputs = teacher(images)
        live = ({name: outputs[name].view(rows.shape) for name, rows in cached[0].items()},)
    preprocessing = normalisation(views.dataset)
    image = input_shape(preprocessing, views.plan)
    fields = tuple(cached[0]) if cached else ()
    results = []
    for teachers in (cached, live):
        torch.manual_seed(seed)
        student = build_network(model, views.dataset.classes, image)
        nets = nets_of(views, student_shapes(student, config, image), fields)
        student, objective = assembled(student, config, nets)
        results.append(_loss(student.train(), objective, preprocessing(images), batch, teachers))
    (loss, gradient), (live_loss, live_gradient) = results
    pairs = [(rows, live[0][name]) for fields in cached for name, rows in fields.items()]
    return {
        "target": max([(a - b).abs().max().item() for a, b in pairs] + [0.0]),
        "target_scale": max([rows.abs().max().item() for _, rows in pairs] + [0.0]),
        "loss": abs(loss - live_loss) / abs(live_loss),
        "gradient": ((gradient - live_gradient).norm() / live_gradient.norm()).item(),
    }


def _loss(
    student: torch.nn.Module,
    objective: Objective,
    inputs: Tensor,
    batch: Batch,
    teachers: Sequence[Mapping[str, Tensor]],
) -> tuple[float, Tensor]:
    outputs = as_fields(tapped(student, objective.student_fields)(inputs))
    if batch.images.ndim == 5:
        outputs = {name: rows.view(-1, 2, *rows.shape[1:]) for name, rows in outputs.items()}
    step = Step(epochs=2, keys=batch.keys, views=batch.views)
    loss, _ = objective(outputs, teachers, batch.labels, step, batch.mix)
    learned = [p for p in (*student.parameters(), *objective.parameters()) if p.requires_grad]
    gradients = torch.autograd.grad(loss, learned)
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
    online = replace(training, online=(teacher,) if training.objective.needs_teacher else ())
    runs = {"cached": train(training, folder / "cached").path}
    runs["online"] = train(online, folder / "online").path
    with prepared(online, folder / "control") as loop:
        loop.teachers = [replace(member, batch_size=control) for member in loop.teachers]
        runs["control"] = loop.run()[0].path
    weights = {name: _flat(run) for name, run in runs.items()}
    losses = {
        name: np.array([r["train_loss"] for r in read_metrics(r)]) for name, r in runs.items()
    }
    result: dict[str, float] = {}
    for name in ("cached", "control"):
        distance: Any = (weights[name] - weights["online"]).norm() / weights["online"].norm()
        result[name] = distance.item()
        result[f"{name}_loss"] = float(np.abs(losses[name] - losses["online"]).max())
    return result


def _flat(run: Path) -> Tensor:
    state = safetensors.torch.load_file(run / WEIGHTS)
    return torch.cat([state[name].double().flatten() for name in sorted(state)])
