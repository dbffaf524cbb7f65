"""dump-teacher."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from kdcache_cli import options
from kdcache_cli.app import common
from kdcache_cli.output import console, emit, percent, progress, say, table
from kdcache_cli.stores import page


class Bar:
    """A bar over the rows of a dump."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.task = bars.add_task("dump", total=None, note="")

    def start(self, done: int, total: int) -> None:
        """Begin where the store already is."""
        self.bars.update(self.task, completed=done, total=total)

    def batch(self, rows: int, top1: float | None) -> None:
        """Advance, with the teacher's running accuracy on the views."""
        note = "" if top1 is None else f"teacher top-1 {percent(top1)}"
        self.bars.update(self.task, advance=rows, note=note)


@click.command("dump-teacher")
@options.dataset
@click.option("--split", default="train", show_default=True, help="train, test or unlabeled.")
@click.option("--teacher", required=True, help="A run of train-teacher, or a model's name.")
@click.option(
    "--weights", type=click.Path(path_type=Path), help="Weights, when --teacher is a name."
)
@click.option("--views", type=click.IntRange(1), required=True, help="Views of every sample.")
@click.option("--augment", default="pad-crop-flip", show_default=True)
@click.option("--encoding", default="float16", show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The store.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the views.")
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True)
@click.option("--precision", default="float32", show_default=True, help="float32, bf16 or fp16.")
@options.device
@common
def dump_teacher(
    dataset: str,
    data_root: Path | None,
    download: bool,
    split: str,
    teacher: str,
    weights: Path | None,
    views: int,
    augment: str,
    encoding: str,
    out: Path,
    seed: int,
    batch_size: int,
    precision: str,
    device: str,
    workers: int,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a teacher once and store its logits for every view.

    Run it again on an unfinished store and it completes what is missing; with more --views it adds them.
    """
    import torch

    from kdcache.datasets import load_dataset
    from kdcache.dumping import dump
    from kdcache.teachers import load_teacher
    from kdcache.views import ViewPlan, make_augmentation
    from kdcache_stores import open_store

    if threads:
        torch.set_num_threads(threads)
    where = options.resolve_device(device)
    data = load_dataset(dataset, split, data_root, download)
    plan = ViewPlan(data, make_augmentation(augment, data), seed)
    channels, side = (data.image_shape[0], data.image_shape[-1]) if data.image_shape else (3, 224)
    model = load_teacher(
        teacher,
        weights,
        classes=data.classes,
        channels=channels,
        size=side,
        precision=precision,
        device=where,
    )
    with progress(quiet or as_json, "rows") as bars:
        done = dump(
            plan,
            [(model, out)],
            views,
            encoding=encoding,
            batch_size=batch_size,
            device=where,
            workers=workers,
            command=command_line(),
            watch=Bar(bars),
        )
    with open_store(out) as store:
        info: dict[str, Any] = store.info()
    emit({"store": str(out), "rows": done.rows, "skipped": done.skipped,
          "seconds": done.seconds} | {"info": info}, as_json)  # fmt: skip
    if not (quiet or as_json):
        speed = f"{done.rows / done.seconds:,.0f} rows/s" if done.rows else "nothing was left to do"
        rows = [
            ("rows written", f"{done.rows:,} ({speed})"),
            ("rows found finished", f"{done.skipped:,}"),
            *page(info),
        ]
        console.print(table(f"store {out}", ("", ""), rows))
        say("next: " + student_command(out, dataset, data_root))


def command_line() -> str:
    """The command as given, for the provenance; options that hold paths are left out."""
    ctx = click.get_current_context()
    words = ["kdcache", ctx.info_name or ""]
    for param in ctx.command.params:
        value = ctx.params.get(param.name or "")
        if isinstance(value, Path) or param.name == "teacher" or value in (None, False, ()):
            continue
        flag = max(param.opts, key=len)
        words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


def student_command(store: Path, dataset: str, root: Path | None) -> str:
    """The command that trains a student from the store."""
    words = ["kdcache", "train-student", "--store", str(store), "--dataset", dataset]
    if root:
        words += ["--data-root", str(root)]
    return shlex.join([*words, "--student", "resnet8", "--method", "kd", "--out", "student"])
