"""The published CIFAR-100 comparison on one GPU: a teacher, its exhaustive store, many students.

    python evidence/cifar100.py --dataset arrays:cifar100.npz --folder runs --out evidence/cifar100.json

Students of small networks leave most of a GPU idle, so several train side by side (--jobs), each in a
process of its own, all from the same store. What is finished in --folder is not done again: an
interrupted comparison goes on where it stopped. Shorter runs (--epochs, --teacher-epochs) keep the recipe's
shape, since its milestones are fractions of the epochs; the JSON says how long they were.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from study import about, mean, spread

from kdcache.runs import SUMMARY, read_summary

PUBLISHED = {  # Sun et al., CVPR 2024, resnet32x4 -> resnet8x4: best epoch, mean of several trials
    "ce": 72.50, "kd": 73.33, "kd-ls": 76.62, "dkd": 76.32, "dkd-ls": 77.01, "ctkd": 73.39,
    "ctkd-ls": 76.67,
}  # fmt: skip


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar100")
    parser.add_argument("--data-root")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--teacher", default="resnet32x4", help="a network to train, or a run")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--methods", default="ce,kd,kd-ls,dkd,dkd-ls")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=240, help="of the students")
    parser.add_argument("--teacher-epochs", type=int, default=240)
    parser.add_argument("--encoding", default="float16")
    parser.add_argument("--jobs", type=int, default=5, help="students side by side")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", help="of all stages [default: bf16 on a GPU, else float32]")
    parser.add_argument("--extra", default="", help="more flags of every stage, such as --compile")
    for stage, command in (("teacher", "train-teacher"), ("dump", "dump-teacher"),
                           ("student", "train-student")):  # fmt: skip
        parser.add_argument(f"--{stage}-extra", default="", help=f"more flags of {command}")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(words)
    args.precision = args.precision or ("bf16" if args.device.startswith("cuda") else "float32")
    return args


def shared(args: argparse.Namespace) -> list[str]:
    """The flags of all stages; a GPU gets bf16 and channels-last, which it computes fastest."""
    gpu = args.device.startswith("cuda")
    words = ["--dataset", args.dataset, "--device", args.device, "-q"]
    words += ["--data-root", args.data_root] if args.data_root else []
    words += ["--precision", args.precision, *(["--channels-last"] if gpu else [])]
    return [*words, *args.extra.split()]


def train_teacher(args: argparse.Namespace) -> list[str]:
    """The command that trains the teacher."""
    return ["train-teacher", "--model", args.teacher, "--out", str(args.folder / "teacher"), "--epochs",
            str(args.teacher_epochs), *shared(args), *args.teacher_extra.split()]  # fmt: skip


def dump_teacher(args: argparse.Namespace, teacher: Path) -> list[str]:
    """The command that stores the teacher's logits for all 162 views."""
    return ["dump-teacher", "--teacher", str(teacher), "--augment", "exhaustive", "--views", "162",
            "--encoding", args.encoding, "--batch-size", "1024", "--out",
            str(args.folder / "teacher.zarr"), *shared(args), *args.dump_extra.split()]  # fmt: skip


def train_student(args: argparse.Namespace, method: str, seed: int) -> list[str]:
    """The command that trains one student."""
    return ["train-student", "--store", str(args.folder / "teacher.zarr"), "--student", args.student,
            "--recipe", f"cifar100/{method}", "--schedule", "random", "--epochs", str(args.epochs),
            "--seed", str(seed), "--out", str(args.folder / f"{method}-seed{seed}"), *shared(args),
            *args.student_extra.split()]  # fmt: skip


def main() -> None:
    """Train, dump, distill and write one JSON file."""
    args = options()
    args.folder.mkdir(parents=True, exist_ok=True)
    teacher = Path(args.teacher)
    if not teacher.is_dir():
        teacher = args.folder / "teacher"
        run(train_teacher(args), args.folder / "teacher.log")
    run(dump_teacher(args, teacher), args.folder / "store.log")

    def student(method: str, seed: int) -> Path:
        out: Path = args.folder / f"{method}-seed{seed}"
        run(train_student(args, method, seed), out.with_suffix(".log"))
        return out

    jobs = [(method, seed) for seed in range(args.seeds) for method in args.methods.split(",")]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = dict(zip(jobs, pool.map(lambda job: student(*job), jobs), strict=True))
    results = {}
    for method in args.methods.split(","):
        summaries = [read_summary(out) for (name, _), out in runs.items() if name == method]
        last = [100 * summary["last_top1"] for summary in summaries]
        results[method] = {
            "last_top1": last,
            "best_top1": [100 * summary["best_top1"] for summary in summaries],
            "mean_last": mean(last),
            "std_last": spread(last),
            "seconds_per_epoch": [summary["seconds_per_epoch"] for summary in summaries],
            "published_best": PUBLISHED.get(method),
        }
        print(method, json.dumps(results[method]))
    more = {
        "teacher_top1": 100 * read_summary(teacher)["last_top1"] if (teacher / SUMMARY).exists() else None,
        "epochs": args.epochs,
        "teacher_epochs": args.teacher_epochs,
        "precision": args.precision,
        "students_side_by_side": args.jobs,
    }  # fmt: skip
    args.out.write_text(json.dumps(about() | more | {"found": results}, indent=1) + "\n")


def run(words: Sequence[str], log: Path) -> None:
    """One command of kdcache in a process of its own; its page goes to ``log``."""
    with log.open("w") as stream:
        done = subprocess.run(
            [sys.executable, "-m", "kdcache", *words], stderr=stream, stdout=stream
        )
    if done.returncode:
        raise SystemExit(f"kdcache {words[0]} failed, see {log}:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    main()
