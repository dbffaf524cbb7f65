"""Distillation from a cache in a training loop of your own: plain PyTorch, two dozen lines.

kdcache dump-teacher --dataset digits --teacher TEACHER --views 4 --out teacher.zarr
python examples/plain_pytorch.py teacher.zarr
"""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

from kdcache import CachedViews, Preprocessing, build_model, load_dataset
from kdcache.methods.logits.kd import kd


def main(store: str, epochs: int = 3) -> float:
    """Train a resnet8 on the digits; its accuracy on the test set."""
    torch.manual_seed(0)
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    normalise = Preprocessing.measured(train.images)
    student = build_model("resnet8", classes=10, channels=1, size=8)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    with CachedViews(train, [store], batch_size=64, seed=0) as views:
        for epoch in range(epochs):
            for images, labels, (teacher,), _ in views.epoch(epoch):
                logits = student(normalise(images))
                distillation = kd(
                    logits, teacher["logits"], temperature=2.0, standardize="unbiased"
                )
                loss = 0.1 * F.cross_entropy(logits, labels) + 9.0 * distillation
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    student.eval()
    with torch.inference_mode():
        right = student(normalise(test.images)).argmax(1) == torch.from_numpy(test.labels)
    return right.float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main(sys.argv[1]):.2%}")
