"""demo: the whole path on embedded data."""

from __future__ import annotations

from pathlib import Path

from kdcache_cli import groups, options
from kdcache_cli.app import common
from kdcache_cli.commands.dumping import Bar
from kdcache_cli.commands.training import Bars
from kdcache_cli.output import LogLines, emit, percent, progress, say, show_line, show_table


@groups.command(
    "demo",
    "kdcache demo",
    "kdcache demo --out elsewhere",
)
@groups.OUTPUT.option(
    "--out",
    type=options.LOCAL_PATH,
    default=Path("kdcache-demo"),
    show_default=True,
    help="Folder for the store and the runs; what is finished there is not done again.",
)
@common
def demo(out: Path, as_json: bool, quiet: bool) -> None:
    """Teacher, store and students on embedded data, compared in one table."""
    from kdcache.demo import DATASET, SAMPLES, SEEDS, STUDENT, TEACHER, results, steps, verdict

    say(
        f"{DATASET}: a {TEACHER} is the teacher of a {STUDENT} that sees {SAMPLES} labelled samples; "
        f"{len(SEEDS)} seeds, each with its own samples",
        quiet,
    )
    log = LogLines(quiet)
    for step in steps(out):
        with progress(quiet, "") as bars:
            step.run(Bar(bars, log) if step.title == "store" else Bars(bars, log, step.title))
        say(f"$ {step.brief or step.command}", quiet)
    outcome = results(out)
    emit(outcome, as_json)
    if quiet:
        return
    columns = ("method", "test accuracy", "vs ce", "95% interval", "teacher forwards")
    rows = [
        (
            row["method"],
            f"{percent(row['top1_mean'])} +- {percent(row['top1_std'])}",
            *_gap(row["minus_ce"]),
            f"{row['teacher_forwards']}",
        )
        for row in outcome["rows"]
    ]
    show_table(f"{STUDENT} on {SAMPLES} {DATASET}, {len(SEEDS)} seeds", columns, rows)
    for row in outcome["rows"]:
        if row["minus_ce"]:
            show_line(verdict(row))
    show_line(f"store: {outcome['store']}")
    show_line(f"runs:  {out}/*  (the commands above repeat each step by hand)")
    show_line(
        f"curves and more: kdcache report {out} --store {outcome['store']} --out {out}-report"
    )


def _gap(gap: dict[str, float] | None) -> tuple[str, str]:
    if gap is None:
        return "", ""
    mean, low, high = (f"{100 * gap[name]:+.2f}" for name in ("mean", "low", "high"))
    return mean, f"{low} to {high}"
