"""report: one page about runs and stores."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache_cli import options
from kdcache_cli.app import common
from kdcache_cli.output import emit, say


@click.command("report")
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option("--store", "stores", multiple=True, help="Store to describe; may be given again.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for page and figures."
)
@click.option("--teacher", help="The teacher, if its run is not among RUNS; see dump-teacher.")
@click.option("--dataset", help="[default: that of the runs, or of the store]")
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Folder of the datasets [default: that of the runs].",
)
@options.device
@common
def report(
    runs: tuple[Path, ...],
    stores: tuple[str, ...],
    out: Path,
    teacher: str | None,
    dataset: str | None,
    data_root: Path | None,
    device: str,
    workers: int,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a page about RUNS (runs, or folders of runs) and stores: figures, table, samples."""
    import torch

    from kdcache.report.building import report as write_report

    if threads:
        torch.set_num_threads(threads)
    done = write_report(
        runs, stores, out, teacher=teacher, dataset=dataset, data_root=data_root,
        device=options.resolve_device(device), workers=workers,
    )  # fmt: skip
    emit({"page": str(done.page), "files": [str(file) for file in done.files],
          "left_out": done.left_out}, as_json)  # fmt: skip
    silent = quiet or as_json
    for reason in done.left_out:
        say(f"left out: {reason}", silent)
    say(f"{done.page} ({done.page.stat().st_size / 1e6:.1f} MB, with {len(done.files) - 1} files of "
        "figures beside it)", silent)  # fmt: skip
