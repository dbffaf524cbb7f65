"""What a dump is asked for: teachers made ready, tested on clean images, each with its store."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kdcache.augment.custom import Custom
from kdcache.augment.pairs import WeakStrong
from kdcache.augment.specs import default_augmentation, make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.loading import load_dataset
from kdcache.dumping.sanity import Check, clean_check, require_trained, sample_size
from kdcache.models.classes import load_class_map
from kdcache.preprocessing import PREPROCESSINGS, Preprocessing, normalisation
from kdcache.teachers import Teacher, load_teacher, mc_dropout, teacher_class_names
from kdcache.views.plan import ViewPlan
from kdcache_stores import DataError, MismatchError, Samples, UsageError, open_store
from kdcache_stores.objects.files import LocalFiles
from kdcache_stores.write.begin import require_place


@dataclass(frozen=True)
class TeacherRequest:
    """One teacher as asked for.

    Attributes:
        spec: as `load_teacher` takes it.
        weights: as `load_teacher` takes it.
        preprocessing: mean and std that it was trained with. None: its own, else its dataset's.
        size: side in pixels that views are resized to. None: its own.
        class_map: file that maps its classes to the dataset's.
    """

    spec: str
    weights: str | None = None
    preprocessing: Preprocessing | None = None
    size: int | None = None
    class_map: Path | None = None


def prepare_teacher(
    request: TeacherRequest,
    trainset: Dataset,
    *,
    precision: str = "float32",
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    compile: bool = False,
    allow_untrained: bool = False,
    allow_code: bool = False,
    fields: Sequence[str] = ("logits",),
) -> tuple[Teacher, str]:
    """Load a teacher for the views of a dataset.

    Args:
        request: which one.
        trainset: the dataset's training split; its normalisation is the last resort.
        allow_code: import the function that a run names, if its network is a user's own.
        fields: what it shall give.

    Returns:
        The teacher, and in words where its preprocessing comes from.
    """
    channels, side = (
        (trainset.image_shape[0], trainset.image_shape[-1]) if trainset.image_shape else (3, 224)
    )
    given = request.preprocessing
    if given is not None and request.size is not None:
        given = replace(given, size=request.size)
    fallback = replace(normalisation(trainset), size=request.size)
    mapped = None
    if request.class_map is not None:
        spec = request.spec if request.weights is None else f"{request.spec}@{request.weights}"
        names = teacher_class_names(spec)
        mapped = load_class_map(
            request.class_map, trainset.classes, trainset.class_names, teacher_names=names
        )
    teacher = load_teacher(
        request.spec,
        request.weights,
        classes=trainset.classes,
        channels=channels,
        size=side,
        preprocessing=given,
        fallback=fallback,
        class_map=mapped,
        precision=precision,
        device=device,
        channels_last=channels_last,
        compile=compile,
        allow_untrained=allow_untrained,
        allow_code=allow_code,
        fields=fields,
    )
    if given is not None:
        return teacher, "as given"
    if teacher.preprocessing is fallback:
        published = trainset.name in PREPROCESSINGS
        imagenet = "ImageNet's, as the images differ in size"
        measured = imagenet if trainset.images is None else f"measured on {trainset.name}"
        return teacher, f"published for {trainset.name}" if published else measured
    if request.size is not None:
        sized = replace(teacher.preprocessing, size=request.size)
        return replace(teacher, preprocessing=sized), "its own, at the size given"
    return teacher, "its own"


def asked_plan(
    name: str,
    split: str,
    root: Path | None,
    download: bool,
    augment: str | None,
    seed: int,
    views: int | None,
    skip_bad: bool = False,
) -> tuple[ViewPlan, int]:
    """A plan from what was asked for, and its number of views.

    Args:
        augment: None: `default_augmentation`.
        views: None: as many as the augmentation fixes, where it does.
        skip_bad: see `load_dataset`.

    Raises:
        UsageError: the augmentation leaves the number of views open, and none is given.
    """
    data = load_dataset(name, split, root, download, skip_bad)
    plan = ViewPlan(data, make_augmentation(augment or default_augmentation(data), data), seed)
    count = views or (1 if plan.augmentation.fixed else plan.views)
    _require_seeded(plan)
    if count is None:
        raise UsageError(
            f"say how many views of every sample {plan.augmentation.name} shall give: --views N"
        )
    return plan, count


def _require_seeded(plan: ViewPlan) -> None:
    """Refuse a user's pipeline that gives another image each time, whatever it is seeded with."""
    if not isinstance(plan.augmentation, Custom):
        return
    rows = np.arange(min(len(plan), 4))
    if not torch.equal(plan.images(rows, 0), plan.images(rows, 0)):
        raise UsageError(
            f"{plan.augmentation.path} gives another image for the same sample and view each time. A "
            "view must be reproducible: draw from the generators of torch, NumPy or random, which "
            "are seeded before each call, and from none of your own"
        )


def require_views(plan: ViewPlan, views: int, stores: Sequence[Path]) -> None:
    """What can be refused of a dump before its teachers are loaded.

    Raises:
        UsageError: an odd number of weak and strong views, or a store that is a URL.
        StoreInUse: a folder that holds something else.
    """
    if isinstance(plan.augmentation, WeakStrong) and views % 2:
        raise UsageError(
            f"{views} views of {plan.augmentation.name} leave a weak one without its strong one: "
            f"--views {views + 1} or another even number"
        )
    for store in stores:
        if re.match(r"[a-z][a-z0-9+.-]+:/", str(store)):
            raise UsageError(
                f"a dump writes to a folder, not to {store}: dump it here, then `push` it"
            )
        require_place(LocalFiles(store))


def stored_plan(
    store: str | os.PathLike[str],
    name: str,
    root: Path | None = None,
    download: bool = False,
    augment: str | None = None,
    seed: int | None = None,
    skip_bad: bool = False,
) -> tuple[ViewPlan, int]:
    """The plan of a store over a dataset that is here, and the store's number of views.

    Args:
        augment: needed for a user's own alone; a built-in one must be the store's.
        seed: if given, must be the store's.

    Raises:
        MismatchError: dataset, augmentation or seed are not those of the store.
    """
    with open_store(store) as opened:
        plan, views = opened.plan, opened.view_range.stop
        samples = Samples(opened.keys, opened.labels, opened.keys_hashed)
    if seed is not None and seed != plan.seed:
        raise MismatchError(f"the plan of {store} has the seed {plan.seed}, asked for {seed}")
    data = load_dataset(name, plan.split, root, download, skip_bad)
    own = make_augmentation(augment, data) if augment else None
    return ViewPlan.from_store(plan, data, samples, own), views


def labelled_splits(
    name: str,
    data: Dataset,
    root: Path | None = None,
    download: bool = False,
    skip_bad: bool = False,
) -> dict[str, Dataset]:
    """The training and test split of a dataset, as far as they are there; `data` is one split."""
    splits = {}
    for split in ("train", "test"):
        try:
            splits[split] = (
                data if data.split == split else load_dataset(name, split, root, download, skip_bad)
            )
        except DataError:
            continue
    return splits


def clean_top1(
    teacher: Teacher, splits: Sequence[Dataset], allow_untrained: bool = False, size: int = 224
) -> dict[str, float]:
    """Top-1 on a sample of the clean images of each split, by its name; unlabelled ones are left out.

    The teacher is tested on all of them together: a test split may be too small to tell.

    Args:
        size: side of the central crop of images that differ in size: that of the views.

    Raises:
        MismatchError: the teacher guesses, or its classes are ordered otherwise; see
            `require_trained`.
    """
    checks: dict[str, Check] = {}
    for dataset in splits:
        images, labels = clean_images(dataset, size)
        if not len(labels):
            continue
        checks[dataset.split] = clean_check(teacher, images, labels)
    if checks and not allow_untrained:
        labels, predictions = (np.concatenate(parts) for parts in zip(*(
            (check.labels, check.predictions) for check in checks.values()
        ), strict=True))  # fmt: skip
        counts = " and ".join(f"{len(check.labels)} {split}" for split, check in checks.items())
        where = f"clean images of {splits[0].name} ({counts})"
        require_trained(teacher, Check(labels, predictions, teacher.classes), where)
    return {split: check.top1 for split, check in checks.items()}


def clean_images(dataset: Dataset, size: int = 224) -> tuple[torch.Tensor, np.ndarray]:
    """A sample of the labelled images as they are: uint8 (N, C, H, W), and labels int64 (N,).

    Args:
        size: side of the central crop of images that differ in size.
    """
    labelled = np.flatnonzero(dataset.labels >= 0)
    count = min(sample_size(dataset.classes), len(labelled))
    if not count:
        return torch.zeros(0, 3, size, size, dtype=torch.uint8), np.zeros(0, np.int64)
    rows = labelled[np.arange(count) * len(labelled) // count]
    view = f"center-crop:size={size},resize={round(size * 256 / 224)}"
    view = "none" if dataset.image_shape is not None else view
    plan = ViewPlan(dataset, make_augmentation(view, dataset), seed=0)
    return plan.images(rows, np.zeros(count, np.int64)), dataset.labels[rows]


def posterior(teacher: Teacher, path: Path, samples: int) -> list[tuple[Teacher, Path]]:
    """Posterior samples of a teacher with dropout, each with its store: A.zarr -> A-mc0.zarr, ...

    Raises:
        UsageError: the teacher has no active dropout layer.
    """
    return [
        (mc_dropout(teacher, seed), path.with_name(f"{path.stem}-mc{seed}{path.suffix}"))
        for seed in range(samples)
    ]
