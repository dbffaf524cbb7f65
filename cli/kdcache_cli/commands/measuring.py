"""bench: the claims, measured."""

from __future__ import annotations

import json
from pathlib import Path

from kdcache_cli import groups, options
from kdcache_cli.app import common
from kdcache_cli.output import emit, percent, say, show_line, show_table, size


@groups.command(
    "bench",
    "kdcache bench --quick",
    "kdcache bench --only epochs --out bench.json",
)
@groups.OUTPUT.option("--quick", is_flag=True, help="A small set in about a minute; noisy.")
@groups.OUTPUT.option(
    "--gpu", is_flag=True, help="resnet32x4 and resnet8x4 on CIFAR-100 shapes, on a GPU."
)
@groups.DATA.option(
    "--store",
    type=options.STORE,
    help="Measure the encodings on this store's logits [default: synthetic].",
)
@groups.OUTPUT.option(
    "--only",
    multiple=True,
    help="Sections: epochs, saving, graph, students, dump, photos, reading, views, encodings, memory "
    "[default: all but saving, and graph on a GPU alone].",
)
@groups.DATA.option(
    "--photos",
    type=options.LOCAL_PATH,
    help="Folder of photographs by class, in train/ and val/, for the section photos [default: generated].",
)
@groups.OUTPUT.option("--out", type=options.LOCAL_PATH, help="Write the results there, as JSON.")
@options.threads
@common
def bench(
    quick: bool,
    gpu: bool,
    store: str | None,
    only: tuple[str, ...],
    photos: Path | None,
    out: Path | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure the claims of the README on this machine, as ratios within one run."""
    from kdcache.bench.claims import CPU, GPU, QUICK
    from kdcache.bench.claims import bench as measure
    from kdcache_stores.errors import naming

    device = options.resolve_device("cuda" if gpu else "cpu", threads)
    scale = QUICK if quick else GPU if gpu else CPU
    results = measure(
        scale, device, store, only, lambda section: say(f"measuring {section} ...", quiet), photos
    )
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with naming(out):
            out.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    emit(results, as_json)
    if quiet:
        return
    where, versions = results["machine"], results["versions"]
    show_line(f"{where['gpu'] or where['processor']}, {where['cores']} cores, torch {versions['torch']}, "
        f"kdcache {versions['kdcache']}; load before {where['load_before'] or 0:.1f}")  # fmt: skip
    claims = [
        (claim["what"], f"{claim['median']:.2f}", f"{claim['p25']:.2f} to {claim['p75']:.2f}",
         str(claim["rounds"]))
        for claim in results["claims"]
    ]  # fmt: skip
    if claims:
        show_table("ratios, side by side", ("", "median", "quartiles", "rounds"), claims)
    for claim in results["claims"]:
        show_line(f"{claim['what']}: {claim['about']}")
    encodings = [
        (row["encoding"], f"{row['bytes_per_row']:.1f}", f"{row['kl_t1_mean']:.1e}",
         f"{row['kl_t4_mean']:.1e}", f"{row['kl_z_mean']:.1e}", percent(row["top1_agreement"]),
         f"{row['rows_per_second'] / 1e6:.2f}")
        for row in results["encodings"]["table"]
    ]  # fmt: skip
    columns = ("", "bytes a row", "KL T=1", "KL T=4", "KL Z, tau=2", "same top-1", "M rows/s")
    if encodings:
        title = f"encodings, on {results['encodings']['logits']} logits"
        show_table(title, columns, encodings)
    memory = [
        (f"{row['factor']}x", size(row["store_bytes"]), size(row["write_bytes"]),
         size(row["read_bytes"]))
        for row in results["memory"]
    ]  # fmt: skip
    if memory:
        title = "peak memory beyond the process, as a store grows"
        show_table(title, ("", "store", "to write", "to stream"), memory)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results["seconds"].items())
    show_line(f"measured in {spent}")
