"""report: one page about runs and stores."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache_cli import groups, options
from kdcache_cli.app import common
from kdcache_cli.output import emit, say, show_line


@groups.command(
    "report",
    "kdcache report runs --out page",
    "kdcache report runs/kd runs/ce --store t.zarr --out page",
)
@click.argument("runs", nargs=-1, type=options.LOCAL_PATH)
@groups.DATA.option(
    "--store",
    "stores",
    type=options.STORE,
    multiple=True,
    help="Store to describe; may be given again.",
)
@groups.OUTPUT.option(
    "--out", required=True, type=options.LOCAL_PATH, help="Folder for page and figures."
)
@groups.TEACHER.option(
    "--teacher",
    type=options.NETWORK,
    help="The teacher, if its run is neither among RUNS nor beside them or their store; see dump-teacher.",
)
@groups.OUTPUT.option(
    "--toy-case", "toy", is_flag=True, help="With the toy case of logit standardization."
)
@options.dataset_name("[default: that of the runs, or of the store]")
@options.data_root
@options.device
@common
def report(
    runs: tuple[Path, ...],
    stores: tuple[str, ...],
    out: Path,
    teacher: str | None,
    dataset: str | None,
    data_root: Path | None,
    toy: bool,
    device: str,
    workers: int,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a page about RUNS (runs, or folders of runs) and stores: figures, table, samples."""
    from kdcache.report.building import report as write_report
    from kdcache_cli.dump_page import full_command

    done = write_report(
        runs, stores, out, teacher=teacher, dataset=dataset, data_root=data_root,
        device=options.resolve_device(device, threads), workers=workers, toy=toy, command=full_command(),
    )  # fmt: skip
    emit({"page": str(done.page), "files": [str(file) for file in done.files],
          "left_out": done.left_out}, as_json)  # fmt: skip
    for reason in done.left_out:
        say(f"left out: {reason}", quiet)
    show_line(f"{done.page} ({done.page.stat().st_size / 1e6:.1f} MB, with {len(done.files) - 1} files of "
        "figures beside it)", quiet)  # fmt: skip
