"""Distillation without images: sentences as hashed bags of words, from a wide network to a narrow one.

python examples/bags_of_words.py FOLDER NEGATIVE.txt POSITIVE.txt    (a sentence a line)
"""

import sys
import zlib
from pathlib import Path

import numpy as np
from torch import nn

from kdcache.runs import read_summary
from kdcache_cli import main as kdcache

BUCKETS = 2048


def wide(classes: int, shape: tuple[int]) -> nn.Module:
    """The teacher; `shape` is that of an item."""
    layers = nn.Dropout(0.3), nn.Linear(*shape, 256), nn.ReLU(), nn.Dropout(0.5)
    return nn.Sequential(*layers, nn.Linear(256, classes))


def narrow(classes: int, shape: tuple[int]) -> nn.Module:
    """The student, whose 4 numbers stand for a sentence."""
    return nn.Sequential(nn.Linear(*shape, 4), nn.ReLU(), nn.Linear(4, classes))


def bags(sentences: list[str]) -> np.ndarray:
    """Counts of words by hash, of unit length, float32 (N, BUCKETS)."""
    counts = np.zeros((len(sentences), BUCKETS), np.float32)
    for row, sentence in zip(counts, sentences, strict=True):
        np.add.at(row, [zlib.crc32(word.encode()) % BUCKETS for word in sentence.split()], 1)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def main(folder: str, *files: str, epochs: int = 8) -> dict[str, float]:
    """One file a class; test accuracy of the teacher, and of a student without and with it."""
    texts = [Path(file).read_text("latin-1").splitlines() for file in files]
    labels = np.repeat(np.arange(len(texts)), [len(lines) for lines in texts])
    rows = np.concatenate([bags(lines) for lines in texts])
    np.savez_compressed(f"{folder}/bags.npz", x_train=rows, y_train=labels)
    data = f"--dataset arrays:{folder}/bags.npz --quiet"
    training = f"{data} --optimizer adamw --lr 3e-3 --batch-size 256 --epochs {epochs} --threads 1"
    student = f"train-student --student bags_of_words:narrow --store {folder}/t.zarr {training}"
    for command in (
        f"train-teacher --model bags_of_words:wide --out {folder}/teacher {training}",
        f"dump-teacher --teacher {folder}/teacher --allow-code --out {folder}/t.zarr {data}",
        f"{student} --method ce --out {folder}/ce",
        f"{student} --method kd --out {folder}/kd",
    ):
        if code := kdcache(command.split()):
            sys.exit(code)
    return {run: read_summary(f"{folder}/{run}")["last_top1"] for run in ("teacher", "ce", "kd")}


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
