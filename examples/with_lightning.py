"""Distillation from a cache under Lightning, which tells the sampler the epoch.

pip install lightning
python examples/with_lightning.py teacher.zarr
"""

import sys

import lightning
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


class Distillation(lightning.LightningModule):
    """A resnet8 for the digits that learns from labels and cached logits."""

    def __init__(self) -> None:
        super().__init__()
        self.student = build_model("resnet8", classes=10, channels=1, size=8)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """The loss of one batch."""
        return distill(self.student(batch["image"]), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(store: str, epochs: int = 3) -> float:
    """Train a resnet8 on the digits; its accuracy on the test set."""
    lightning.seed_everything(0, verbose=False)
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    normalise = Preprocessing.measured(train.images)
    data = CachedDataset(train, store, transform=normalise)
    module = Distillation()
    lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
    ).fit(module, DataLoader(data, 64, sampler=ViewSampler(data)))  # fmt: skip
    student = module.student
    student.eval()
    with torch.inference_mode():
        right = student(normalise(test.images)).argmax(1) == torch.from_numpy(test.labels)
    return right.float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main(sys.argv[1]):.2%}")
