"""dump-teacher."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress

from kdcache_cli import dump_page, groups, options
from kdcache_cli.app import common
from kdcache_cli.output import LogLines, StageBars, emit, is_first, percent, progress, say, size

if TYPE_CHECKING:
    from kdcache.dumping.job import DumpRequest


class Bar:
    """A bar over the rows of a dump, with what is known so far beside it; in a log, lines."""

    def __init__(self, bars: Progress, log: LogLines) -> None:
        self.bars, self.log = bars, log
        self.task = bars.add_task("dump", total=None, note="")
        self.rows = self.done = self.total = self.nbytes = 0
        self.begun = time.perf_counter()

    def start(self, done: int, total: int) -> None:
        """Begin where the stores already are."""
        self.bars.update(self.task, completed=done, total=total)
        self.done, self.total, self.begun = done, total, time.perf_counter()

    def batch(self, rows: int, top1: float | None) -> None:
        """Advance, with the teacher's running accuracy on the views."""
        self.rows += rows
        notes = [f"{self.rows / (time.perf_counter() - self.begun):,.0f} rows/s"]
        notes += [size(self.nbytes)] if self.nbytes else []
        notes += [] if top1 is None else [f"teacher top-1 {percent(top1)}"]
        self.bars.update(self.task, advance=rows, note=" · ".join(notes))
        done = self.done + self.rows
        self.log(f"dump, {done:,} of {self.total:,} rows: {', '.join(notes)}", after=30)

    def written(self, nbytes: int) -> None:
        """What was written, shown with the next batch."""
        self.nbytes += nbytes


@groups.command(
    "dump-teacher",
    "kdcache dump-teacher --dataset cifar100 --teacher resnet56@teacher.pth --views 8 --out t.zarr",
    "kdcache dump-teacher --dataset folder:photos --teacher timm:resnet50@w.pth --out t.zarr --dry-run",
)
@options.dataset
@options.skip_bad
@groups.DATA.option(
    "--split", help="train, test or unlabeled [default: train, or that of --plan-from]."
)
@groups.TEACHER.option(
    "--teacher",
    "teachers",
    type=options.NETWORK,
    multiple=True,
    required=True,
    help="A run of train-teacher, or NAME@WEIGHTS. Several, each with its --out, share one pass.",
)
@groups.TEACHER.option("--weights", help="Weights of a single --teacher NAME.")
@groups.OUTPUT.option(
    "--out",
    "outs",
    multiple=True,
    required=True,
    type=options.LOCAL_PATH,
    help="The store, one for each --teacher.",
)
@groups.VIEWS.option("--views", type=click.IntRange(1), help="Views of every sample.")
@groups.VIEWS.option(
    "--augment",
    type=options.AUGMENTATION,
    help="[default: pad-crop-flip up to 96 pixels, else resized-crop-flip]",
)
@groups.VIEWS.option("--seed", type=options.SEED, help="Of the views [default: 0].")
@groups.VIEWS.option(
    "--plan-from",
    type=options.STORE,
    help="A store whose views to use once more, after the replay proof.",
)
@groups.OUTPUT.option(
    "--fields",
    default="logits",
    show_default=True,
    callback=lambda c, p, v: tuple(v.split(",")),
    help="What to store of each view; see `kdcache list fields`.",
)
@groups.OUTPUT.option(
    "--encoding",
    "encoding",
    multiple=True,
    callback=lambda c, p, v: options.encodings(v),
    help="Of the logits, or FIELD=ENCODING [default: a store's own; of new logits compact:2.5e-5 from "
    "8 views, 32 classes and 8 rows a class on, else float16].",
)
@groups.MACHINE.option("--batch-size", type=click.IntRange(1), default=256, show_default=True)
@groups.MACHINE.option(
    "--precision", default="float32", show_default=True, help="float32, bf16 or fp16."
)
@groups.MACHINE.option("--channels-last", is_flag=True, help="Memory layout that GPUs prefer.")
@groups.MACHINE.option("--compile", is_flag=True, help="Compile the teachers with torch.compile.")
@options.foreign
@groups.TEACHER.option(
    "--class-map",
    "class_maps",
    multiple=True,
    type=options.LOCAL_PATH,
    help="File of pairs: the teacher's class, the dataset's class.",
)
@groups.TEACHER.option(
    "--mc-dropout", type=click.IntRange(1), help="So many posterior samples, one store each."
)
@options.allow_code
@groups.TEACHER.option(
    "--allow-untrained", is_flag=True, help="Dump a teacher that guesses, or gives no logits."
)
@groups.OUTPUT.option(
    "--hash-keys", is_flag=True, help="Store the SHA-256 of each key, not the key."
)
@groups.OUTPUT.option(
    "--shard-rows",
    type=click.IntRange(1),
    help="Rows of a view that one shard holds at most: the grain of parts, ranks and interrupts "
    "[default: 65,536, and at most 64 MiB; a store's own].",
)
@groups.VIEWS.option(
    "--views-per-decode",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Views made of an image file each time it is decoded; the store is the same.",
)
@groups.OUTPUT.option(
    "--repair", is_flag=True, help="Check a finished store; write damaged shards anew."
)
@groups.MACHINE.option(
    "--part", callback=lambda c, p, v: options.part(v), help="i/n, i from 0: a job's share."
)
@groups.OUTPUT.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="All that is known of the store, as `kdcache inspect` shows it.",
)
@groups.OUTPUT.option("--dry-run", is_flag=True, help="Only the estimate.")
@groups.OUTPUT.option(
    "--epochs", type=click.IntRange(1), default=240, help="Of a student, for the estimate."
)
@groups.OUTPUT.option("--students", type=click.IntRange(1), default=1, help="For the estimate.")
@options.device
@common
def dump_teacher(as_json: bool, quiet: bool, dry_run: bool, verbose: bool, **given: Any) -> None:
    """Run teachers once over the views of a dataset and store their logits, or other fields.

    All samples of the split are stored; train-student chooses among them (--train-samples, --val-split).

    Run it again on an unfinished store and it completes what is missing; with more --views it adds
    them. Under torchrun the ranks share the work.
    """
    from kdcache.dumping.job import prepare_dump
    from kdcache.stages import watching

    request = _request(dict(given))
    first = is_first()
    quiet, as_json = quiet or not first, as_json and first
    with (
        progress(quiet, "") as bars,
        watching(StageBars(bars, quiet)),
        prepare_dump(request, lambda text: say(text, quiet)) as prepared,
    ):
        dump_page.before(prepared.targets, prepared.estimate, given, quiet)
        if dry_run:
            clean = [target.clean_top1 or {} for target in prepared.targets]
            emit({"estimate": prepared.estimate.to_dict(), "clean_top1": clean}, as_json)
            return
        try:
            done = prepared.run(Bar(bars, LogLines(quiet)), dump_page.command_line())
        except KeyboardInterrupt:
            bars.stop()
            say(dump_page.interrupted(), quiet)
            raise
        bars.stop()
        if first:
            dump_page.after(prepared, done, given | {"verbose": verbose}, as_json, quiet)


def _request(given: dict[str, Any]) -> DumpRequest:
    """What the options ask for; one that is given once holds for all teachers."""
    from kdcache.dumping.job import DumpRequest
    from kdcache.dumping.requests import TeacherRequest

    specs, outs, weights = (given.pop(name) for name in ("teachers", "outs", "weights"))
    if len(outs) != len(specs):
        raise click.UsageError(
            f"{len(specs)} --teacher and {len(outs)} --out: give a store for each teacher."
        )
    if weights and len(specs) > 1:
        raise click.UsageError("--weights is for a single teacher; write --teacher NAME@WEIGHTS.")
    normalisations = options.preprocessings(given, len(specs))
    sizes = options.each("--size", given.pop("sizes"), len(specs))
    maps = options.each("--class-map", given.pop("class_maps"), len(specs))
    teachers = [
        TeacherRequest(out, spec, weights, normalisation, side, class_map)
        for out, spec, normalisation, side, class_map in zip(
            outs, specs, normalisations, sizes, maps, strict=True
        )
    ]
    device = options.resolve_device(given.pop("device"), given.pop("threads"))
    asked = {"dataset": options.source(given), "teachers": teachers, "device": device}
    (values,) = options.deal(given | asked, DumpRequest)
    return DumpRequest(**values)
