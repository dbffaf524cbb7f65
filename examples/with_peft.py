"""A timm student, adapted to a cached teacher by LoRA (peft): 0.6% of the weights are trained, then merged."""

import sys
from collections.abc import Iterable

import timm
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kdcache import CachedDataset, Preprocessing, ViewSampler, load_dataset
from kdcache.methods.logits.kd import kd


def train(network: torch.nn.Module, lr: float, losses: Iterable[torch.Tensor]) -> None:
    """A step for each loss, of the weights that may change."""
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=lr)
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def distill(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy, and the distance to the cached teacher."""
    distance = kd(logits, batch["logits"], temperature=2.0, standardize="unbiased")
    return 0.1 * F.cross_entropy(logits, batch["label"]) + 9.0 * distance


def main(store: str, epochs: int = 3, out: str | None = None) -> float:
    """Adapt a small timm ResNet to the digits; its accuracy on the test set, merged."""
    torch.manual_seed(0)
    digits, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    normalise = Preprocessing.measured(digits.images)
    images, labels = normalise(digits.images), torch.from_numpy(digits.labels)
    student = timm.create_model("resnet10t", in_chans=1, num_classes=10, output_stride=8)
    # In place of published weights, which timm would download: two epochs of labels.
    shown = torch.cat([torch.randperm(len(images)) for _ in range(2)]).split(64)
    train(student, 2e-3, (F.cross_entropy(student(images[i]), labels[i]) for i in shown))
    # peft's adapter of a convolution has no dilation, which output_stride gives the last two stages.
    which = {"target_modules": r"layer[12]\..*conv\d", "modules_to_save": ["fc"]}
    adapted = get_peft_model(student, LoraConfig(r=8, lora_alpha=16, **which))
    data = CachedDataset(digits, store, transform=normalise)
    loader = DataLoader(data, 64, sampler=ViewSampler(data))  # each pass is the next epoch's view
    batches = (batch for _ in range(epochs) for batch in loader)
    train(adapted, 3e-3, (distill(adapted(batch["image"]), batch) for batch in batches))
    merged = adapted.eval().merge_and_unload()  # the timm network again: no trace of peft
    with torch.inference_mode():
        right = merged(normalise(test.images)).argmax(1) == torch.from_numpy(test.labels)
    if out:
        torch.save(merged.state_dict(), out)  # kdcache evaluate timm:resnet10t@adapted.pth ...
    return right.float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main(sys.argv[1], out=sys.argv[2]):.2%}")
