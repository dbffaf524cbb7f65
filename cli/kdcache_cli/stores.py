"""inspect and verify: a store described and checked, without torch."""

from __future__ import annotations

from typing import Any

import click

from kdcache_cli.app import common
from kdcache_cli.output import console, emit, percent, progress, say, size, table


@click.command("inspect")
@click.argument("store")
@common
def inspect(store: str, as_json: bool, quiet: bool) -> None:
    """Describe a STORE: its plan, teacher, size and fidelity."""
    from kdcache_stores import open_store

    with open_store(store) as opened:
        info = opened.info()
    emit(info, as_json)
    if not (quiet or as_json):
        console.print(table(f"store {store}", ("", ""), page(info)))


def page(info: dict[str, Any]) -> list[tuple[str, str]]:
    """What `LogitStore.info` says, for people."""
    plan, teacher, logits = info["plan"], info["teacher"], info["fields"]["logits"]
    options = dict(plan["augmentation"])
    name = options.pop("name", "")
    details = ", ".join(f"{key}={value}" for key, value in options.items())
    rows = [
        ("dataset", f"{plan['dataset']} {plan['split']}: {info['samples']:,} samples, "
                    f"{plan['classes']} classes"),
        ("views", f"{info['views']} of {name}" + (f" ({details})" if details else "")
                  + f", seed {plan['seed']}"),
        ("teacher", f"{teacher['architecture']}, {teacher['precision']}, weights "
                    f"{teacher['weights_sha256'][:12]}"),
        ("teacher top-1 on the views",
         "no labels" if logits["top1"] is None else percent(logits["top1"])),
        ("encoding", encoding_text(logits["encoding"])),
        ("size", f"{size(info['nbytes'])}, {logits['bytes_per_row']:.1f} bytes a row"),
    ]  # fmt: skip
    if logits["fidelity"]:
        measured = ", ".join(f"{key} {value:.2g}" for key, value in logits["fidelity"].items())
        rows.append(("fidelity of the encoding", measured))
    return [
        *rows,
        ("forwards", f"{info['views'] * info['samples']:,} teacher forwards spent once"),
        (
            "made by",
            ", ".join(f"{k} {v}" for k, v in info["provenance"].get("versions", {}).items()),
        ),
        ("plan digest", plan["digest"]),
        ("teacher digest", teacher["digest"]),
        ("content digest", info["digest"]),
    ]


def encoding_text(encoding: dict[str, Any]) -> str:
    """{"name": "topk", "k": 10} -> "topk (k=10)"."""
    options = ", ".join(f"{key}={value}" for key, value in encoding.items() if key != "name")
    return f"{encoding['name']} ({options})" if options else str(encoding["name"])


@click.command("verify")
@click.argument("store")
@click.option("--expect", metavar="DIGEST", help="Content digest that the store must have.")
@common
def verify(store: str, expect: str | None, as_json: bool, quiet: bool) -> int:
    """Check every byte of a STORE against its manifest; exit 1 if it is damaged."""
    from kdcache_stores import open_store

    # What is verified is what lies there, so nothing comes from the cache.
    with (
        open_store(store, expect=expect, cache_size=0) as opened,
        progress(quiet or as_json, "bytes") as bars,
    ):
        task = bars.add_task("verify", total=None, note="")
        report = opened.verify(
            progress=lambda done, total: bars.update(task, completed=done, total=total)
        )
    emit(report.to_dict(), as_json)
    for note in report.notes:
        say(f"note: {note}", quiet or as_json)
    if report.ok:
        say(f"{store} is whole: {report.objects} objects, {size(report.nbytes)}, each as it was "
            f"written\ncontent digest {report.digest}", quiet or as_json)  # fmt: skip
        return 0
    for problem in report.problems:
        say(f"damaged: {problem.message}", as_json)
    if report.rewrite:
        shards = ", ".join(f"view {view} rows {a}-{b - 1}" for view, a, b in report.rewrite)
        say(f"the dump's command, run again, rewrites: {shards}", as_json)
    return 1
