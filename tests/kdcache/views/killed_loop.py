"""A training loop of one's own that may be killed at any time: it goes on in the middle of an epoch.

    python -m tests.kdcache.views.killed_loop LOADER WORKERS STORE FOLDER

LOADER is "views" (CachedViews) or "stateful" (CachedDataset in torchdata's StatefulDataLoader). Each
step is a line of FOLDER/steps and a checkpoint; the end is FOLDER/weights.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcache import CachedDataset, CachedViews, ViewSampler, load_dataset
from kdcache.methods.logits.kd import kd

EPOCHS, BATCH = 3, 64


def loader_of(kind: str, workers: int, store: str) -> Any:
    data = load_dataset("digits")
    if kind == "views":
        return CachedViews(data, store, BATCH, seed=5)
    from torchdata.stateful_dataloader import StatefulDataLoader

    cached = CachedDataset(data, store)
    return StatefulDataLoader(
        cached,
        BATCH,
        sampler=ViewSampler(cached, seed=5),
        num_workers=workers,
        snapshot_every_n_steps=1,
    )


def passes(loader: Any, kind: str) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Images, teacher's logits and rows, pass after pass."""
    while True:
        for batch in loader:
            if kind == "views":
                yield batch.images, batch.teachers[0]["logits"], batch.rows.tolist()
            else:
                yield batch["image"], batch["logits"], batch["row"].tolist()


def main(kind: str, workers: int, store: str, folder: Path) -> None:
    torch.manual_seed(0)
    loader = loader_of(kind, workers, store)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    done, total = 0, EPOCHS * len(loader)
    checkpoint = folder / "checkpoint"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        done = state["done"]
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
    batches = passes(loader, kind)
    while done < total:
        images, logits, rows = next(batches)
        loss = kd(student(images.float() / 255), logits, temperature=4.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done += 1
        seen = hashlib.sha256(
            images.numpy().tobytes() + logits.numpy().tobytes() + str(rows).encode()
        )
        with open(folder / "steps", "a", encoding="utf-8") as file:
            file.write(f"{done} {seen.hexdigest()} {loss.item()!r}\n")
        state = {"done": done, "student": student.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"loader": loader.state_dict()}, folder / "checkpoint.tmp")
        os.replace(folder / "checkpoint.tmp", checkpoint)
    torch.save(student.state_dict(), folder / "weights")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torchdata calls what torch has deprecated
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
