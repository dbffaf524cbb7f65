"""What dump-teacher prints before, when stopped, and at the end."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdcache_cli.commands.inspecting import encoding_text, page
from kdcache_cli.output import emit, percent, say, show_facts, show_line, size
from kdcache_stores.types import LOGITS

if TYPE_CHECKING:
    from kdcache.dumping.dump import Dumped
    from kdcache.dumping.estimate import Estimate
    from kdcache.dumping.job import PreparedDump
    from kdcache.dumping.opening import Target

# Parameters that do not decide what a store holds: they are not recorded in it.
UNRECORDED = {"part", "dry_run", "as_json", "quiet", "debug", "verbose", "workers", "threads", "device",
              "repair", "allow_code", "download", "epochs", "students", "teachers", "weights"}  # fmt: skip


def before(targets: Sequence[Target], cost: Estimate, given: dict[str, Any], quiet: bool) -> None:
    """The estimate, for people."""
    for target in targets:
        if target.clean_top1:
            say(f"{target.teacher.architecture}: top-1 {', '.join(_clean(target))}", quiet)
    if cost.stored:
        say(f"{cost.stored:,} rows are stored already and are not forwarded again", quiet)
    if not cost.rows:
        return
    saved = cost.online_forwards - cost.forwards
    gain = f"{saved:,} fewer" if saved >= 0 else f"{-saved:,} more"
    several = len(cost.field_bytes) > 1
    encodings = ", ".join(
        f"{field} as {encoding}" + (f" ({cost.field_bytes[field]:,.0f} bytes)" if several else "")
        for field, encoding in cost.encodings.items()
    )
    say(
        f"estimate: {cost.rows:,} rows, {encodings}, {size(cost.nbytes)} "
        f"({cost.bytes_per_row:.1f} bytes a row), about {duration(cost.seconds)} at "
        f"{cost.rows_per_second:,.0f} rows/s; "
        f"{size(cost.free_bytes)} free",
        quiet,
    )
    say(
        f"teacher forwards: {cost.forwards:,} once, {gain} than {given['students']} student(s) of "
        f"{given['epochs']} epochs with the teacher in the loop; paid back after "
        f"{cost.break_even_epochs:g} student epoch(s)",
        quiet,
    )


def interrupted() -> str:
    """How to go on after Ctrl-C."""
    return "every finished shard is stored; to go on: " + full_command()


def after(
    prepared: PreparedDump,
    done: Dumped,
    given: dict[str, Any],
    as_json: bool,
    quiet: bool,
) -> None:
    """Four lines per store, or with --verbose its whole page, and the student's command."""
    from kdcache_stores import describe, open_store

    stores: list[dict[str, Any]] = []
    for target in prepared.targets:
        entry: dict[str, Any] = {"store": str(target.path), "clean_top1": target.clean_top1,
                                 "clean_images": target.clean_images}  # fmt: skip
        if done.sealed:
            with open_store(target.path) as store:
                entry["info"] = describe(store)
        stores.append(entry)
    emit({"rows": done.rows, "skipped": done.skipped, "seconds": done.seconds,
          "sealed": done.sealed, "stores": stores,
          "estimate": prepared.estimate.to_dict()}, as_json)  # fmt: skip
    if quiet:
        return
    speed = f"{done.rows / done.seconds:,.0f} rows/s" if done.rows else "nothing was left to do"
    written = ("rows written", f"{done.rows:,} ({speed}, {duration(done.seconds)})")
    skipped = ("rows found finished", f"{done.skipped:,}")
    if not done.sealed:
        index, parts = given["part"]
        show_line(f"part {index}/{parts} is done: {written[1]}, {skipped[1]} found finished")
        for target in prepared.targets:
            show_line(f"when all {parts} parts are: kdcache seal {shlex.quote(str(target.path))}")
        return
    for entry, target in zip(stores, prepared.targets, strict=True):
        if given["verbose"]:
            rows = [written, skipped, *page(entry["info"])]
            show_facts(f"store {entry['store']}", rows)
        else:
            for line in _summary(entry, speed, done.skipped, target):
                show_line(line)
    if "logits" in given["fields"] and prepared.plan.dataset.split == "train":
        show_line("next: " + student_command(given))


def _summary(entry: dict[str, Any], speed: str, skipped: int, target: Target) -> list[str]:
    """Rows, size, accuracy and fidelity of a store."""
    info = entry["info"]
    rows = info["views"] * info["samples"]
    before = f", {skipped:,} rows found finished" if skipped else ""
    kept = [
        f"{name} as {encoding_text(item['encoding'])}, {item['bytes_per_row']:.1f} bytes a row"
        for name, item in info["fields"].items()
    ]
    lines = [
        f"{entry['store']}: {rows:,} rows, {info['views']} views of {info['samples']:,} samples; "
        f"{speed}{before}",
        f"size: {size(info['nbytes'])}; {'; '.join(kept)}",
    ]
    logits = info["fields"].get(LOGITS)
    if logits is None:
        return lines
    of = _clean(target)
    if logits["top1"] is not None:
        of.append(f"{percent(logits['top1'])} of the views")
    lines.append(
        f"teacher {info['teacher']['architecture']}, top-1: {', '.join(of) or 'no labels'}"
    )
    if measured := logits["fidelity"]:
        lines.append(
            f"stored logits against live ones: KL {measured['kl_t1_mean']:.1e} nats at T=1, the same top-1 in "
            f"{percent(measured['top1_agreement'])} of the rows measured"
        )
    return lines


def _clean(target: Target) -> list[str]:
    """Its top-1 on clean images, of so many of each split, with two standard errors."""
    words = []
    for name, top1 in (target.clean_top1 or {}).items():
        n = (target.clean_images or {})[name]
        p = (top1 * n + 2) / (n + 4)  # Agresti and Coull 1998: no error of 0 at 0 and 1
        words.append(
            f"{top1:.1%} ± {2 * sqrt(p * (1 - p) / (n + 4)):.1%} on {n} clean {name} images"
        )
    return words


def duration(seconds: float) -> str:
    """90 -> "1 min 30 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def command_line() -> str:
    """What decides the store's content, for its provenance; paths are left out."""
    ctx = click.get_current_context()
    given = {
        name: without_path(value) if name == "dataset" else value
        for name, value in ctx.params.items()
        if name not in UNRECORDED
    }
    return shlex.join(["kdcache", ctx.info_name or "", *_words(given, paths=False)])


def without_path(dataset: str) -> str:
    """ "arrays:/a/b.npz" -> "arrays:b.npz"."""
    kind, colon, rest = dataset.partition(":")
    return kind + colon + Path(rest).name if colon else dataset


def full_command() -> str:
    """The command as given, paths included: for the screen alone."""
    ctx = click.get_current_context()
    return shlex.join(["kdcache", ctx.info_name or "", *_words(dict(ctx.params), paths=True)])


def _words(given: dict[str, Any], paths: bool) -> list[str]:
    words = []
    for param in click.get_current_context().command.params:
        value = given.get(param.name or "")
        if param.name == "part" and value is not None:
            value = None if value == (0, 1) else f"{value[0]}/{value[1]}"
        if param.name == "encoding" and value is not None:
            value = tuple(name if f == "logits" else f"{f}={name}" for f, name in value.items())
        if param.name == "fields" and value is not None:
            value = None if value == ("logits",) else ",".join(value)
        values = value if isinstance(value, tuple) else (value,)
        flag = max(param.opts, key=len)
        for value in values:
            if value is None or value is False or (isinstance(value, Path) and not paths):
                continue
            words += [flag] if value is True else [flag, str(value)]
    return words


def student_command(given: dict[str, Any]) -> str:
    """The command that trains a student from the stores."""
    from kdcache.augment.custom import is_import_path

    words = ["kdcache", "train-student"]
    for path in given["outs"]:
        words += ["--store", str(path)]
    words += ["--dataset", given["dataset"]]
    if given["data_root"]:
        words += ["--data-root", str(given["data_root"])]
    if given["skip_bad"]:
        words += ["--skip-bad"]
    if given["augment"] and is_import_path(given["augment"]):
        words += ["--augment", given["augment"]]
    return shlex.join([*words, "--student", "resnet8", "--method", "kd", "--out", "student"])
