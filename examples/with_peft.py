"""Adapting a timm student to a cached teacher by LoRA (peft): few weights are trained, then merged.

LoRA makes training smaller: gradients and optimizer states of 0.6% of the weights here. It does not make the
student smaller: merged, it has the size and the speed that it had.

With published weights: timm.create_model(..., pretrained=True), and views of the size that it takes.

pip install peft timm
python examples/with_peft.py teacher.zarr adapted.pth
"""

import sys

import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kdcache import CachedDataset, Preprocessing, ViewSampler, load_dataset
from kdcache.methods.logits.kd import kd


def distill(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy, and the distance to the cached teacher."""
    distance = kd(logits, batch["logits"], temperature=2.0, standardize="unbiased")
    return 0.1 * F.cross_entropy(logits, batch["label"]) + 9.0 * distance


def pretrained(images: Tensor, labels: Tensor) -> torch.nn.Module:
    """In place of published weights, which timm would download: two epochs of labels."""
    student = timm.create_model("resnet10t", in_chans=1, num_classes=10, output_stride=8)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    for batch in torch.cat([torch.randperm(len(images)) for _ in range(2)]).split(64):
        loss = F.cross_entropy(student(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def main(store: str, epochs: int = 3, out: str | None = None) -> float:
    """Adapt a small timm ResNet to the digits; its accuracy on the test set, merged."""
    torch.manual_seed(0)
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    normalise = Preprocessing.measured(train.images)
    data = CachedDataset(train, store, transform=normalise)
    loader = DataLoader(data, 64, sampler=ViewSampler(data))
    student = pretrained(normalise(train.images), torch.from_numpy(train.labels))
    # peft's adapter of a convolution has no dilation, which output_stride gives the last two stages.
    adapters = LoraConfig(
        r=8, lora_alpha=16, target_modules=r"layer[12]\..*conv\d", modules_to_save=["fc"]
    )
    adapted = get_peft_model(student, adapters)
    adapted.print_trainable_parameters()
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=3e-3)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            loss = distill(adapted(batch["image"]), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    merged = adapted.eval().merge_and_unload()  # the timm network again: no trace of peft
    images = normalise(test.images)
    with torch.inference_mode():
        right = merged(images).argmax(1) == torch.from_numpy(test.labels)
        torch.save(
            merged.state_dict(), "adapted.pth"
        )  # kdcache evaluate timm:resnet10t@adapted.pth ...
    if out:
        torch.save(merged.state_dict(), out)
    return right.float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main(sys.argv[1], out=sys.argv[2]):.2%}")
