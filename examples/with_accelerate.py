"""Distillation from a cache in a loop that accelerate prepares, which tells the sampler the epoch.

pip install accelerate
accelerate launch examples/with_accelerate.py teacher.zarr
"""

import sys

import accelerate
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
    accelerate.utils.set_seed(0)
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    normalise = Preprocessing.measured(train.images)
    data = CachedDataset(train, store, transform=normalise)
    model = build_model("resnet8", classes=10, channels=1, size=8)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        DataLoader(data, 64, sampler=ViewSampler(data)),
    )
    for _ in range(epochs):
        for batch in loader:
            loss = distill(model(batch["image"]), batch)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    student = accelerator.unwrap_model(model)
    student.eval()
    with torch.inference_mode():
        right = student(normalise(test.images)).argmax(1) == torch.from_numpy(test.labels)
    return right.float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main(sys.argv[1]):.2%}")
