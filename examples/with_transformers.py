"""Distillation from a cache in Hugging Face's Trainer: pip install transformers accelerate

python examples/with_transformers.py teacher.zarr
"""

import sys
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Sampler, default_collate

from kdcache import CachedDataset, Preprocessing, ViewSampler, load_dataset
from kdcache.methods.logits.kd import kd


def distill(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy, and the distance to the cached teacher."""
    distance = kd(logits, batch["logits"], temperature=2.0, standardize="unbiased")
    return 0.1 * F.cross_entropy(logits, batch["label"]) + 9.0 * distance


class Distillation(transformers.Trainer):
    """The Trainer with a loss of its own, and the sampler that says which view comes."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """The loss of one batch."""
        return distill(model(inputs["image"]).logits, inputs)

    def _get_train_sampler(self, train_dataset: CachedDataset | None = None) -> Sampler:
        return ViewSampler(self.train_dataset)


def main(store: str, epochs: int = 3) -> float:
    """Train a small ResNet on the digits; its accuracy on the test set."""
    transformers.set_seed(0)
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    normalise = Preprocessing.measured(train.images)
    data = CachedDataset(train, store, transform=normalise)
    config = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_labels": 10}
    config = transformers.ResNetConfig(num_channels=1, layer_type="basic", **config)
    student = transformers.ResNetForImageClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=5e-3,
            remove_unused_columns=False, use_cpu=True, report_to="none", save_strategy="no",
        )  # fmt: skip
        Distillation(student, options, default_collate, data).train()
    student.eval()
    with torch.inference_mode():
        right = student(normalise(test.images)).logits.argmax(1) == torch.from_numpy(test.labels)
    return right.float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main(sys.argv[1]):.2%}")
