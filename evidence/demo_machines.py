"""The demo on other processors, emulated: does what it prints hold wherever it runs?

    python evidence/demo_machines.py --folder machines --out evidence/demo.json

Another processor rounds differently, and after a few hundred steps that is another draw of everything that
is random. oneDNN and PyTorch are held to older instructions by their own variables, ONEDNN_MAX_CPU_ISA and
ATEN_CPU_CAPABILITY, each with one and two compute threads; what this processor does not have is left out and
named. Finished machines are kept in --folder. `--picture FILE.svg` writes the accuracy over epochs of the
machine as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from study import about

from kdcache import demo
from kdcache.report.collect import find_runs, grouped, read_run
from kdcache.report.sections.training_section import curve
from kdcache.runs import WEIGHTS

WIDTH = 620  # pixels of the picture in a page
INK = "<style>svg{color:#1b1f24}@media(prefers-color-scheme:dark){svg{color:#e6e9ed}}</style>"


@dataclass(frozen=True)
class Machine:
    """An emulated machine: the most that oneDNN and PyTorch may use, and the compute threads.

    Attributes:
        onednn, aten: values of ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY; empty: as it is.
    """

    onednn: str = ""
    aten: str = ""
    threads: int = 1

    @property
    def name(self) -> str:
        """For people and files: "SSE41-default-1"."""
        return f"{self.onednn or 'own'}-{self.aten or 'own'}-{self.threads}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that hold a process to it."""
        wanted = {"ONEDNN_MAX_CPU_ISA": self.onednn, "ATEN_CPU_CAPABILITY": self.aten}
        return {key: value for key, value in wanted.items() if value}

    @property
    def lacking(self) -> bool:
        """Whether this processor cannot be held to it: PyTorch would run instructions that it lacks."""
        has = torch.backends.cpu.get_cpu_capability().lower()
        return self.aten == "avx512" and has != "avx512"


MACHINES = [Machine()] + [
    Machine(onednn, aten, threads)
    for onednn, aten in (
        ("SSE41", "default"),
        ("SSE41", "avx2"),
        ("AVX", "default"),
        ("AVX2", "default"),
        ("AVX2", "avx2"),
        ("AVX512_CORE", "avx512"),
    )
    for threads in (1, 2)
]


def run(folder: Path, machine: Machine) -> dict[str, Any]:
    """The demo's results on a machine, in a process of its own; those of the folder where they are."""
    finished = folder / f"{machine.name}.json"
    if not finished.exists():
        words = [sys.executable, __file__, "--folder", str(folder), "--machine", machine.name]
        subprocess.run(words, env=os.environ | machine.environment, check=True)
    document: dict[str, Any] = json.loads(finished.read_text())
    return document


def here(folder: Path, machine: Machine) -> None:
    """Run the demo in this process, which the caller has held to the machine."""
    out = folder / machine.name
    for step in demo.steps(out, machine.threads):
        step.run(None)
    rows = demo.results(out)["rows"]
    weights = sha256((out / "teacher" / WEIGHTS).read_bytes()).hexdigest()[:12]
    (folder / f"{machine.name}.json").write_text(json.dumps({"teacher": weights, "rows": rows}))


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """A machine's teacher, and per method the mean in percent and the lead over ce in points."""
    arms = {}
    for row in document["rows"]:
        arm = {"mean": round(100 * row["top1_mean"], 2)}
        if gap := row["minus_ce"]:
            arm |= {name: round(100 * gap[name], 2) for name in ("low", "high")}
            arm |= {"minus_ce": round(100 * gap["mean"], 2)}
            arm |= {"errors": round(gap["mean"] / gap["error"], 1)}
        arms[row["method"]] = arm
    return {"teacher": document["teacher"], "seeds": len(document["rows"][0]["top1"]), "arms": arms}


def picture(folder: Path, file: Path) -> None:
    """Draw the test accuracy over epochs of the demo's runs, for pages light and dark."""
    runs = [read_run(path) for path in find_runs([folder])]
    students = grouped([run for run in runs if run.config["model"]["name"] == demo.STUDENT])
    svg = curve(students, "test_top1").svg
    svg = re.sub(r"<svg([^>]*)>", rf'<svg width="{WIDTH}"\1>{INK}', svg, count=1)
    file.write_text(svg, encoding="utf-8")


def main() -> None:
    """Run the demo on every machine and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="keeps runs and finished machines")
    add("--out", type=Path, help="the JSON file")
    add("--only", help="a regular expression of machines to run, such as '1$'")
    add("--picture", type=Path, help="an SVG of the machine as it is")
    add("--machine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.machine:
        here(args.folder, next(m for m in MACHINES if m.name == args.machine))
        return
    wanted = [m for m in MACHINES if re.search(args.only or "", m.name)]
    results = {}
    for machine in wanted:
        if machine.lacking:
            continue
        results[machine.name] = summary(run(args.folder, machine))
        print(machine.name, json.dumps(results[machine.name]["arms"]), flush=True)
    if args.picture:
        picture(args.folder / Machine().name, args.picture)
    if args.out:
        lacking = [m.name for m in wanted if m.lacking]
        document = about() | {"processor_lacks": lacking, "found": results}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
