"""A network of fewer channels than its architecture has, by a table of the widths of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdcache_stores import DataError

#: Layer -> [outputs, inputs, groups] of a convolution, [outputs, inputs] of a linear layer, [channels] of a
#: batch norm.
Widths = dict[str, list[int]]

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, _BatchNorm)


def widths_of(network: nn.Module) -> Widths:
    """The widths of every convolution, linear layer and batch norm, by the layer's name."""
    return {
        name: _widths(layer) for name, layer in network.named_modules() if isinstance(layer, _KINDS)
    }


def _widths(layer: nn.Module) -> list[int]:
    if isinstance(layer, nn.Linear):
        return [layer.out_features, layer.in_features]
    if isinstance(layer, _BatchNorm):
        return [layer.num_features]
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return [layer.out_channels, layer.in_channels, layer.groups]


def narrow(network: nn.Module, widths: Mapping[str, Any]) -> nn.Module:
    """Give layers other widths, with zeros in place of their numbers, which are to be loaded.

    Args:
        network: as its architecture has it; it is changed, and returned.
        widths: `Widths` of the layers that differ; numbers that a run or a checkpoint holds.

    Raises:
        DataError: a layer that the network does not have, or widths that it cannot have.
    """
    full = widths_of(network)
    layers = dict(network.named_modules())
    for name, wanted in widths.items():
        own = full.get(name)
        if own is None:
            raise DataError(
                f"the widths name a layer {name!r:.80}, which the network does not have"
            )
        sound = isinstance(wanted, list) and len(wanted) == len(own)
        if not sound or not all(
            type(width) is int and 1 <= width <= most
            for width, most in zip(wanted, own, strict=True)
        ):
            raise DataError(f"the layer {name} has the widths {own}: it cannot have {wanted!r:.80}")
        if len(wanted) == 3 and (wanted[0] % wanted[2] or wanted[1] % wanted[2]):
            raise DataError(f"{wanted[2]} groups do not divide the widths of {name}, {wanted}")
        _resize(layers[name], wanted)
    return network


def _resize(layer: nn.Module, widths: list[int]) -> None:
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = widths
        shape: tuple[int, ...] = (widths[0], widths[1])
    elif isinstance(layer, _BatchNorm):
        (layer.num_features,) = widths
        shape = (widths[0],)
    else:
        assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        layer.out_channels, layer.in_channels, layer.groups = widths
        shape = (widths[0], widths[1] // widths[2], *layer.kernel_size)
    for name, tensor in (
        *layer.named_parameters(recurse=False),
        *layer.named_buffers(recurse=False),
    ):
        if tensor.ndim == 0:  # the counter of a batch norm
            continue
        size = shape if name == "weight" else (widths[0],)
        zeros = torch.zeros(size, dtype=tensor.dtype, device=tensor.device)
        new: Tensor = (
            nn.Parameter(zeros, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros
        )
        setattr(layer, name, new)
