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
from kdcache.data.dataset import Dataset, Rows
from kdcache.data.item import Item
from kdcache.distributed import Ranks, join
from kdcache.dumping.recheck import load_stored_teacher
from kdcache.methods.nets import Shapes
from kdcache.preprocessing import normalisation, origin, slow_precision
from kdcache.runs import Run, is_run, read_config, writing
from kdcache.stages import stage
from kdcache.teachers.load import load_teacher
from kdcache.teachers.teacher import Teacher
from kdcache.training.assembly import (
    fields_of_training,
    on_features,
    read_fields,
    shapes_of_model,
)
from kdcache.training.checkpoints import PACE, Pace
from kdcache.training.course import Course
from kdcache.training.learning.learner import Learner
from kdcache.training.learning.static_step import StaticStep, needs_eager
from kdcache.training.loop import Loop
from kdcache.training.observer import TrainingObserver, Unwatched
from kdcache.training.preflight import Preflight
from kdcache.training.settings import Training, require_one_stream, with_orders
from kdcache.training.tensorboard import TensorBoard
from kdcache.training.tuning import hold_freed_memory, tuned
from kdcache.views.cached import CachedViews
from kdcache.views.plan import ViewPlan
from kdcache.views.sizes import view_shape
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
from kdcache_stores.errors import about
from kdcache_stores.read.join import expected


class TrainingOptions(TypedDict, total=False):
    """How a training is accompanied, which does not change its result.

    Attributes:
        tensorboard: write the metrics to ``out``/tensorboard too.
        allow_code: import the factory that the run of an online teacher names.
        baseline: a finished run of the same model by cross-entropy, which the teacher should surpass;
            None: looked for beside ``out``.
        strict: refuse to begin where `kdcache.checks.all_rules` has a warning.
        checkpoint_every: as `Pace.parse` takes it; by default each epoch, at most once a minute.
        hold_memory: have this process keep freed memory, see `hold_freed_memory`.
        expect: content digests that the stores must have, in their order; see `expected`.
    """

    tensorboard: bool
    allow_code: bool
    baseline: str | os.PathLike[str] | None
    strict: bool
    checkpoint_every: str
    hold_memory: bool
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
    return train_together([training], [out], None if watch is None else [watch], **options)[0]


def train_together(
    trainings: Sequence[Training],
    outs: Sequence[str | os.PathLike[str]],
    watches: Sequence[TrainingObserver] | None = None,
    **options: Unpack[TrainingOptions],
) -> list[Run]:
    """Train several networks side by side, each as `train` would, from one stream of batches.

    Images are decoded and augmented, and stores read, once for all of them. Every run is the one that
    `train` would have written, on a CPU bit for bit.

    Args:
        trainings: what to train; see `require_one_stream` for what they must share.
        outs: a directory for each run.
        watches: for each, told of its progress.
        options: of all, see `TrainingOptions`.

    Returns:
        The finished runs.

    Raises:
        UsageError: trainings that cannot share a stream, or another number of directories.
        TrainingError: a loss that is not finite or explodes; the others are trained to their end first.
        KDCacheError: see `train`.
    """
    with prepared_together(trainings, outs, watches, **options) as loop:
        return loop.run()


@contextmanager
def prepared(
    training: Training,
    out: str | os.PathLike[str],
    watch: TrainingObserver | None = None,
    **options: Unpack[TrainingOptions],
) -> Iterator[Loop]:
    """A training that is ready for its first step; see `train`, which runs it to its end."""
    watches = None if watch is None else [watch]
    with prepared_together([training], [out], watches, **options) as loop:
        yield loop


@contextmanager
def prepared_together(
    trainings: Sequence[Training],
    outs: Sequence[str | os.PathLike[str]],
    watches: Sequence[TrainingObserver] | None = None,
    **options: Unpack[TrainingOptions],
) -> Iterator[Loop]:
    """Trainings that are ready for their first step; see `train_together`."""
    require_one_stream(trainings)
    folders = _folders(outs, len(trainings))
    shared = trainings[0]
    if shared.threads:
        torch.set_num_threads(shared.threads)
    if options.get("hold_memory"):
        hold_freed_memory()
    pace = Pace.parse(options.get("checkpoint_every", PACE))
    with ExitStack() as opened:
        ranks, device = opened.enter_context(join(shared.device))
        seen = list(watches or [Unwatched()] * len(folders)) if ranks.is_first else None
        watched = seen or [Unwatched()] * len(folders)
        if options.get("tensorboard") and ranks.is_first:
            watched = [
                opened.enter_context(TensorBoard(out / "tensorboard", watch))
                for out, watch in zip(folders, watched, strict=True)
            ]
        note = watched[0].note
        trainset, testset = shared.source.load("train"), shared.source.load("test")
        require_alike(trainset, testset)
        slow = [
            text for training in trainings for text in slow_precision(device, training.precision)
        ]
        for remark in dict.fromkeys((*trainset.remarks, *testset.remarks, *slow)):
            note(remark)
        stores = [
            opened.enter_context(open_store(path, expect=digest))
            for path, digest in expected(shared.stores, options.get("expect", ()))
        ]
        _require_classes(stores, trainset)
        trainings = with_orders(trainings, trainset.images is not None and not shared.augment)
        shared = trainings[0]
        orders = sorted({training.stream_seed for training in trainings})
        if len(trainings) > 1:
            of = (
                f"in one order, of data seed {orders[0]}"
                if len(orders) == 1
                else "each in its own order"
            )
            note(f"{len(trainings)} students side by side see the samples {of}")
        rows, held_out = choose(
            trainset, shared.train_samples, shared.val_split, shared.stream_seed
        )
        plan, augmentation = _plan(shared, trainset, stores)
        read = [_fields_read(training, trainset, stores, plan) for training in trainings]
        fields = tuple(dict.fromkeys(name for names, _ in read for name in names))
        views = opened.enter_context(
            _views(
                shared, trainset, stores, plan, augmentation, rows, fields, folders, device, ranks
            )
        )
        if views.left_out:
            note(f"{views.left_out} samples of the dataset are not in the store: left out")
        shown = len(views.rows) * views.views_per_decode
        ranks.require_divisible(shown, shared.optimization.batch_size)
        if shared.schedule == "random" and views.window * views.group < (views.views or 0):
            note(
                f"{views.window * views.group} of {views.views} views are in memory at a time; an epoch "
                "draws from those alone, which is not the distribution of online training. More of "
                "them: --resident-views."
            )
        told: set[str] = set()
        checked = [
            _checked(training, views, out, watch, told, options) if ranks.is_first else None
            for training, out, watch in zip(trainings, folders, watched, strict=True)
        ]
        teachers = _online_teachers(shared, fields, stores, views.plan, device,
                                    options.get("allow_code", False), watched[0])  # fmt: skip
        opened.enter_context(tuned(replace(shared, device=device)))
        preprocessing = normalisation(trainset)
        own = [
            names if student is None else read_fields(t.objective, student, teachers[0].shapes)
            for t, (names, student) in zip(trainings, read, strict=True)
        ]
        wanted = tuple(dict.fromkeys(("logits", *(name for names in own for name in names))))
        by_batch = shared.objective.batch_statistics
        teachers = [replace(teacher, fields=wanted, by_batch=by_batch) for teacher in teachers]
        courses = [
            Course(
                Learner(
                    replace(training, device=device), views, preprocessing, names, teachers, ranks
                ),
                out,
                watch,
                preflight,
                views.digests,
                ranks,
            )
            for training, names, out, watch, preflight in zip(
                trainings, own, folders, watched, checked, strict=True
            )
        ]
        peers = [course for course in courses if course.learner.objective.peers]
        for course in peers:
            course.group = peers
        for course in courses:
            if course.training.graph:
                _make_static(course, told)
        loop = Loop(courses, views, preprocessing, teachers, testset, held_out, ranks, pace)
        if ranks.is_first:
            for out in folders:
                opened.enter_context(writing(out))
        loop.begin()
        yield loop


def _make_static(course: Course, told: set[str]) -> None:
    """Have the learner take static steps, or say why it cannot, each reason once."""
    learner = course.learner
    if reason := needs_eager(learner):
        learner.not_static = reason
        if reason not in told:
            course.watch.note(f"--graph: the step runs eagerly, since {reason}")
            told.add(reason)
    else:
        learner.static = StaticStep(learner, course.watch.note)


def _folders(outs: Sequence[str | os.PathLike[str]], count: int) -> list[Path]:
    folders = [Path(out) for out in outs]
    if len({folder.absolute() for folder in folders}) < count or len(folders) != count:
        raise UsageError(
            f"{count} trainings need a directory each, found {', '.join(map(str, folders))}"
        )
    return folders


def _plan(
    training: Training, trainset: Dataset, stores: Sequence[Store]
) -> tuple[ViewPlan | None, Augmentation | None]:
    """The views where there is no store, and the augmentation, where it is not the store's own."""
    spec = training.augment or (None if stores else default_augmentation(trainset))
    augmentation = make_augmentation(spec, trainset) if spec else None
    if augmentation is None or stores:
        return None, augmentation
    return ViewPlan(trainset, augmentation, training.stream_seed), augmentation


def _fields_read(
    training: Training, trainset: Dataset, stores: Sequence[Store], plan: ViewPlan | None
) -> tuple[tuple[str, ...], Shapes | None]:
    """What a loss reads of each teacher; where one in the loop gives it, as its record names it.

    Returns:
        The fields, and the shapes of the student's where they follow from the teacher in the loop.
    """
    objective = training.objective
    if not on_features(objective) or not objective.needs_teacher:
        return objective.teacher_fields, None
    if plan is None:
        augmentation = make_augmentation(training.augment, trainset) if training.augment else None
        samples = Samples(stores[0].keys, stores[0].labels, stores[0].keys_hashed)
        with about(stores[0].where):
            plan = ViewPlan.from_store(
                stores[0].plan, trainset, samples, augmentation, partial=True
            )
    image = view_shape(plan)
    student = shapes_of_model(training.model, trainset.classes, image, objective)
    stored = fields_of_training(objective, student, stores, image, bool(training.online))
    return (objective.teacher_fields, student) if stored is None else (stored, None)


def _views(
    training: Training,
    trainset: Dataset,
    stores: Sequence[Store],
    plan: ViewPlan | None,
    augmentation: Augmentation | None,
    rows: Rows,
    fields: Sequence[str],
    folders: Sequence[Path],
    device: str,
    ranks: Ranks,
) -> CachedViews:
    """The views that the trainings are shown; those of stores with the fields that are read."""
    read = () if training.online else fields
    return CachedViews(
        trainset,
        stores,
        training.optimization.batch_size,
        read,
        plan=plan,
        augmentation=augmentation,
        views=training.views,
        rows=rows,
        schedule=training.schedule,
        resident_views=_resident_views(training, folders, stores, read, len(rows), ranks),
        seed=training.stream_seed,
        device=device,
        workers=training.workers,
        subset=training.subset,
        pairs=training.objective.record.pairs,
        views_per_decode=training.views_per_decode,
        part=(ranks.rank, ranks.world),
    )


def _checked(
    training: Training,
    views: CachedViews,
    out: Path,
    watch: TrainingObserver,
    told: set[str],
    options: TrainingOptions,
) -> Preflight:
    """The checks before the first step, whose findings are told, each once, or refused."""
    reads = "logits" in training.objective.teacher_fields
    stores = views.holding("logits") if reads else []
    with stage("checking the stored logits" if stores else "checking the settings"):
        preflight = Preflight(training, views, stores, out, options.get("baseline"))
    if options.get("strict"):
        preflight.require_no_findings()
    for text in (*preflight.notes, *(f"warning: {finding}" for finding in preflight.findings)):
        if text not in told:
            watch.note(text)
            told.add(text)
    return preflight


def _resident_views(
    training: Training,
    folders: Sequence[Path],
    stores: Sequence[Store],
    fields: Sequence[str],
    rows: int,
    ranks: Ranks,
) -> int | None:
    """The window of the random schedule: as asked, as this run began, or what fits on every rank."""
    if training.schedule != "random" or training.resident_views is not None:
        return training.resident_views
    for folder in filter(is_run, folders):
        began: int | None = read_config(folder).get("data", {}).get("resident_views")
        return began
    if not stores or not fields or ranks.world == 1:
        return None
    teachers = join_fields(stores, fields)
    fit = views_that_fit(teachers, rows, torch.device(training.device), ranks.neighbours)
    return ranks.lowest(fit)


def require_alike(trainset: Dataset, testset: Dataset) -> None:
    """Refuse a test split that the network of the training split could not be measured on."""
    if trainset.item != testset.item:
        kinds = [str(data.item or "images") for data in (trainset, testset)]
        raise DataError(
            f"the training split of {trainset.name} holds {kinds[0]}, the test split {kinds[1]}: both "
            "need the same."
        )
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
    shape = view_shape(plan)
    channels, _, size = (3, 32, 32) if isinstance(shape, Item) else shape
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
