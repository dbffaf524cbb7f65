"""Posterior samples of a teacher with dropout: one network each, of fixed masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kdcache.models.dropout import fix_dropout
from kdcache.teachers.teacher import Teacher


def mc_dropout(teacher: Teacher, seed: int) -> Teacher:
    """One posterior sample of a teacher: its dropout layers stay active, with fixed masks.

    The masks depend on the seed alone, not on the batch, so that rows of a store stay independent.
    Weights are shared with the teacher. Sample `seed` is the same network on every device.

    Raises:
        UsageError: the teacher has no active dropout layer.
    """
    return replace(teacher, module=fix_dropout(teacher.module, seed), dropout_seed=seed)


def posterior_samples(teacher: Teacher, path: Path, count: int) -> list[tuple[Teacher, Path]]:
    """Posterior samples of a teacher with dropout, each with its store: A.zarr -> A-mc0.zarr, ...

    Raises:
        UsageError: the teacher has no active dropout layer.
    """
    return [
        (mc_dropout(teacher, seed), path.with_name(f"{path.stem}-mc{seed}{path.suffix}"))
        for seed in range(count)
    ]
