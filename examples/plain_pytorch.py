"""Distillation from a cache in a training loop of your own, in plain PyTorch.

kdcache dump-teacher --dataset digits --teacher TEACHER --views 4 --out teacher.zarr
python examples/plain_pytorch.py teacher.zarr
"""

import sys

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kdcache import CachedDataset, Preprocessing, ViewSampler, build_model, load_dataset
from kdcache.methods.logits.kd import kd


def distill(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy, and the distance to the cached teacher."""
    distance = kd(logits, batch["logits"], temperature=2.0, standardize="unbiased")
    return 0.1 * F.cross_entropy(logits, batch["label"]) + 9.0 * distance


def main(store: str, epochs: int = 3) -> float:
    """Train a resnet8 on the digits; its accuracy on the test set."""
    torch.manual_seed(0)
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    normalise = Preprocessing.measured(train.images)
    data = CachedDataset(train, store, transform=normalise)
    loader = DataLoader(data, 64, sampler=ViewSampler(data))
    student = build_model("resnet8", classes=10, channels=1, size=8)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            loss = distill(student(batch["image"]), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    student.eval()
    with torch.inference_mode():
        right = student(normalise(test.images)).argmax(1) == torch.from_numpy(test.labels)
    return right.float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main(sys.argv[1]):.2%}")
