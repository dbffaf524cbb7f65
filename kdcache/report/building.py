"""The report of some runs and stores: one page that opens anywhere, and its figures as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from kdcache._version import __version__
from kdcache.data.dataset import Dataset
from kdcache.data.loading import load_dataset
from kdcache.report.collect import Group, RunRecord, find_runs, grouped, read_run
from kdcache.report.logits import (
    TestLogits,
    accuracy,
    by_group,
    calibrated,
    find_teacher,
    run_stores,
    spec_teacher,
    teacher_beside,
    teacher_logits,
)
from kdcache.report.page import Heading, Section, write_page
from kdcache.report.sample_panels import varied_samples
from kdcache.report.sections.store_section import plain_section, store_section
from kdcache.report.sections.training_section import training_section, warnings_of
from kdcache.report.standardization import standardization_section
from kdcache.report.survey import survey
from kdcache_stores import KDCacheError, Store, UsageError, open_store
from kdcache_stores.printable import printable

__all__ = ["Report", "report"]


@dataclass(frozen=True)
class Report:
    """What was written: the page, all files, and what could not be shown, with reasons."""

    page: Path
    files: list[Path]
    left_out: list[str]


def report(
    runs: Sequence[Path],
    stores: Sequence[str | Path],
    out: Path,
    *,
    teacher: str | None = None,
    dataset: str | None = None,
    data_root: Path | None = None,
    device: str = "cpu",
    workers: int = 0,
    toy: bool = False,
    command: str = "",
) -> Report:
    """Write the report of some runs and stores into a folder.

    Whatever a part needs and does not find (labels, weights, the dataset) leaves that part out, and the
    page says so.

    Args:
        runs: runs, or folders of runs.
        stores: paths of stores.
        teacher: as `load_teacher` takes it; default: the run that filled a store, where it is among
            ``runs`` or lies beside them or beside the store.
        dataset: as `load_dataset` takes it; default: the one that the runs were trained on.
        data_root: folder of the datasets; default: the one that the runs used.
        device: where the networks run.
        workers: processes that decode image files.
        toy: show the toy case of logit standardization too.
        command: what the page says that it was made by.

    Raises:
        UsageError: neither a run nor a store.
        KDCacheError: a path that is no run, or a store that cannot be opened.
    """
    if not runs and not stores:
        raise UsageError("nothing to report: give runs, or --store, or both.")
    records = [read_run(path) for path in find_runs(runs)]
    left_out: list[str] = []
    sections: list[Section] = []
    with ExitStack() as opened:
        read = [opened.enter_context(open_store(path)) for path in stores]
        known = [*read, *run_stores(records, opened)]
        teacher_run = find_teacher(records, known) if len(records) > 1 else None
        groups = grouped([run for run in records if run is not teacher_run])
        teacher_run = teacher_run or teacher_beside(records, known)
        config = records[0].config if records else None
        if config:
            testset = _dataset(
                dataset or config["data"]["name"],
                "test",
                data_root or _root(config),
                "The logits of teacher and students",
                left_out,
            )
            sections += _runs(
                groups, teacher_run, testset, teacher, known,
                device, workers, toy, left_out,
            )  # fmt: skip
        for store, name in zip(read, _names(stores), strict=True):
            sections.append(_store(store, name, config, dataset, data_root, left_out))
    parts = [f"{len(records)} run{'s' * (len(records) != 1)}"] * bool(records)
    parts += [f"{len(read)} store{'s' * (len(read) != 1)}"] * bool(read)
    title = "Distillation report" if records else "Store report"
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    made = [f"{now}, kdcache {__version__}", *([command] if command else [])]
    heading = Heading(title, " and ".join(parts) + ".", made, warnings_of(groups))
    files = write_page(out, heading, sections, left_out)
    return Report(files[0], files, left_out)


def _names(stores: Sequence[str | Path]) -> list[str]:
    """A name for each store and its files: of its folder, with plain characters alone, none twice."""
    names: list[str] = []
    for path in stores:
        stem = re.sub(r"[^\w.-]", "_", Path(path).name.removesuffix(".zarr"))
        spare = (f"{stem}-{number}" for number in count(2))
        names.append(next(name for name in chain([stem], spare) if name not in names))
    return names


def _runs(
    groups: list[Group],
    teacher: RunRecord | None,
    testset: Dataset | None,
    spec: str | None,
    stores: Sequence[Store],
    device: str,
    workers: int,
    toy: bool,
    left_out: list[str],
) -> list[Section]:
    predictions: dict[str, dict[int, TestLogits]] = {}
    teacher_logits: TestLogits | None = None
    if testset is not None:
        predictions = by_group(groups, testset, device, workers, left_out)
        try:
            teacher_logits = _teacher_logits(spec, teacher, testset, stores, device, workers)
        except KDCacheError as error:
            left_out.append(f"Figures that compare with the teacher: {error}")
    row = (
        Group(printable(f"teacher {teacher.config['model']['name']}"), (teacher,))
        if teacher
        else None
    )
    students = {
        label: [networks[seed] for seed in sorted(networks)]
        for label, networks in predictions.items()
    }
    everyone = [*groups, *([row] if row else [])]
    if row and teacher_logits and spec is None:
        predictions[row.label] = {row.runs[0].seed: teacher_logits}
    top1 = None if teacher_logits is None else accuracy(teacher_logits)
    training = training_section(groups, row, calibrated(everyone, predictions), top1)
    names = testset.class_names if testset else None
    logits = standardization_section(teacher_logits, students, names, toy)
    return [training, *([logits] if logits.figures else [])]


def _teacher_logits(
    spec: str | None,
    run: RunRecord | None,
    testset: Dataset,
    stores: Sequence[Store],
    device: str,
    workers: int,
) -> TestLogits:
    if spec is None and run is None:
        raise UsageError(
            "its logits on the test split need its weights: give --teacher, or its run beside the "
            "students and --store"
        )
    return teacher_logits(
        spec_teacher(spec or str(run and run.path), testset, device, stores),
        testset,
        device,
        workers,
    )


def _store(
    store: Store,
    name: str,
    config: dict[str, Any] | None,
    dataset: str | None,
    data_root: Path | None,
    left_out: list[str],
) -> Section:
    if "logits" not in store.fields:
        return plain_section(store, name)
    statistics = survey(store)
    wanted = dataset or (config["data"]["name"] if config else store.plan.dataset)
    images = _dataset(
        wanted,
        store.plan.split,
        data_root or (_root(config) if config else None),
        f"Pictures of the samples of {name}",
        left_out,
    )
    section = store_section(store, name, statistics)
    if images is None:
        return section
    if images.item is not None:
        left_out.append(f"Pictures of the samples of {name}: they are {images.item}, no images")
        return section
    try:
        strips, table, sheet = varied_samples(store, statistics, images)
    except KDCacheError as error:
        left_out.append(f"Pictures of the samples of {name}: {error}")
        return section
    return replace(
        section,
        strips=strips,
        strips_intro=f"The {len(strips)} samples whose logits vary most over the views. Views are ordered "
        "by the probability that the teacher gives to the label, least first.",
        files={f"{name}-samples.csv": table},
        pictures={f"{name}-samples.png": sheet},
    )


def _dataset(
    name: str, split: str, root: Path | None, what: str, left_out: list[str]
) -> Dataset | None:
    try:
        return load_dataset(name, split, root)
    except (KDCacheError, OSError) as error:
        left_out.append(f"{what}: {error} (see --dataset and --data-root)")
        return None


def _root(config: dict[str, Any]) -> Path | None:
    root = config["data"].get("root")
    return Path(root) if root else None
