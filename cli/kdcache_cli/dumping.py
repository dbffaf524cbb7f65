"""dump-teacher."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress

from kdcache_cli import dump_page, options
from kdcache_cli.app import common
from kdcache_cli.output import emit, percent, progress, say, size

if TYPE_CHECKING:
    from kdcache.data.dataset import Dataset
    from kdcache.dumping.requests import TeacherRequest
    from kdcache.teachers import Teacher
    from kdcache.views.plan import ViewPlan


class Bar:
    """A bar over the rows of a dump, with what is known so far beside it."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.task = bars.add_task("dump", total=None, note="")
        self.rows = self.done = self.nbytes = 0
        self.begun = time.perf_counter()

    def start(self, done: int, total: int) -> None:
        """Begin where the stores already are."""
        self.bars.update(self.task, completed=done, total=total)
        self.done, self.begun = done, time.perf_counter()

    def batch(self, rows: int, top1: float | None) -> None:
        """Advance, with the teacher's running accuracy on the views."""
        self.rows += rows
        notes = [f"{self.rows / (time.perf_counter() - self.begun):,.0f} rows/s"]
        notes += [size(self.nbytes)] if self.nbytes else []
        notes += [] if top1 is None else [f"teacher top-1 {percent(top1)}"]
        self.bars.update(self.task, advance=rows, note=" · ".join(notes))

    def written(self, nbytes: int) -> None:
        """What was written, shown with the next batch."""
        self.nbytes += nbytes


@click.command("dump-teacher")
@options.dataset
@options.skip_bad
@click.option("--split", default="train", show_default=True, help="train, test or unlabeled.")
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    required=True,
    help="A run of train-teacher, or NAME@WEIGHTS. Several, each with its --out, share one pass.",
)
@click.option("--weights", help="Weights of a single --teacher NAME.")
@click.option(
    "--out",
    "outs",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="The store, one for each --teacher.",
)
@click.option("--views", type=click.IntRange(1), help="Views of every sample.")
@click.option(
    "--augment",
    help="[default: pad-crop-flip up to 96 pixels, else resized-crop-flip]",
)
@click.option("--seed", type=options.SEED, help="Of the views [default: 0].")
@click.option(
    "--plan-from",
    type=click.Path(path_type=Path),
    help="A store whose views to use once more, after the replay proof.",
)
@click.option(
    "--fields",
    default="logits",
    show_default=True,
    callback=lambda c, p, v: tuple(v.split(",")),
    help="What to store of each view: logits, pooled, or a field that your own module gives.",
)
@click.option(
    "--encoding",
    "encodings",
    multiple=True,
    callback=lambda c, p, v: options.encodings(v),
    help="Of the logits, or FIELD=ENCODING [default: a store's own; of new logits compact:2.5e-5 from "
    "8 views on, else float16].",
)
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True)
@click.option("--precision", default="float32", show_default=True, help="float32, bf16 or fp16.")
@click.option("--channels-last", is_flag=True, help="Memory layout that GPUs prefer.")
@click.option("--compile", is_flag=True, help="Compile the teachers with torch.compile.")
@options.foreign
@click.option(
    "--class-map",
    "class_maps",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File of pairs: the teacher's class, the dataset's class.",
)
@click.option(
    "--mc-dropout", type=click.IntRange(1), help="So many posterior samples, one store each."
)
@options.allow_code
@click.option(
    "--allow-untrained", is_flag=True, help="Dump a teacher that guesses, or gives no logits."
)
@click.option("--hash-keys", is_flag=True, help="Store the SHA-256 of each key, not the key.")
@click.option("--repair", is_flag=True, help="Check a finished store; write damaged shards anew.")
@click.option(
    "--part", callback=lambda c, p, v: options.part(v), help="i/n, i from 0: a job's share."
)
@click.option("--dry-run", is_flag=True, help="Only the estimate.")
@click.option(
    "--epochs", type=click.IntRange(1), default=240, help="Of a student, for the estimate."
)
@click.option("--students", type=click.IntRange(1), default=1, help="For the estimate.")
@options.device
@common
def dump_teacher(
    device: str, threads: int | None, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Run teachers once over the views of a dataset and store their logits, or other fields.

    Run it again on an unfinished store and it completes what is missing; with more --views it adds
    them. Under torchrun the ranks share the work.
    """
    import numpy as np
    import torch

    from kdcache.distributed import PATIENCE, join
    from kdcache.dumping.dump import dump
    from kdcache.dumping.estimate import estimate
    from kdcache.dumping.opening import Target
    from kdcache.dumping.outputs import CHECKED, check_outputs
    from kdcache.dumping.requests import (
        clean_top1,
        labelled_splits,
        posterior,
        prepare_teacher,
        require_views,
    )
    from kdcache.views.sizes import view_shape

    requests = _requests(given)
    if threads:
        torch.set_num_threads(threads)
    with join(options.resolve_device(device), "gloo", PATIENCE) as (ranks, where):
        silent = quiet or as_json or ranks.rank > 0
        data, plan, views = _plan(given, where, silent)
        require_views(plan, views, given["outs"])
        for remark in data.remarks:
            say(remark, silent)
        splits = labelled_splits(
            given["dataset"], data, given["data_root"], given["download"], given["skip_bad"]
        )
        how = {name: given[name] for name in ("precision", "channels_last", "compile", "fields")}
        pairs: list[tuple[Teacher, Path]] = []
        for request, out in zip(requests, given["outs"], strict=True):
            teacher, source = prepare_teacher(
                request, splits.get("train", data), device=where,
                allow_untrained=given["allow_untrained"], allow_code=given["allow_code"], **how,
            )  # fmt: skip
            say(dump_page.preprocessing_text(teacher, source), silent)
            count = given["mc_dropout"]
            pairs += posterior(teacher, out, count) if count else [(teacher, out)]
        shared = {name: given[name] for name in ("batch_size", "workers", "hash_keys")}
        shared |= {"device": where, "part": given["part"], "encoding": given["encodings"]}
        bare = [Target(*pair) for pair in pairs]
        first = np.arange(min(len(plan), CHECKED))
        remarks = ranks.on_first(lambda: [
            text for teacher, _ in pairs
            for text in check_outputs(teacher, plan.images(first, 0, where), given["allow_untrained"])
        ])  # fmt: skip
        for remark in remarks:
            say(remark, silent)
        cost = ranks.on_first(
            lambda: estimate(plan, bare, views, ranks=ranks.world, epochs=given["epochs"],
                             students=given["students"], **shared)
        )  # fmt: skip
        tested, side = list(splits.values()) if cost.rows else [], view_shape(plan)[1]
        clean = ranks.on_first(
            lambda: [clean_top1(t, tested, given["allow_untrained"], side) for t, _ in pairs]
        )
        targets = [
            Target(t, out, top1 or None) for (t, out), top1 in zip(pairs, clean, strict=True)
        ]
        dump_page.before(targets, cost, given, silent)
        if given["dry_run"]:
            if ranks.rank == 0:
                emit({"estimate": cost.to_dict(), "clean_top1": clean}, as_json)
            return
        with progress(silent, "rows") as bars:
            bar = Bar(bars)
            try:
                done = dump(
                    plan, targets, views, ranks=ranks, repair=given["repair"],
                    command=dump_page.command_line(), watch=bar, **shared,
                )  # fmt: skip
            except KeyboardInterrupt:
                bars.stop()
                say(dump_page.interrupted(), silent)
                raise
        if ranks.rank == 0:
            dump_page.after(targets, done, cost, given, as_json, silent)


def _requests(given: dict[str, Any]) -> list[TeacherRequest]:
    """One request per teacher; an option given once holds for all of them."""
    from kdcache.dumping.requests import TeacherRequest

    specs = given["teachers"]
    if len(given["outs"]) != len(specs):
        raise click.UsageError(
            f"{len(specs)} --teacher and {len(given['outs'])} --out: give a store for each teacher."
        )
    if given["weights"] and len(specs) > 1:
        raise click.UsageError("--weights is for a single teacher; write --teacher NAME@WEIGHTS.")
    normalisations = options.preprocessings(given, len(specs))
    sizes = options.each("--size", given["sizes"], len(specs))
    maps = options.each("--class-map", given["class_maps"], len(specs))
    return [
        TeacherRequest(spec, given["weights"], normalisation, side, class_map)
        for spec, normalisation, side, class_map in zip(
            specs, normalisations, sizes, maps, strict=True
        )
    ]


def _plan(given: dict[str, Any], device: str, silent: bool) -> tuple[Dataset, ViewPlan, int]:
    """The dataset, the plan over it, and how many views: as asked for, or as another store's."""
    from kdcache.dumping.requests import asked_plan, stored_plan
    from kdcache.views import replay
    from kdcache_stores import open_store

    where = given["dataset"], given["data_root"], given["download"]
    augment, seed, views = given["augment"], given["seed"], given["views"]
    if given["plan_from"] is None:
        name, root, download = where
        plan, views = asked_plan(
            name, given["split"], root, download, augment, seed or 0, views, given["skip_bad"]
        )
        return plan.dataset, plan, views
    plan, stored = stored_plan(given["plan_from"], *where, augment, seed, given["skip_bad"])
    with open_store(given["plan_from"]) as store:
        say(str(replay.check(plan, store, device)), silent)
    return plan.dataset, plan, views or stored
