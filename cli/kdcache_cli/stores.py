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
        console.print(table(f"store {store}", ("", ""), _page(info)))


def _page(info: dict[str, Any]) -> list[tuple[str, str]]:
    plan, teacher = info["plan"], info["teacher"]
    top1 = info["teacher_top1"]
    augmentation = ", ".join(f"{k}={v}" for k, v in plan["augmentation"].items() if k != "name")
    name = plan["augmentation"].get("name", "")
    return [
        ("dataset", f"{plan['dataset']} {plan['split']}: {info['samples']:,} samples, "
                    f"{info['classes']} classes"),
        ("views", f"{info['views']} of {name}" + (f" ({augmentation})" if augmentation else "")
                  + f", seed {plan['seed']}"),
        ("teacher", f"{teacher['architecture']}, {teacher['precision']}, weights "
                    f"{teacher['weights_sha256'][:12]}"),
        ("teacher top-1 on the views", "no labels" if top1 is None else percent(top1)),
        ("encoding", info["encoding"]),
        ("size", f"{size(info['bytes'])}, {info['bytes_per_row']:.1f} bytes a row"),
        ("plan digest", info["plan_digest"]),
        ("teacher digest", info["teacher_digest"]),
        ("content digest", info["digest"]),
    ]  # fmt: skip


@click.command("verify")
@click.argument("store")
@click.option("--expect", metavar="DIGEST", help="Content digest that the store must have.")
@common
def verify(store: str, expect: str | None, as_json: bool, quiet: bool) -> int:
    """Check every byte of a STORE against its manifest; exit 1 if it is damaged."""
    from kdcache_stores import open_store

    with open_store(store, expect=expect) as opened, progress(quiet or as_json, "objects") as bars:
        task = bars.add_task("verify", total=None, note="")
        report = opened.verify(
            progress=lambda done, total: bars.update(task, completed=done, total=total)
        )
    emit(report.to_dict(), as_json)
    if report.ok:
        say(f"{store} is whole: every object is what was written", quiet or as_json)
        return 0
    for problem in report.problems:
        say(f"damaged: {problem}", as_json)
    return 1
