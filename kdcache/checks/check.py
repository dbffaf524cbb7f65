"""Checks of stores, or of a finished run, without training: what `kdcache check` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcache.checks.all_rules import run_rules
from kdcache.checks.case import Case
from kdcache.checks.earlier_runs import Fit, read_baseline
from kdcache.checks.finding import Finding
from kdcache.checks.needed_fields import missing_fields
from kdcache.data.choice import choose
from kdcache.data.dataset import Dataset
from kdcache.data.item import Item
from kdcache.data.loading import load_dataset
from kdcache.dumping.clean_images import clean_images, clean_side
from kdcache.dumping.recheck import load_stored_teacher
from kdcache.methods.config import ObjectiveConfig
from kdcache.preprocessing import Preprocessing
from kdcache.runs import read_config
from kdcache.teachers.trials import Trials, try_out
from kdcache.views.cached import CachedViews
from kdcache.views.sizes import InputShape, view_shape
from kdcache_stores import MismatchError, Store, UsageError, join_fields, open_store
from kdcache_stores.errors import about
from kdcache_stores.read.join import expected


@dataclass(frozen=True)
class CheckRequest:
    """What to check; every part of it but the stores may be unknown.

    Attributes:
        stores: paths of stores of one view plan.
        objective: the loss that a student will have.
        epochs: of the student.
        views: how many of the stored views it cycles through.
        dataset: a name as `load_dataset` takes it; needed for a part of the samples, and for a teacher.
        train_samples, val_split, seed, subset: as of `kdcache.training.Training`.
        student: name of its model; a baseline must be of it.
        baseline: a finished run of the student by cross-entropy.
        teacher: as `load_teacher` takes it; tried with other preprocessing than the first store's.
        run: a finished run of a student, whose end is checked too.
        expect: content digests that the stores must have, in their order; see `expected`.
    """

    stores: tuple[str, ...]
    objective: ObjectiveConfig | None = None
    epochs: int | None = None
    views: int | None = None
    dataset: str | None = None
    data_root: str | None = None
    download: bool = False
    train_samples: int | None = None
    val_split: float = 0.0
    seed: int = 0
    subset: bool = False
    student: str | None = None
    baseline: str | None = None
    teacher: str | None = None
    run: str | None = None
    expect: tuple[str, ...] = ()
    device: str = "cpu"

    @classmethod
    def of_run(
        cls, run: str | os.PathLike[str], stores: Sequence[str] = (), **options: Any
    ) -> CheckRequest:
        """The check of a finished run: everything as its config says.

        Args:
            run: its directory.
            stores: where its stores lie now (default: where they lay).
            options: what to take instead.

        Raises:
            DataError: no run.
            UsageError: it read no store.
        """
        config = read_config(run)
        data, training = config["data"], config["training"]
        paths = tuple(stores) or tuple(config.get("store_paths", ()))
        if not paths or "stores" not in config:
            raise UsageError(f"{run} was trained without a store: there is nothing to check it by")
        with about(str(run)):
            objective = ObjectiveConfig.from_dict(config["objective"])
        check = cls(
            stores=paths,
            objective=objective,
            epochs=training["epochs"],
            views=data.get("views"),
            dataset=data["name"],
            data_root=data.get("root"),
            train_samples=data.get("train_samples"),
            val_split=data.get("val_split", 0.0),
            seed=training["seed"],
            subset=data.get("subset", False),
            student=config["model"]["name"],
            run=str(run),
        )
        return replace(check, **{k: v for k, v in options.items() if v is not None})


def check_stores(request: CheckRequest) -> list[Finding]:
    """Run every rule over what is to be checked; the findings, none where nothing is wrong.

    Raises:
        KDCacheError: see `open_store`, `CachedViews`; MismatchError for a baseline, a run or a teacher of
            other data or weights; UsageError where the dataset is needed and not named.
    """
    if request.dataset is None and (request.teacher or request.train_samples or request.val_split):
        raise UsageError("a teacher, or a part of the samples, needs the dataset: give --dataset")
    with ExitStack() as opened:
        stores = [
            opened.enter_context(open_store(path, expect=digest))
            for path, digest in expected(request.stores, request.expect)
        ]
        objective, missing = request.objective, []
        if objective is None or "logits" in objective.teacher_fields or request.teacher:
            holders = [fields["logits"] for fields in join_fields(stores, ("logits",))]
        else:  # of what other fields hold, the rules know nothing
            holders = []
        image = None
        case = Case(stores=holders, objective=request.objective, epochs=request.epochs)
        fingerprint = None
        if request.dataset is None:
            case = replace(case, views=case.used[: request.views] if holders else None)
        else:
            root = Path(request.data_root) if request.data_root else None
            data = load_dataset(request.dataset, stores[0].plan.split, root, request.download)
            fingerprint = data.fingerprint
            rows, _ = choose(data, request.train_samples, request.val_split, request.seed)
            views = CachedViews(
                data,
                stores,
                1,
                (),
                views=request.views,
                rows=rows,
                subset=request.subset,
            )
            assert views.views is not None
            image = view_shape(views.plan)
            case = replace(
                case, rows=views.rows, views=range(views.first, views.first + views.views)
            )
            if request.teacher:
                case = replace(case, trials=_trials(request, holders[0], data, image))
        if request.baseline:
            wanted = {"model.name": request.student, "data.fingerprint": fingerprint}
            known = {name: value for name, value in wanted.items() if value is not None}
            case = replace(case, baseline=read_baseline(request.baseline, known))
        if request.run:
            _require_stores_of(request.run, stores)
            case = replace(case, fit=Fit.of_run(request.run))
        if objective is not None:
            missing = list(missing_fields(objective, stores, request.student, image))
        return missing + run_rules(case)


def _require_stores_of(run: str, stores: Sequence[Store]) -> None:
    then = [store.get("plan", "") for store in read_config(run)["stores"]]
    now = [store.plan.digest for store in stores]
    if then != now:
        raise MismatchError(
            f"{run} read stores of the view plans {[d[:12] for d in then]}, given are "
            f"{[d[:12] for d in now]}: give the run's own stores, in its order."
        )


def _trials(request: CheckRequest, store: Store, data: Dataset, view: InputShape) -> Trials | None:
    """The teacher of the first store, tried on clean images; None where none is labelled."""
    assert request.teacher is not None
    shape = data.image_shape
    teacher = load_stored_teacher(store, request.teacher, request.device, shape)
    if teacher.weights_sha256 != store.teacher.weights_sha256:
        raise MismatchError(
            f"--teacher {request.teacher} has weights {teacher.weights_sha256[:12]}, the logits in "
            f"{store.where} are of {store.teacher.weights_sha256[:12]}: give the store's own teacher."
        )
    images, labels = clean_images(
        data, None if isinstance(view, Item) else clean_side(data, *view[1:])
    )
    if not len(labels) or data.item is not None:  # nothing to try in place of no preprocessing
        return None
    measured = None if data.images is None else Preprocessing.measured(data.images)
    return try_out(teacher, images, labels, measured)
