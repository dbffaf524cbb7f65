"""Distillation from a cache in the recipe of torchvision's reference scripts.

Its SGD, warm-up, cosine and average of weights; its mixup stays off: the store has mixed.

python examples/with_torchvision.py teacher.zarr
"""

import sys

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision.models.resnet import BasicBlock, ResNet

from kdcache import CachedDataset, Preprocessing, ViewSampler, load_dataset
from kdcache.methods.logits.kd import kd


def distill(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy, and the distance to the cached teacher."""
    distance = kd(logits, batch["logits"], temperature=2.0, standardize="unbiased")
    return 0.1 * F.cross_entropy(logits, batch["label"]) + 9.0 * distance


def main(store: str, epochs: int = 3) -> float:
    """Train a small torchvision ResNet on the digits; the accuracy of its average."""
    torch.manual_seed(0)
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    normalise = Preprocessing.measured(train.images)
    data = CachedDataset(train, store, transform=lambda x: normalise(x).expand(3, -1, -1))
    loader = DataLoader(data, 64, sampler=ViewSampler(data))
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=1)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(epochs - 1, 1))
    scheduler = lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[1])
    student = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            loss = distill(model(batch["image"]), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            student.update_parameters(model)
        scheduler.step()
    student.eval()
    with torch.inference_mode():
        right = student(normalise(test.images).expand(-1, 3, -1, -1)).argmax(1) == torch.from_numpy(
            test.labels
        )
    return right.float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main(sys.argv[1]):.2%}")
