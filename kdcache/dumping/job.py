"""A whole dump, from what is asked for: `prepare_dump` finds everything out, its `run` writes the stores.

This is `kdcache dump-teacher` for programs::

    request = DumpRequest(DatasetSource("digits"), [TeacherRequest(Path("t.zarr"), "runs/teacher")], views=8)
    with prepare_dump(request) as prepared:
        print(prepared.estimate)
        prepared.run()
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.data.dataset import Rows
from kdcache.data.item import Item
from kdcache.data.loading import DatasetSource
from kdcache.distributed import PATIENCE, Ranks, join
from kdcache.dumping.clean_images import Clean, clean_side, clean_top1, labelled_splits
from kdcache.dumping.dump import Dumped, DumpObserver, dump
from kdcache.dumping.estimate import Estimate, estimate
from kdcache.dumping.first_rows import FirstRows, allowed
from kdcache.dumping.opening import Target, heavy_fields
from kdcache.dumping.outputs import AGAIN, CHECKED, check_outputs
from kdcache.dumping.plans import choose_plan, require_views, usual_views
from kdcache.dumping.requests import TeacherRequest, prepare_teacher, size_of_runs
from kdcache.preprocessing import slow_precision
from kdcache.teachers.load import require_known
from kdcache.teachers.posterior import posterior_samples
from kdcache.teachers.teacher import Teacher
from kdcache.teachers.vocabulary import require_ids
from kdcache.views import replay
from kdcache.views.plan import ViewPlan
from kdcache.views.sizes import view_shape
from kdcache_stores import open_store

#: Seconds that a teacher may be looked at beyond `allowed`, where something is wrong with it, or may be.
CLOSER_LOOK = 15.0


@dataclass(frozen=True)
class DumpRequest:
    """What a dump is asked for.

    Attributes:
        dataset: whose views are dumped.
        teachers: each with the path of its store.
        split, views, augment, seed: of the plan, see `choose_plan`.
        plan_from: a store whose views to use once more, after the replay proof.
        fields: what the teachers shall give.
        encoding, batch_size, workers, views_per_decode, part, hash_keys, shard_rows, repair: see `dump`.
        precision, channels_last, compile, allow_code: see `load_teacher`.
        mc_dropout: so many posterior samples of each teacher, one store each.
        allow_untrained: dump a teacher that guesses, or gives no logits.
        epochs, students: for the estimate.
        device: where the teachers run.
        threads: compute threads on the CPU; None: as torch chooses.
    """

    dataset: DatasetSource
    teachers: Sequence[TeacherRequest]
    split: str | None = None
    views: int | None = None
    augment: str | None = None
    seed: int | None = None
    plan_from: str | None = None
    fields: Sequence[str] = ("logits",)
    encoding: str | Mapping[str, str] | None = None
    batch_size: int = 256
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    mc_dropout: int | None = None
    allow_code: bool = False
    allow_untrained: bool = False
    hash_keys: bool = False
    shard_rows: int | None = None
    repair: bool = False
    part: tuple[int, int] = (0, 1)
    epochs: int = 240
    students: int = 1
    device: str = "cpu"
    workers: int = 0
    views_per_decode: int = 1
    threads: int | None = None


@dataclass(frozen=True)
class PreparedDump:
    """A dump that nothing is known to stand against.

    Attributes:
        plan: the views.
        targets: teachers, stores, and top-1 on clean images.
        views: how many of every sample.
        estimate: what it will cost.
        ranks: the processes that share it.
    """

    plan: ViewPlan
    targets: list[Target]
    views: int
    estimate: Estimate
    ranks: Ranks
    _settings: dict[str, Any]

    def run(self, watch: DumpObserver | None = None, command: str = "") -> Dumped:
        """Write the stores; see `dump`.

        Args:
            watch: told of the progress.
            command: the command line to record in the stores' provenance.
        """
        return dump(self.plan, self.targets, self.views, ranks=self.ranks, watch=watch,
                    command=command, **self._settings)  # fmt: skip


@contextmanager
def prepare_dump(
    request: DumpRequest, note: Callable[[str], None] = lambda text: None
) -> Iterator[PreparedDump]:
    """Load everything that a dump needs, check it, and estimate what it will cost; nothing is written.

    Under ``torchrun`` the ranks share the work; the first one alone takes notes.

    Args:
        request: what to dump.
        note: told what whoever runs the dump should know, a sentence each, as it turns up.

    Raises:
        KDCacheError: see `choose_plan`, `prepare_teacher`, `check_outputs`, `clean_top1`, `estimate`.
    """
    if request.threads:
        torch.set_num_threads(request.threads)
    with join(request.device, "gloo", PATIENCE) as (ranks, device):

        def tell(texts: Sequence[str]) -> None:
            for text in texts if ranks.is_first else ():
                note(text)

        for asked in request.teachers:
            require_known(asked.spec)
        tell(slow_precision(device, request.precision))
        trained_at = size_of_runs(request.teachers)
        plan, views = choose_plan(request.dataset, request.split, request.augment, request.seed,
                                  request.views, request.plan_from, trained_at)  # fmt: skip
        usual, own = usual_views(plan.dataset), usual_views(plan.dataset, trained_at)
        if request.augment is None and request.plan_from is None and own != usual:
            size = "the size that the teacher was trained at"
            tell([f"views: {own}, {size} (--augment says otherwise)"])
        if request.plan_from is not None:
            with open_store(request.plan_from) as store:
                tell([str(replay.check(plan, store, device))])
        require_views(plan, views, [teacher.out for teacher in request.teachers])
        tell(plan.dataset.remarks)
        splits = labelled_splits(request.dataset, plan.dataset)
        teachers: list[tuple[Teacher, Path]] = []
        specs: list[str] = []
        assumed: list[bool] = []
        for asked in request.teachers:
            teacher, origin, guessed = prepare_teacher(
                asked, splits.get("train", plan.dataset), device=device, fields=request.fields,
                precision=request.precision, channels_last=request.channels_last,
                compile=request.compile, allow_untrained=request.allow_untrained,
                allow_code=request.allow_code,
            )  # fmt: skip
            if teacher.weights_entry is not None:
                tell([f"{teacher.architecture}: weights of the entry {teacher.weights_entry}"])
            tell([f"{teacher.architecture}: preprocessing {origin}: {teacher.preprocessing}"])
            require_ids(teacher.module, f"teacher {teacher.architecture}", plan.dataset)
            tell(heavy_fields(teacher))
            count = request.mc_dropout
            made = posterior_samples(teacher, asked.out, count) if count else [(teacher, asked.out)]
            teachers += made
            assumed += [guessed] * len(made)
            spec = asked.spec if asked.weights is None else f"{asked.spec}@{asked.weights}"
            specs += [spec] * len(made)
        targets = [Target(*pair) for pair in teachers]
        shared: dict[str, Any] = {
            "batch_size": request.batch_size, "workers": request.workers, "device": device,
            "views_per_decode": request.views_per_decode,
            "hash_keys": request.hash_keys, "shard_rows": request.shard_rows,
            "part": request.part, "encoding": request.encoding,
        }  # fmt: skip
        looked = _Look(plan, [teacher for teacher, _ in teachers], request.allow_untrained, device)
        cost = ranks.on_first(
            lambda: estimate(plan, targets, views, ranks=ranks.world, epochs=request.epochs,
                             students=request.students, look=looked, **shared)
        )  # fmt: skip
        tell(ranks.on_first(lambda: looked.remarks))
        labelled, shape = list(splits.values()) if cost.rows else [], view_shape(plan)
        side = None if isinstance(shape, Item) else clean_side(plan.dataset, *shape[1:])
        left = allowed(cost.rows) - looked.forwards
        more = CLOSER_LOOK * cost.rows_per_second
        clean = ranks.on_first(
            lambda: [clean_top1(teacher, labelled, request.allow_untrained, side, left, more, guess)
                     for (teacher, _), guess in zip(teachers, assumed, strict=True)]
        )  # fmt: skip
        targets = [target._replace(clean_top1=of_it.top1 or None, clean_images=of_it.images)
                   for target, of_it in zip(targets, clean, strict=True)]  # fmt: skip
        for target, of_it, spec in zip(targets, clean, specs, strict=True):
            tell(_remarks(target, of_it, spec, request.dataset.name))
        settings = shared | {"repair": request.repair, "known": looked.first}
        yield PreparedDump(plan, targets, views, cost, ranks, settings)


def _remarks(target: Target, clean: Clean, spec: str, dataset: str) -> list[str]:
    """What clean images say of a teacher that may be worth more than it is."""
    if clean.advice is not None:
        return [f"warning: {clean.advice}"]
    if not clean.untried:
        return []
    store, spec, dataset = (shlex.quote(str(word)) for word in (target.path, spec, dataset))
    return [
        f"warning: {target.teacher.architecture} may have been trained with another preprocessing; to try "
        "some would cost too much of a dump as small as this. Before students train: "
        f"kdcache check {store} --dataset {dataset} --teacher {spec}"
    ]


class _Look:
    """Checks the first rows of a dump as they come, and keeps them for its fits.

    Attributes:
        first: the rows; None where none were forwarded here.
        remarks: on the teachers that gave them.
        forwards: of each teacher, that were not for a fit.
    """

    def __init__(
        self, plan: ViewPlan, teachers: Sequence[Teacher], allow: bool, device: str
    ) -> None:
        self.plan, self.teachers, self.allow, self.device = plan, teachers, allow, device
        self.first: FirstRows | None = None
        self.remarks: list[str] = []
        self.forwards = 0

    def __call__(self, first: FirstRows) -> None:
        self.first = first
        self.forwards = 0 if first.calibration else first.forwards
        self.forwards += AGAIN
        views = self.plan.images(first.rows[:AGAIN], 0, self.device)
        for teacher, fields in zip(self.teachers, first.outputs, strict=True):
            known = {name: values[0] for name, values in fields.items()}
            if "logits" not in known:  # other fields are stored, and these tell most
                self.forwards += min(CHECKED, len(first.rows))
                known["logits"] = _logits(self.plan, teacher, first.rows, self.device)
            self.remarks += check_outputs(teacher, views, self.allow, known)


def _logits(plan: ViewPlan, teacher: Teacher, rows: Rows, device: str) -> np.ndarray:
    """Of view 0 of a few rows, float32 (n, K), for a teacher of whom other fields are stored."""
    views = plan.images(rows[:CHECKED], 0, device)
    return teacher.logits(views).cpu().numpy()
