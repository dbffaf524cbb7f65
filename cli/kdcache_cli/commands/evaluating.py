"""evaluate, compare, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kdcache_cli import groups, options
from kdcache_cli.app import common
from kdcache_cli.output import emit, percent, say, show_facts, show_line, show_table, size


@groups.command(
    "evaluate",
    "kdcache evaluate runs/kd --dataset cifar100",
    "kdcache evaluate runs/kd --dataset cifar100 --store t.zarr",
)
@click.argument("model", type=options.NETWORK)
@options.dataset
@groups.DATA.option("--split", default="test", show_default=True)
@groups.NETWORK.option(
    "--weights", type=options.LOCAL_PATH, help="Weights, when MODEL is a model's name."
)
@groups.TEACHER.option(
    "--teacher", type=options.NETWORK, help="A run, or NAME@FILE: its accuracy and cost beside."
)
@groups.DATA.option(
    "--store",
    type=options.STORE,
    help="Logits of the teacher on this split: how far MODEL agrees. Who filled it takes its "
    "preprocessing and class map from it, of whatever split.",
)
@options.foreign
@options.augmentation_of_store
@groups.MACHINE.option(
    "--batch-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Images per timed forward pass.",
)
@options.allow_code
@options.device
@common
def evaluate(
    model: str, device: str, threads: int | None, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Accuracy, calibration and cost of MODEL: a run, or a model's name with --weights.

    With --store (of the same split) also how closely its logits agree with the teacher's.
    """
    from kdcache.evaluation.measured import evaluate

    where = options.resolve_device(device, threads)
    given["asked"] = _asked(model, given)
    results = evaluate(
        model, options.source(given), note=lambda text: say(text, quiet), device=where, **given
    )
    emit(results, as_json)
    if quiet:
        return
    columns = [results, *([results["teacher"]] if "teacher" in results else [])]
    rows = [(name, *(text_of(column) for column in columns)) for name, text_of in _LINES.items()]
    titles = ("", *(column["architecture"] for column in columns))
    show_table("{dataset} {split}, {samples:,} samples".format(**results), titles, rows)
    show_line(f"temperature fitted on: {results['temperature_fitted_on']}")
    if agreement := results.get("agreement"):
        lines = [
            ("same top-1", percent(agreement["top1_agreement"])),
            ("KL(teacher | student), nats", f"{agreement['kl']:.4f}"),
            ("the same of Z-scores at tau=2", f"{agreement['kl_standardized']:.4f}"),
            ("rank correlation over classes", f"{agreement['rank_correlation']:.4f}"),
            ("std of logits, student / teacher", f"{agreement['std_ratio']:.4f}"),
        ]
        of = f"{agreement['views']} views of {agreement['samples']:,} samples"
        title = f"agreement with {given['store']} ({of})"
        show_facts(title, lines)


def _asked(model: str, given: dict[str, Any]) -> list[Any]:
    """What --normalize, --mean, --std and --size ask for MODEL and --teacher, in order; runs are left out."""
    from kdcache.evaluation.measured import AskedPreprocessing
    from kdcache.runs import is_run

    specs = [model] + [given["teacher"]] * (given["teacher"] is not None)
    foreign = [not is_run(spec.partition("@")[0]) for spec in specs]
    means, stds, names, sizes = (given[key] for key in ("means", "stds", "normalizations", "sizes"))
    if not any(foreign) and (means or stds or names or sizes):
        raise click.UsageError("a run states its own preprocessing: leave out --normalize, --mean, "
                               "--std and --size.")  # fmt: skip
    chosen = options.preprocessings(given, sum(foreign))
    sides = options.each("--size", given.pop("sizes"), sum(foreign))
    wishes = iter([AskedPreprocessing(*pair) for pair in zip(chosen, sides, strict=True)])
    return [next(wishes) if other else AskedPreprocessing() for other in foreign]


_LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "top-1": lambda f: percent(f["top1"]),
    "top-5": lambda f: percent(f["top5"]),
    "negative log-likelihood (nats)": lambda f: f"{f['nll']:.4f}",
    "expected calibration error": lambda f: percent(f["ece"]),
    "fitted temperature": lambda f: f"{f['temperature']:.3f}",
    "NLL at it": lambda f: f"{f['calibrated_nll']:.4f}",
    "ECE at it": lambda f: percent(f["calibrated_ece"]),
    "parameters": lambda f: f"{f['parameters']:,}",
    "multiply-adds per sample": lambda f: f"{f['macs']:,}",
    "file of weights": lambda f: size(f["file_bytes"]) if f["file_bytes"] else "-",
    "latency p50, ms": lambda f: f"{f['latency_p50_ms']:.2f}",
    "latency p95, ms": lambda f: f"{f['latency_p95_ms']:.2f}",
}


@groups.command(
    "compare",
    "kdcache compare runs/kd runs/kd/int8.onnx --dataset cifar100 --teacher runs/teacher --threads 1",
    "kdcache compare student.onnx student.pt2 --dataset cifar100 --store teacher-test.zarr",
)
@click.argument("networks", nargs=-1, required=True, type=options.NETWORK)
@options.dataset
@groups.DATA.option("--split", default="test", show_default=True)
@groups.TEACHER.option(
    "--teacher",
    type=options.NETWORK,
    help="A run, or NAME@FILE: the first row, and whom the others are compared with.",
)
@groups.TEACHER.option(
    "--store",
    type=options.STORE,
    help="Logits of the teacher on this split, to compare with instead.",
)
@options.augmentation_of_store
@groups.MACHINE.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 64),
    show_default=True,
    help="Images per timed forward pass; may be given again.",
)
@groups.MACHINE.option(
    "--repeats",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Timed passes of each size; networks take turns.",
)
@groups.OUTPUT.option(
    "--out",
    type=options.LOCAL_PATH,
    help="Folder for a page with a picture of size, latency and accuracy.",
)
@options.workers
@options.threads
@options.allow_code
@common
def compare(
    networks: tuple[str, ...],
    threads: int | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Size, speed and accuracy of NETWORKS, runs and exported files, in one table, on the CPU.

    A run and a .pt2 or .safetensors file are run by torch, an .onnx file by ONNX Runtime.
    """
    from kdcache.evaluation.comparison import compare
    from kdcache.report.sections.comparison_section import write_comparison

    options.resolve_device("cpu", threads)
    results = compare(networks, options.source(given), **given)
    emit(results, as_json)
    page = None if out is None else write_comparison(results, out)[0]
    if quiet:
        return
    sizes = list(results["networks"][0]["latency"])
    agrees = "agreement" in results["networks"][0]
    columns = ["", "run by", "weights", "parameters", "multiply-adds", "file",
               *(f"ms p50 (p95) batch {count}" for count in sizes),
               "top-1", "top-5", "NLL at T", "ECE at T",
               *(["same top-1", "KL(teacher | it)"] if agrees else [])]  # fmt: skip
    show_table(
        "{dataset} {split}, {samples:,} samples; threads: {threads}".format(**results),
        columns,
        [_compared(row, sizes) for row in results["networks"]],
    )
    show_line("T is the temperature of each network that fits best, see kdcache evaluate")
    if page is not None:
        show_line(f"page: {page}")


def _compared(row: dict[str, Any], sizes: list[str]) -> list[str]:
    """A row of the table of `compare`."""
    times = (row["latency"][count] for count in sizes)
    agreement = row.get("agreement")
    return [
        row["network"] + (" (teacher)" if row["teacher"] else ""),
        row["runtime"],
        row["dtype"],
        f"{row['parameters']:,}",
        f"{row['macs']:,}",
        _LINES["file of weights"](row),
        *(f"{time['latency_p50_ms']:.2f} ({time['latency_p95_ms']:.2f})" for time in times),
        percent(row["top1"]),
        percent(row["top5"]),
        f"{row['calibrated_nll']:.4f}",
        percent(row["calibrated_ece"]),
        *(
            [percent(agreement["top1_agreement"]), f"{max(agreement['kl'], 0.0):.4f}"]
            if agreement
            else []
        ),
    ]


@groups.command(
    "export",
    "kdcache export runs/kd --format onnx --out student.onnx",
    "kdcache export runs/kd --format onnx --quantize int8 --store teacher-test.zarr",
)
@click.argument("run", type=options.LOCAL_PATH)
@groups.OUTPUT.option(
    "--format",
    "form",
    default="torch-export",
    show_default=True,
    help="torch-export, onnx or safetensors.",
)
@groups.OUTPUT.option(
    "--quantize",
    help="int8: weights and activations of eight bits, by ONNX Runtime; the file is compared with the float "
    "network on the test split of the run's dataset.",
)
@groups.DATA.option(
    "--calibration",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Training samples that the ranges of int8 are measured on.",
)
@options.data_root
@groups.TEACHER.option(
    "--store",
    type=options.STORE,
    help="With --quantize: logits of the teacher, whom both networks are compared with.",
)
@options.augmentation_of_store
@groups.OUTPUT.option(
    "--out",
    type=options.LOCAL_PATH,
    help="The file [default: RUN/exported, or RUN/int8, with its ending].",
)
@options.allow_code
@common
def export(
    run: Path,
    form: str,
    quantize: str | None,
    out: Path | None,
    allow_code: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Write the network of a RUN as a file: uint8 images (or other items) in, logits out.

    The file is run to check it.
    """
    from kdcache.deploying.deploy import FORMATS, USAGE
    from kdcache.deploying.deploy import export as write
    from kdcache.deploying.exported import SUFFIXES
    from kdcache.runs import load_run_model
    from kdcache_stores.errors import UnknownName

    if form not in FORMATS:
        raise UnknownName("format", form, FORMATS)
    if quantize not in (None, "int8"):
        raise UnknownName("quantization", quantize, ["int8"])
    model = load_run_model(run, allow_code)
    out = out or run / f"{quantize or 'exported'}{SUFFIXES[form]}"
    if quantize:
        from kdcache.deploying.int8 import export_int8

        own = options.source(
            {"dataset": model.config["data"]["name"], **_taken(given, "data_root")}
        )
        done = export_int8(model, out, own, **given)
    else:
        done = write(model, form, out)
    emit(done, as_json)
    if quiet:
        return
    if quantize:
        _show_int8(done, given["store"])
        return
    show_line(
        f"{done['file']}: {size(done['bytes'])}, {done['dtype']} {tuple(done['input'])} to logits; run "
        f"and compared with the network, largest difference {done['max_difference']:.1e}"
    )
    use = done["use"]
    show_line(f"input, as it was tested: {use['preparation']}", quiet)
    if names := use["classes"]:
        more = f", ... ({len(names)} in all)" if len(names) > 10 else ""
        show_line(f"classes, in the order of the logits: {', '.join(names[:10])}{more}", quiet)
    show_line(f"the file says so too, as {USAGE}", quiet)


def _taken(given: dict[str, Any], *names: str) -> dict[str, Any]:
    """Some of the options, which are taken out of them."""
    return {name: given.pop(name) for name in names}


def _show_int8(done: dict[str, Any], store: str | None) -> None:
    columns = [done["float"], done["int8"]]
    names = ("top-1", "top-5", "negative log-likelihood (nats)", "expected calibration error")
    rows: list[tuple[str, ...]] = [
        ("bytes", size(done["float_bytes"]), size(done["bytes"])),
        *((name, *(_LINES[name](column) for column in columns)) for name in names),
        ("same top-1 as float", "", percent(done["agreement"]["top1_agreement"])),
        ("KL(float | int8), nats", "", f"{done['agreement']['kl']:.5f}"),
    ]
    if store is not None:
        of = [column["teacher"] for column in columns]
        rows += [
            ("same top-1 as the teacher", *(percent(each["top1_agreement"]) for each in of)),
            ("KL(teacher | network), nats", *(f"{each['kl']:.4f}" for each in of)),
        ]
    title = "{file}: {split}, {samples:,} samples".format(**done)
    show_table(title, ("", "float", "int8"), rows)
    lost, won = done["disagreements"]["lost"], done["disagreements"]["won"]
    show_line(f"float alone is right on {lost} samples, int8 alone on {won}")
    for finding in done["findings"]:
        show_line("warning: {message} Remedy: {remedy} [{rule}]".format(**finding))
