"""A training described and prepared: a teacher from labels, or a student from labels and stores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from kdcache.augment.augmentation import Augmentation
from kdcache.augment.specs import default_augmentation, make_augmentation
from kdcache.data.choice import choose
from kdcache.data.dataset import Dataset
from kdcache.distributed import Ranks, join
from kdcache.dumping.recheck import load_stored_teacher
from kdcache.preprocessing import normalisation, origin
from kdcache.runs import Run, is_run, read_config, writing
from kdcache.teachers.load import load_teacher
from kdcache.teachers.teacher import Teacher
from kdcache.training.assembly import (
    fields_of_training,
    on_features,
    read_fields,
    shapes_of_model,
)
from kdcache.training.loop import Loop
from kdcache.training.observer import TrainingObserver, Unwatched
from kdcache.training.preflight import Preflight
from kdcache.training.settings import Training
from kdcache.training.tensorboard import TensorBoard
from kdcache.views.cached import CachedViews
from kdcache.views.plan import ViewPlan
from kdcache.views.sizes import view_shape, view_size
from kdcache.views.window import views_that_fit
from kdcache_stores import (
    DataError,
    MismatchError,
    Samples,
    Store,
    UsageError,
    join_fields,
    open_store,
)
from kdcache_stores.read.join import expected


class TrainingOptions(TypedDict, total=False):
    """How a training is accompanied, which does not change its result.

    Attributes:
        tensorboard: write the metrics to ``out``/tensorboard too.
        allow_code: import the factory that the run of an online teacher names.
        baseline: a finished run of the same model by cross-entropy, which the teacher should surpass;
            None: looked for beside ``out``.
        strict: refuse to begin where `kdcache.checks.all_rules` has a warning.
        expect: content digests that the stores must have, in their order; see `expected`.
    """

    tensorboard: bool
    allow_code: bool
    baseline: str | os.PathLike[str] | None
    strict: bool
    expect: Sequence[str]


def train(
    training: Training,
    out: str | os.PathLike[str],
    watch: TrainingObserver | None = None,
    **options: Unpack[TrainingOptions],
) -> Run:
    """Train to the end, going on after the last finished epoch if ``out`` holds this very run.

    On a CPU the result does not depend on interruptions: the resumed weights are equal bit for bit.
    Under ``torchrun`` the ranks divide every batch, and rank 0 alone watches and writes.

    Args:
        training: what to train.
        out: the run's directory.
        watch: told of the progress.
        options: see `TrainingOptions`.

    Returns:
        The finished run.

    Raises:
        KDCacheError: see `load_dataset`, `CachedViews`, `Run`; TrainingError for a loss that is not
            finite or explodes, for an ``out`` that another training is writing, and for warnings if
            ``strict``, before ``out`` is made.
    """
    with prepared(training, out, watch, **options) as loop:
        return loop.run()


@contextmanager
def prepared(
    training: Training,
    out: str | os.PathLike[str],
    watch: TrainingObserver | None = None,
    **options: Unpack[TrainingOptions],
) -> Iterator[Loop]:
    """A training that is ready for its first step; see `train`, which runs it to its end."""
    if training.threads:
        torch.set_num_threads(training.threads)
    out = Path(out)
    with ExitStack() as opened:
        ranks, device = opened.enter_context(join(training.device))
        watch = watch or Unwatched() if ranks.is_first else Unwatched()
        if options.get("tensorboard") and ranks.is_first:
            watch = opened.enter_context(TensorBoard(out / "tensorboard", watch))
        trainset, testset = training.source.load("train"), training.source.load("test")
        require_alike(trainset, testset)
        for remark in dict.fromkeys(trainset.remarks + testset.remarks):
            watch.note(remark)
        stores = [
            opened.enter_context(open_store(path, expect=digest))
            for path, digest in expected(training.stores, options.get("expect", ()))
        ]
        _require_classes(stores, trainset)
        rows, held_out = choose(trainset, training.train_samples, training.val_split, training.seed)
        spec = training.augment or (None if stores else default_augmentation(trainset))
        augmentation = make_augmentation(spec, trainset) if spec else None
        plan = (
            ViewPlan(trainset, augmentation, training.seed) if augmentation and not stores else None
        )
        objective, fields = training.objective, training.objective.teacher_fields
        student = stored = None
        if on_features(objective):
            seen = plan or _plan_of(stores[0], trainset, augmentation)
            image = (*view_shape(seen)[:1], *view_size(seen))
            student = shapes_of_model(training.model, trainset.classes, image, objective)
            stored = fields_of_training(objective, student, stores, image, bool(training.online))
            fields = stored or fields
        read = () if training.online else fields
        views = CachedViews(
            trainset,
            stores,
            training.optimization.batch_size,
            read,
            plan=plan,
            augmentation=augmentation,
            views=training.views,
            rows=rows,
            schedule=training.schedule,
            resident_views=_resident_views(training, out, stores, read, len(rows), ranks),
            seed=training.seed,
            device=device,
            workers=training.workers,
            subset=training.subset,
            pairs=objective.record.pairs,
            part=(ranks.rank, ranks.world),
        )
        opened.enter_context(views)
        if views.left_out:
            watch.note(f"{views.left_out} samples of the dataset are not in the store: left out")
        ranks.require_divisible(len(views.rows), training.optimization.batch_size)
        if training.schedule == "random" and views.window * views.group < (views.views or 0):
            watch.note(
                f"{views.window * views.group} of {views.views} views are in memory at a time; an epoch "
                "draws from those alone, which is not the distribution of online training. More of "
                "them: --resident-views."
            )
        preflight = None
        if ranks.is_first:
            preflight = Preflight(
                training, views, views.holding("logits"), out, options.get("baseline")
            )
            for note in preflight.notes:
                watch.note(note)
            if options.get("strict"):
                preflight.require_no_findings()
            for finding in preflight.findings:
                watch.note(f"warning: {finding}")
        teachers = _online_teachers(training, fields, stores, views.plan, device,
                                    options.get("allow_code", False), watch)  # fmt: skip
        if student is not None and teachers and stored is None:
            fields = read_fields(objective, student, teachers[0].shapes)
            teachers = [
                replace(t, fields=tuple(dict.fromkeys(("logits", *fields)))) for t in teachers
            ]
        training = replace(training, device=device)
        loop = Loop(training, testset, held_out, views, teachers, watch, ranks, preflight, fields)
        if ranks.is_first:
            opened.enter_context(writing(out))
        loop.begin(out)
        yield loop


def _plan_of(store: Store, dataset: Dataset, augmentation: Augmentation | None) -> ViewPlan:
    samples = Samples(store.keys, store.labels, store.keys_hashed)
    return ViewPlan.from_store(store.plan, dataset, samples, augmentation, partial=True)


def _resident_views(
    training: Training,
    out: Path,
    stores: Sequence[Store],
    fields: Sequence[str],
    rows: int,
    ranks: Ranks,
) -> int | None:
    """The window of the random schedule: as asked, as this run began, or what fits on every rank."""
    if training.schedule != "random" or training.resident_views is not None:
        return training.resident_views
    if is_run(out):
        began: int | None = read_config(out).get("data", {}).get("resident_views")
        return began
    if not stores or not fields or ranks.world == 1:
        return None
    teachers = join_fields(stores, fields)
    fit = views_that_fit(teachers, rows, torch.device(training.device), ranks.neighbours)
    return ranks.lowest(fit)


def require_alike(trainset: Dataset, testset: Dataset) -> None:
    """Refuse a test split that the network of the training split could not be measured on."""
    shapes = trainset.image_shape, testset.image_shape
    if shapes[0] and shapes[1] and shapes[0][0] != shapes[1][0]:
        raise DataError(
            f"the training images of {trainset.name} have {shapes[0][0]} channels, the test images "
            f"{shapes[1][0]}: both splits need the same."
        )
    highest = int(testset.labels.max())
    if highest < 0:
        raise DataError(
            f"none of the {len(testset)} test samples of {testset.name} has a label, and accuracy "
            "is measured on them: give a test split with labels, or none, and a part of train is "
            "held out for it."
        )
    if highest >= trainset.classes:
        row = int(testset.labels.argmax())
        raise DataError(
            f"the training split of {trainset.name} has {trainset.classes} classes, numbered from 0, "
            f"but test sample {testset.keys[row]!r} has the label {highest}. Correct the labels, or "
            "name all classes."
        )


def _require_classes(stores: Sequence[Store], dataset: Dataset) -> None:
    for store in stores:
        if store.classes != dataset.classes:
            raise MismatchError(
                f"{store.where} holds logits over {store.classes} classes, {dataset.name} has "
                f"{dataset.classes}. Give the store of a teacher for {dataset.name}."
            )


def _online_teachers(
    training: Training,
    fields: Sequence[str],
    stores: Sequence[Store],
    plan: ViewPlan,
    device: str,
    allow_code: bool,
    watch: TrainingObserver,
) -> list[Teacher]:
    """The teachers to run in the loop; each must be the one of the store beside it.

    Args:
        fields: what the loss reads of each.
        watch: told of the preprocessing of each that has no store to take it from.
    """
    given = tuple(dict.fromkeys(("logits", *fields)))
    channels, size = view_shape(plan)
    specs = training.online
    # Several stores of one teacher hold its fields together; the first of them names it.
    firsts: dict[str, Store] = {}
    for store in stores:
        firsts.setdefault(store.teacher.digest, store)
    stores = list(firsts.values())
    if stores and specs and len(stores) != len(specs):
        raise UsageError(
            f"{len(specs)} --online teachers and --store of {len(stores)}: give a store for each "
            "teacher, in the same order, or none."
        )
    if stores:
        teachers = [
            load_stored_teacher(store, spec, device, (channels, size, size), allow_code, given)
            for spec, store in zip(specs, stores, strict=False)
        ]
    else:
        fallback = normalisation(plan.dataset)
        teachers = [
            load_teacher(
                spec,
                classes=plan.dataset.classes,
                channels=channels,
                size=size,
                fallback=fallback,
                device=device,
                allow_code=allow_code,
                fields=given,
            )
            for spec in specs
        ]
        for teacher in teachers:
            own = teacher.preprocessing is not fallback
            whence = "its own" if own else origin(plan.dataset).partition(" (")[0]
            instead = "" if own else "; a --store of it, dumped with another, says otherwise"
            watch.note(
                f"{teacher.architecture}: preprocessing {whence}: {teacher.preprocessing}{instead}"
            )
    for teacher, store in zip(teachers, stores, strict=False):
        if teacher.to_store().digest != store.teacher.digest:
            raise MismatchError(
                f"the --online teacher {teacher.architecture} has digest "
                f"{teacher.to_store().digest[:12]}, the logits in {store.where} are of "
                f"{store.teacher.architecture}, digest {store.teacher.digest[:12]}."
            )
    return teachers
