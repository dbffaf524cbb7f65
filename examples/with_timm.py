"""Distillation from a cache with timm's model, optimizer, scheduler and EMA.

No mixup here: what is mixed, the store has mixed, as its teacher saw it.

pip install timm
python examples/with_timm.py teacher.zarr
"""

import sys

import timm
import timm.optim
import timm.scheduler
import timm.utils
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kdcache import CachedDataset, Preprocessing, ViewSampler, load_dataset
from kdcache.methods.logits.kd import kd


def distill(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy, and the distance to the cached teacher."""
    distance = kd(logits, batch["logits"], temperature=2.0, standardize="unbiased")
    return 0.1 * F.cross_entropy(logits, batch["label"]) + 9.0 * distance


def main(store: str, epochs: int = 3) -> float:
    """Train a small timm ResNet on the digits; the accuracy of its average on the test set."""
    torch.manual_seed(0)
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    normalise = Preprocessing.measured(train.images)
    data = CachedDataset(train, store, transform=normalise)
    loader = DataLoader(data, 64, sampler=ViewSampler(data))
    model = timm.create_model("resnet10t", in_chans=1, num_classes=10, output_stride=8)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=2e-3)
    scheduler, epochs = timm.scheduler.create_scheduler_v2(optimizer, num_epochs=epochs)
    average = timm.utils.ModelEmaV3(model, decay=0.9)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            loss = distill(model(batch["image"]), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
        scheduler.step(epoch + 1)
    student = average.module
    student.eval()
    with torch.inference_mode():
        right = student(normalise(test.images)).argmax(1) == torch.from_numpy(test.labels)
    return right.float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main(sys.argv[1]):.2%}")
