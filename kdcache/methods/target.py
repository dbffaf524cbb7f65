"""The label's class against the others: the two parts of a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.methods.table import METHODS, names_of
from kdcache_stores.errors import DataError


def check_labels(labels: Tensor | None, why: str) -> Tensor:
    """`labels`, refused where they are absent or -1 and `why` needs them.

    Labels on an accelerator are not looked at, which would wait for the device at every step, nor
    those of a compiled step;
    there an index of -1 stops the run in `gather`. `Objective.check` looks once, before the first.
    """
    if labels is None:
        raise DataError(f"{why} needs the label of each sample, found none. Pass `labels`.")
    looks = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and bool((labels < 0).any()):
        raise DataError(
            f"{why} needs the label of each sample, found {int((labels < 0).sum())} of "
            f"{labels.numel()} unlabelled (-1). Leave those samples out, or use another method: "
            f"{names_of(m for m in METHODS.values() if not m.needs_labels)} need no labels."
        )
    return labels


def others(scaled: Tensor, labels: Tensor) -> Tensor:
    """The K - 1 entries of each row that are not the label's: (B, K), (B,) -> (B, K - 1).

    Taken out rather than masked by -1000: the softmax over them is exact for any logits, and for
    two classes it is the one probability 1.
    """
    index = torch.arange(scaled.shape[-1] - 1, device=scaled.device).expand(len(scaled), -1)
    return scaled.gather(-1, index + (index >= labels[:, None]))


def target_or_not(scaled: Tensor, labels: Tensor) -> Tensor:
    """log [p_y, 1 - p_y] of each row: (B, K), (B,) -> (B, 2), accurate also where p_y is 1."""
    target = scaled.gather(-1, labels[:, None])
    rest = others(scaled, labels).logsumexp(-1, keepdim=True)
    return torch.cat([target, rest], -1).log_softmax(-1)


def with_others(scaled: Tensor, labels: Tensor, replaced: Tensor) -> Tensor:
    """`scaled` with the K - 1 entries that are not the label's replaced, the label's kept."""
    index = torch.arange(scaled.shape[-1] - 1, device=scaled.device).expand(len(scaled), -1)
    return scaled.scatter(-1, index + (index >= labels[:, None]), replaced)
