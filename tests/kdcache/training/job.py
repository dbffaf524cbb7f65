"""Trainings in a process of their own: python -m tests.kdcache.training.job '[[OUT, OPTIONS], ...]'."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace

import torch
import torch.distributed as dist

from kdcache import Training, train
from kdcache.methods.config import ObjectiveConfig
from kdcache.training.optim import Optimization


def training(options: dict[str, object]) -> Training:
    """A small training from plain values."""
    base = Training(
        dataset="digits", model="tests.kdcache.training.networks:plain", train_samples=50
    )
    options = dict(options)
    objective = ObjectiveConfig.from_dict(options.pop("objective", {"method": "ce"}))
    optimization = Optimization(**options.pop("optimization", {}))
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return replace(base, objective=objective, optimization=optimization, **options)


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    together = dist.is_torchelastic_launched()
    if together:  # one group for all trainings: a second one would meet the addresses of the first
        dist.init_process_group("gloo")
    for out, options in json.loads(sys.argv[1]):
        pace = options.pop("checkpoint_every", "60s")
        train(training(options), out, checkpoint_every=pace)
    if together:
        dist.destroy_process_group()
