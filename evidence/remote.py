"""A student from a store behind a server that waits 50 ms before each response, beside the local store.

    python evidence/remote.py --epochs 6 --rounds 3 --out evidence/remote.json

Dumps the digits through a random teacher, serves the store on loopback, and trains the same student from
the folder and from the URL, in turns, each time with an empty cache; seconds per epoch, the first left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import mean, median, stdev

from study import about

from kdcache_cli import main as kdcache


class Slow(SimpleHTTPRequestHandler):
    """Sends each response after a pause."""

    protocol_version = "HTTP/1.1"
    latency = 0.05

    def do_GET(self) -> None:
        """Wait, then serve."""
        time.sleep(self.latency)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        """Log nothing."""


def epochs(run: Path, what: str) -> list[float]:
    """A figure of each epoch but the first: "seconds", or "data_wait_seconds" of them."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[what] for line in lines][1:]


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds before each response")
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    Slow.latency = args.latency
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = ["--dataset", "digits", "--device", "cpu", "--quiet", "--threads", "1"]
        teacher, store = folder / "teacher", folder / "served" / "teacher.zarr"
        run(["train-teacher", "--model", "resnet8", "--epochs", "1", "--out", teacher, *common])
        run(
            [
                "dump-teacher",
                "--teacher",
                teacher,
                "--views",
                str(args.epochs),
                "--out",
                store,
                *common,
            ]
        )
        handler = partial(Slow, directory=str(folder / "served"))
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        places = {
            "local": str(store),
            "remote": f"http://127.0.0.1:{server.server_port}/teacher.zarr",
        }
        seconds: dict[str, list[float]] = {"local": [], "remote": []}
        waits: dict[str, list[float]] = {"local": [], "remote": []}
        for round_ in range(args.rounds):
            for kind, place in places.items():
                os.environ["KDCACHE_CACHE"] = str(folder / f"cache{round_}")
                out = folder / f"{kind}{round_}"
                run(["train-student", "--store", place, "--student", args.student, "--method", "kd",
                     "--epochs", str(args.epochs), "--out", out, *common])  # fmt: skip
                seconds[kind] += epochs(out, "seconds")
                waits[kind] += epochs(out, "data_wait_seconds")
        server.shutdown()
    result = about() | {
        "latency_seconds": args.latency,
        "speed_of_local": mean(seconds["local"]) / mean(seconds["remote"]),
        "speed_of_local_by_medians": median(seconds["local"]) / median(seconds["remote"]),
        "seconds_per_epoch": described(seconds),
        "of_which_waiting_for_data": described(waits),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def described(figures: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Mean, median, standard deviation and n of each list."""
    return {
        kind: {"mean": mean(v), "median": median(v), "std": stdev(v), "n": len(v)}
        for kind, v in figures.items()
    }


def run(command: list[object]) -> None:
    """One kdcache command; a failure ends the measurement."""
    if code := kdcache([str(word) for word in command]):
        sys.exit(code)


if __name__ == "__main__":
    main()
