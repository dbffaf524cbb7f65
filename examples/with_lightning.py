"""Distillation from a cache under Lightning: `CachedViews` is the data, an objective is the loss.

pip install lightning
python examples/with_lightning.py teacher.zarr
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from kdcache import CachedViews, Preprocessing, build_model, load_dataset
from kdcache.methods.objective import Objective
from kdcache.methods.step import Step
from kdcache.views.cached import Batch


class Epochs(IterableDataset[Batch]):
    """The cached views as Lightning wants data: each pass is the epoch that the training is in.

    Passes cannot be counted here: Lightning begins more of them than it trains, and ends none.
    """

    def __init__(self, views: CachedViews, epoch: Callable[[], int]) -> None:
        self.views, self.epoch = views, epoch

    def __len__(self) -> int:
        return len(self.views)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.views.epoch(self.epoch())


class Distillation(lightning.LightningModule):
    """A resnet8 for the digits that learns from labels and cached logits."""

    def __init__(self, normalise: Preprocessing, epochs: int) -> None:
        super().__init__()
        self.student = build_model("resnet8", classes=10, channels=1, size=8)
        self.objective = Objective(method="dkd", standardize="unbiased", options={"beta": 2.0})
        self.normalise, self.epochs = normalise, epochs

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, index: int) -> Batch:
        """`CachedViews` gives its batches on the device already."""
        return batch

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The loss of one batch."""
        step = Step(
            epoch=self.current_epoch,
            index=index,
            epochs=self.epochs,
            keys=batch.keys,
            views=batch.views,
        )
        student = {"logits": self.student(self.normalise(batch.images))}
        loss, _ = self.objective(student, batch.teachers, batch.labels, step, batch.mix)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD; the parameters of the module include those of an objective (CTKD's temperature)."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(store: str, epochs: int = 3) -> float:
    """Train a resnet8 on the digits; its accuracy on the test set."""
    lightning.seed_everything(0, verbose=False)
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    normalise = Preprocessing.measured(train.images)
    module = Distillation(normalise, epochs)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with CachedViews(train, [store], batch_size=64, seed=0) as views:
        data = Epochs(views, lambda: module.current_epoch)
        trainer.fit(module, DataLoader(data, batch_size=None))
    student = module.student.eval()
    with torch.inference_mode():
        right = student(normalise(test.images)).argmax(1) == torch.from_numpy(test.labels)
    return right.float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main(sys.argv[1]):.2%}")
