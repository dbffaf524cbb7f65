"""Does a network take the token ids of a dataset? Tried first: a GPU would abort at one that it lacks."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from kdcache.data.dataset import Dataset
from kdcache_stores import MismatchError

#: Items that are tried of a dataset that is not in memory.
TRIED = 256


def require_ids(network: nn.Module, name: str, dataset: Dataset) -> None:
    """Run a copy of a network on the items with the largest and the smallest id, on the CPU.

    Args:
        network: any; of other items than token ids nothing is tried.
        name: of the network, for people.
        dataset: in memory; of others the first `TRIED` items are tried.

    Raises:
        MismatchError: the network fails on an id.
    """
    if dataset.item is None or dataset.item.dtype != "int64":
        return
    if dataset.images is None:
        items = torch.stack([dataset.decode(row) for row in range(min(TRIED, len(dataset)))])
    else:
        items = dataset.images
    flat = items.flatten(1).numpy()
    rows = np.unique([flat.max(1).argmax(), flat.min(1).argmin()])
    try:
        with torch.no_grad():
            copy.deepcopy(network).cpu().eval()(items[torch.from_numpy(rows)])
    except (IndexError, RuntimeError) as error:  # an embedding raises either
        raise MismatchError(
            f"{name} does not take the items of {dataset.name}, whose ids are {flat.min()} to "
            f"{flat.max()}: {error}. An embedding needs {flat.max() + 1} rows at least, and no id below 0"
        ) from error
