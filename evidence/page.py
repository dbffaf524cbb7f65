"""docs/EVIDENCE.md from the JSON files: every table between two markers is written anew.

python evidence/page.py            rewrite the tables
python evidence/page.py --list     what can be measured, by which command
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from math import fsum  # rounds alike in every Python: sum() does since 3.12 only
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "EVIDENCE.md"
TABLE = re.compile(r"<!-- (\S+\.json) -->\n.*?<!-- end -->", re.S)


def table(document: dict[str, Any]) -> str:
    """The file's table in Markdown, its command and machine below it."""
    if "claims" in document:
        return "\n".join(saving_table(document))
    results = document["found"] if "found" in document else document["results"]
    if isinstance(results, list):
        lines = scale_table(results)
    elif any("last_top1" in arm for arm in results.values() if isinstance(arm, dict)):
        lines = arms_table(results)
    elif any("first_step" in arm for arm in results.values() if isinstance(arm, dict)):
        lines = equality_table(results)
    elif any("gaussian_bound" in arm for arm in results.values() if isinstance(arm, dict)):
        lines = bound_table(results)
    else:
        lines = values_table(results)
    machine = document["machine"].replace("_", "\\_")
    versions = ", ".join(
        f"{key} {document[key]}" for key in ("torch", "kdcache") if key in document
    )
    return "\n".join([*lines, "", f"`{document['command']}`", f"({machine}, {versions})"])


def arms_table(results: dict[str, Any]) -> list[str]:
    """Accuracy per arm: mean and standard deviation over seeds, and the difference from its control."""
    n = len(next(iter(results.values()))["last_top1"])
    corrupted = next((list(arm["corrupted"]) for arm in results.values() if "corrupted" in arm), [])
    costs = {"s an epoch": "seconds_per_epoch", "bytes a view": "bytes_per_view",
             "teacher forwards": "teacher_forwards"}  # fmt: skip
    if not any("teacher_forwards" in arm for arm in results.values()):
        costs = {}
    heads = [
        "students",
        "last epoch",
        "best epoch",
        "last - control (95% CI)",
        "control",
        *corrupted,
        *costs,
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, arm in results.items():
        less = arm.get("last_minus_control")
        cells = [
            name,
            f"{arm['mean']:.2f} +- {arm['std']:.2f}",
            f"{arm['best_mean']:.2f}",
            f"{less['mean']:+.2f} +- {less['ci95']:.2f}" if less else "",
            arm.get("control", ""),
        ]
        cells += [f"{arm['corrupted'][kind]['mean']:.2f}" for kind in corrupted]
        cells += [f"{arm[key]:,}" for key in costs.values()]
        lines.append("| " + " | ".join(cells) + " |")
    words = (
        f"Top-1 in percent, mean and standard deviation over {n} seeds; differences are by seed."
    )
    return [*lines, "", words]


def equality_table(results: dict[str, Any]) -> list[str]:
    """Largest differences between a cached and an online training, per objective and encoding."""
    heads = ["objective, encoding", "targets", "loss", "gradients", "weights after two epochs",
             "the same, online with another batch"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, arm in results.items():
        first, two = arm["first_step"], arm["two_epochs"]
        values = (first["target"], first["loss"], first["gradient"], two["cached"], two["control"])
        lines.append(f"| {name} | " + " | ".join(f"{value:.2g}" for value in values) + " |")
    return lines


def bound_table(results: dict[str, Any]) -> list[str]:
    """Bytes a row of `compact` beside the bound, and the distortion reached."""
    heads = ["logits, target", "KL, Z-scored", "codes, base, basis: bytes a row", "Gaussian bound",
             "moments, argmax", "components"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in results.items():
        moments = fsum(row["bytes_a_row"][array] for array in ("mean", "std", "top"))
        lines.append(
            f"| {name} ({row['samples']:,} samples, {row['classes']:,} classes) "
            f"| {row['reached']['kl_z_mean']:.2e} | {row['codes_base_basis']:.2f} "
            f"| {row['gaussian_bound']:.2f} | {moments:.2f} "
            f"| {row['fitted']['components']} of {row['fitted']['directions']} |"
        )
    return lines


def saving_table(document: dict[str, Any]) -> list[str]:
    """Of `kdcache bench --only saving`: a line a pair, command and machine below."""
    heads = ["teacher -> student", "multiply-adds", "cached, s", "online, s", "online / cached (quartiles)",
             "(step + forward) / step", "a view's dump, s", "paid back after"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for claim in document["claims"]:
        pair = claim["details"]
        epochs = pair["epochs"]
        cached, online = (epochs[name]["median"] for name in ("cached", "online"))
        lines.append(
            f"| {pair['teacher']} -> {pair['student']}{', photographs' if pair['side'] else ''} "
            f"| {pair['macs']:.1f} | {cached:.2f} | {online:.2f} "
            f"| **{claim['median']:.2f}** ({claim['p25']:.2f} to {claim['p75']:.2f}) "
            f"| {sorted(pair['bound'])[len(pair['bound']) // 2]:.2f} | {pair['dump_seconds']:.2f} "
            f"| {pair['crossing']:.2f} epochs |"
        )
    images = [claim["details"]["epochs"]["images_per_epoch"] for claim in document["claims"]]
    rounds = document["claims"][0]["rounds"]
    words = (
        f"Seconds of an epoch of {images[0]} images ({images[-1]} photographs), medians of {rounds} "
        "rounds in turns."
    )
    where, versions = document["machine"], document["versions"]
    return [*lines, "", words, "", "`kdcache bench --only saving --threads 1 --out bench-saving.json`",
            f"({where['processor']}, {where['torch_threads']} thread(s), torch {versions['torch']}, "
            f"kdcache {versions['kdcache']})"]  # fmt: skip


def scale_table(results: list[dict[str, Any]]) -> list[str]:
    """Seconds and memory of each step, by the number of keys."""
    steps = [name for name, cost in results[0].items() if isinstance(cost, dict)]
    heads = ["", *(f"{run['keys']:,} keys x {run['classes']:,}" for run in results)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for step in steps:
        costs = [run[step] for run in results]
        cells = [
            f"{cost['seconds']:.1f} s ({cost['cpu_seconds']:.1f} of the processor), "
            f"peak {cost['peak_mb']:,} MB"
            for cost in costs
        ]
        lines.append("| " + " | ".join([step.replace("_", " "), *cells]) + " |")
    return lines


def values_table(results: dict[str, Any]) -> list[str]:
    """Plain values, one a line."""
    lines = ["| | |", "|---|---|"]
    for name, value in results.items():
        words = value
        if isinstance(value, dict):
            words = ", ".join(f"{key} {number:g}" for key, number in value.items())
        elif isinstance(value, list):
            words = ", ".join(f"{number:g}" for number in value)
        lines.append(f"| {name.replace('_', ' ')} | {words} |")
    return lines


def filled(page: str) -> str:
    """The page with every table as its JSON file has it."""

    def rewritten(match: re.Match[str]) -> str:
        name = match.group(1)
        document = json.loads((HERE / name).read_text())
        return f"<!-- {name} -->\n{table(document)}\n<!-- end -->"

    return TABLE.sub(rewritten, page)


def draw_saving(document: dict[str, Any], file: Path) -> None:
    """The saving of each pair over its teacher's share of the time, beside what arithmetic allows."""
    import matplotlib
    from matplotlib.figure import Figure

    from kdcache.report.figures import STYLE

    shares, savings = [], []
    for claim in document["claims"]:
        epochs = claim["details"]["epochs"]
        shares.append(epochs["forward"]["median"] / epochs["step"]["median"])
        savings.append((claim["p25"], claim["median"], claim["p75"]))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "saving"}):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        ends = [min(shares) * 0.8, max(shares) * 1.2]
        line = [ends[0] * (ends[1] / ends[0]) ** (i / 50) for i in range(51)]
        axes.plot(line, [1 + x for x in line], color="0.6", label="(step + forward) / step")
        low, middle, high = zip(*savings, strict=True)
        errors = [[m - a for m, a in zip(middle, low, strict=True)],
                  [b - m for m, b in zip(middle, high, strict=True)]]  # fmt: skip
        axes.errorbar(shares, middle, errors, fmt="o", color="C0", label="measured, quartiles")
        names = [f"{pair['teacher']} -> {pair['student']}".replace("torchvision:", "")
                 for pair in (claim["details"] for claim in document["claims"])]  # fmt: skip
        for x, y, name in zip(shares, middle, names, strict=True):
            below = name.startswith(("resnet56", "resnet32x4"))  # where there is room
            axes.annotate(
                name, (x, y), (8, -4) if below else (-8, 4), textcoords="offset points", fontsize=7,
                ha="left" if below else "right", va="top" if below else "bottom",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="the teacher's forward / the student's step, seconds",
                 ylabel="an epoch online / cached")  # fmt: skip
        ticks = {"x": [0.5, 1, 2, 5, 10], "y": [1.5, 2, 3, 5, 10, 15]}
        for which, at in ticks.items():
            axis = getattr(axes, f"{which}axis")
            axis.set_ticks(at, [f"{tick:g}" for tick in at])
            axis.set_ticks([], minor=True)
        axes.grid()
        axes.legend(loc="upper left")
        figure.savefig(file, metadata={"Date": None, "Creator": None})


def listed() -> list[str]:
    """Per study: its first line, and the command of the committed result where there is one."""
    lines = []
    for script in sorted(HERE.glob("*.py")):
        doc = ast.get_docstring(ast.parse(script.read_text())) or ""
        if script.stem in ("study", "page"):
            continue
        lines.append(f"evidence/{script.name}: {doc.partition(chr(10))[0]}")
        command = re.search(r"python evidence/.*?(?=\n\n|\Z)", doc, re.S)
        if command:
            lines.append("    " + " ".join(command.group(0).split()))
    return lines


def main() -> None:
    """Rewrite the page and its picture, or list the studies."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true")
    if parser.parse_args().list:
        print("\n".join(listed()))
    else:
        PAGE.write_text(filled(PAGE.read_text()))
        draw_saving(
            json.loads((HERE / "bench-saving.json").read_text()), PAGE.with_name("saving.svg")
        )


if __name__ == "__main__":
    main()
