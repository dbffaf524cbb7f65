"""TALD noise on the teacher's logits against a temperature that blurs the targets as much.

    python evidence/noise.py --dataset arrays:cifar100.npz --teacher resnet20@resnet20.pth \
        --normalisation cifar100 --folder study --out evidence/noise.json

Every scale of noise (relative to the row's standard deviation, before standardization) has a control: no
noise, and the temperature at which the mean entropy of the targets is that of the noisy ones. What the
noise does beyond blurring is the difference between the two. Students are also tested on corrupted images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from methods import objectives
from scipy.optimize import brentq
from study import Arm, Study, mean, paired, spread
from torch import Tensor
from torchvision.transforms.v2 import functional as images_of

from kdcache import load_dataset, load_teacher
from kdcache.methods.noise import Noise
from kdcache.methods.scaling import standardize
from kdcache.methods.step import Step
from kdcache_stores import open_store

SCALES = (0.3, 1.0, 2.0)
CORRUPTIONS = {
    "noise": lambda x: (
        (x + 25.5 * torch.randn(x.shape, generator=torch.manual_seed(0)))
        .clamp(0, 255)
        .to(torch.uint8)
    ),
    "blur": lambda x: images_of.gaussian_blur(x, [5, 5], [1.0, 1.0]),
    "brightness": lambda x: images_of.adjust_brightness(x, 1.6),
}


def entropy(logits: Tensor, temperature: float, noise: Noise | None) -> float:
    """Mean entropy in nats of the standardized targets of logits (N, K)."""
    if noise is not None:
        rows = len(logits)
        step = Step(keys=torch.arange(rows), views=torch.zeros(rows, dtype=torch.int64))
        logits = noise(logits, step)
    log_p = torch.log_softmax(standardize(logits, "unbiased") / temperature, dim=-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())


def main() -> None:
    """Train every student and write one JSON file."""
    study = Study(__doc__)
    store = study.store()
    options = {"stores": (store,), "views": study.args.views}
    plain = objectives(study.args.epochs)["kd+std"]
    usual = float(plain.resolved().temperature or 2.0)
    with open_store(store) as opened:
        logits = torch.from_numpy(opened.read(0))
    arms = {"no noise": Arm(plain, options)}
    temperatures = {}
    for scale in SCALES:
        noise = Noise("gaussian", scale, relative=True)
        wanted = entropy(logits, usual, noise)
        matched = brentq(lambda t, w=wanted: entropy(logits, t, None) - w, 0.2, 20.0)
        temperatures[f"{scale:g}"] = {"entropy": round(wanted, 4), "temperature": round(matched, 4)}
        control = f"T = {matched:.2f}, no noise"
        arms[control] = Arm(replace(plain, temperature=matched), options, control="no noise")
        arms[f"noise {scale:g}"] = Arm(replace(plain, noise=noise), options, control=control)
    results = study.compare(arms)
    robust(study, results, arms)
    study.report(results, entropy_matched=temperatures, corruptions=list(CORRUPTIONS))


def robust(study: Study, results: dict[str, Any], arms: dict[str, Arm]) -> None:
    """Add each arm's accuracy on corrupted test images, and its difference from the control's."""
    test = load_dataset(study.data(), "test")
    corrupted = {name: change(test.images) for name, change in CORRUPTIONS.items()}
    labels = torch.from_numpy(test.labels)
    paths = study.run(arms)
    for name, runs in paths.items():
        results[name]["corrupted_top1"] = {
            kind: [accuracy(study, path, x, labels, test.classes) for path in runs]
            for kind, x in corrupted.items()
        }
    for name, arm in arms.items():
        if name not in results:
            continue
        scores = results[name]["corrupted_top1"]
        results[name]["corrupted"] = {
            kind: {"mean": mean(values), "std": spread(values)} for kind, values in scores.items()
        }
        if arm.control in results:
            results[name]["corrupted_minus_control"] = {
                kind: paired(values, results[arm.control]["corrupted_top1"][kind])
                for kind, values in scores.items()
            }


@torch.inference_mode()
def accuracy(study: Study, run: Path, x: Tensor, labels: Tensor, classes: int) -> float:
    """Top-1 in percent of a finished run on images (N, C, H, W) uint8."""
    model = load_teacher(
        str(run), classes=classes, channels=x.shape[1], size=x.shape[-1], device=study.args.device
    )
    logits = torch.cat([model.logits(part.to(study.args.device)).cpu() for part in x.split(500)])
    return round(100 * float((logits.argmax(1) == labels).float().mean()), 2)


if __name__ == "__main__":
    main()
