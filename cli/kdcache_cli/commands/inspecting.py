"""inspect and verify: a store described and checked, without torch."""

from __future__ import annotations

from typing import Any

import click

from kdcache.break_even import break_even
from kdcache_cli import groups, options
from kdcache_cli.app import common
from kdcache_cli.output import emit, percent, progress, show_facts, show_line, size
from kdcache_stores.types import LOGITS


@groups.command(
    "inspect",
    "kdcache inspect t.zarr",
    "kdcache inspect s3://bucket/t.zarr --json",
)
@click.argument("store", type=options.STORE)
@common
def inspect(store: str, as_json: bool, quiet: bool) -> None:
    """Describe a STORE: its plan, teacher, size and fidelity."""
    from kdcache_stores import describe, open_store

    with open_store(store) as opened:
        info = describe(opened)
    emit(info, as_json)
    if not quiet:
        show_facts(f"store {store}", page(info))


def page(info: dict[str, Any]) -> list[tuple[str, str]]:
    """What `describe` says of a store, for people."""
    plan, teacher, fields = info["plan"], info["teacher"], info["fields"]
    settings = dict(plan["augmentation"])
    name = settings.pop("name", "")
    details = ", ".join(f"{key}={value}" for key, value in settings.items())
    count = info["views"] * info["samples"]
    rows = [
        ("dataset", f"{plan['dataset']} {plan['split']}: {info['samples']:,} samples, "
                    f"{plan['classes']} classes"),
        ("views", f"{info['views']} of {name}" + (f" ({details})" if details else "")
                  + f", seed {plan['seed']}"),
        ("teacher", f"{teacher['architecture']}, {teacher['precision']}, weights "
                    f"{teacher['weights_sha256'][:12]}"),
        ("size", size(info["nbytes"])),
    ]  # fmt: skip
    if item := plan.get("item"):
        rows.insert(
            1, ("items", f"{item['dtype']} {' x '.join(map(str, item['shape']))}, no images")
        )
    for name, item in fields.items():
        lead = "" if list(fields) == [LOGITS] else f"{name}: "
        rows += [(lead + label, text) for label, text in _field_rows(name, item, count)]
    if info["head"]:
        rows.append(("last linear layer", "{} x {}".format(*info["head"])))
    account = break_even(info)
    return [
        *rows,
        ("forwards", f"{account.spent:,} of the teacher spent once; {account.saved_per_epoch:,} saved "
                     "per student and epoch"),
        ("break-even", account.sentence()),
        (
            "made by",
            ", ".join(f"{k} {v}" for k, v in info["provenance"].get("versions", {}).items()),
        ),
        ("plan digest", plan["digest"]),
        ("teacher digest", teacher["digest"]),
        ("content digest", info["digest"]),
    ]  # fmt: skip


def _field_rows(name: str, item: dict[str, Any], count: int) -> list[tuple[str, str]]:
    shape = " x ".join(map(str, item["shape"]))
    rows = [
        ("encoding", encoding_text(item["encoding"])),
        ("a row", f"{shape} values in {item['bytes_per_row']:.1f} bytes"),
    ]
    if len(item["arrays"]) > 1:
        each = (f"{array} {nbytes / count:.1f}" for array, nbytes in item["arrays"].items())
        rows.append(("of which, bytes a row", ", ".join(each)))
    if fitted := item["fitted"]:
        rows.append(("fitted", ", ".join(f"{key} {value:.4g}" for key, value in fitted.items())))
    if item["error"] is not None:
        rows.append(("relative squared error", f"{item['error']:.1e}"))
    if item["head_kl"] is not None:
        rows.append(("KL of its logits by the head", f"{item['head_kl']:.1e} nats at T=1"))
    if name == LOGITS:
        top1 = "no labels" if item["top1"] is None else percent(item["top1"])
        rows.append(("teacher top-1 on the views", top1))
    if measured := item["fidelity"]:
        rows += [
            (
                f"KL(live || stored), {title}",
                f"{measured[key + '_mean']:.1e}, worst {measured[key + '_worst']:.1e}",
            )
            for key, title in (("kl_t1", "T=1"), ("kl_t4", "T=4"), ("kl_z", "Z-scored, tau=2"))
        ]
        if "kl" in item["encoding"]:
            rows.append(("asked for, Z-scored, tau=2", f"{item['encoding']['kl']:.1e}"))
        rows.append(("same top-1, live and stored", percent(measured["top1_agreement"])))
    return rows


def encoding_text(encoding: dict[str, Any]) -> str:
    """{"name": "topk", "k": 10} -> "topk (k=10)"."""
    settings = ", ".join(f"{key}={value}" for key, value in encoding.items() if key != "name")
    return f"{encoding['name']} ({settings})" if settings else str(encoding["name"])


@groups.command(
    "verify",
    "kdcache verify t.zarr",
    "kdcache verify t.zarr --teacher runs/teacher --dataset cifar100",
)
@click.argument("store", type=options.STORE)
@groups.TEACHER.option(
    "--expect", metavar="DIGEST", help="Content digest that the store must have."
)
@groups.TEACHER.option(
    "--teacher", type=options.NETWORK, help="Also run this teacher on a sample of rows and compare."
)
@groups.TEACHER.option(
    "--rows", type=click.IntRange(1), default=256, show_default=True, help="With --teacher."
)
@options.dataset_name("With --teacher: where the images are.")
@options.data_root
@groups.VIEWS.option(
    "--augment",
    type=options.AUGMENTATION,
    help="With --teacher: needed where the augmentation is your own.",
)
@options.device_alone
@common
def verify(
    store: str,
    expect: str | None,
    teacher: str | None,
    rows: int,
    augment: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> int:
    """Check every byte of a STORE against its manifest; exit 1 if it is damaged."""
    from kdcache_stores import open_store, verify

    if teacher and not given["dataset"]:
        raise click.UsageError("--teacher needs --dataset, to make the teacher's views again.")
    # What is verified is what lies there, so nothing comes from the cache.
    with (
        open_store(store, expect=expect, cache_size=0) as opened,
        progress(quiet, "bytes") as bars,
    ):
        task = bars.add_task("verify", total=None, note="")
        report = verify(
            opened, progress=lambda done, total: bars.update(task, completed=done, total=total)
        )
    results = report.to_dict()
    if teacher and report.ok:
        from kdcache.dumping.recheck import recheck_store

        source, where = options.source(given), options.resolve_device(device)
        recheck = recheck_store(store, teacher, source, augment, rows, where)
        results["teacher"] = recheck.to_dict()
    emit(results, as_json)
    for note in report.notes:
        show_line(f"note: {note}", quiet)
    if report.ok:
        show_line(f"{store} is whole: {report.objects} objects, {size(report.nbytes)}, each as it was "
            "written", quiet)  # fmt: skip
        show_line(f"content digest {report.digest}", quiet)
        return say_recomputed(results["teacher"], quiet, as_json) if teacher else 0
    for problem in report.problems:
        show_line(f"damaged: {problem.message}", as_json)
    if report.rewrite:
        shards = ", ".join(f"view {view} rows {a}-{b - 1}" for view, a, b in report.rewrite)
        show_line(f"the dump's command, run again with --repair, rewrites: {shards}; a copy is mended by "
            "pulling it again", as_json)  # fmt: skip
    return 1


def say_recomputed(recheck: dict[str, Any], quiet: bool, as_json: bool) -> int:
    """The outcome for people, and the exit code."""
    for problem in recheck["problems"]:
        show_line(f"not this teacher's outputs: {problem}", as_json)
    if recheck["ok"]:
        names = {"logits": ("kl_t1_mean", "KL")}
        texts = []
        for field, measured in recheck["measured"].items():
            key, words = names.get(field, ("error", "squared error"))
            texts.append(
                f"{field}: {words} {measured[key]:.2g} on average, the dump measured "
                f"{recheck['recorded'][field][key]:.2g}"
                + (
                    f"; logits of it through the head differ by a KL of {measured['head_kl']:.2g} at T=1"
                    if "head_kl" in measured
                    else ""
                )
            )
        show_line(f"{recheck['rows']} rows, computed again, are as stored. {'; '.join(texts)}",
            quiet)  # fmt: skip
    return 0 if recheck["ok"] else 1
