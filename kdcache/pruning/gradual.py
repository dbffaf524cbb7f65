"""The pruning of a network in training: a part after each of the first epochs, then recovery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from kdcache.pruning.narrowing import Widths, narrow, widths_of
from kdcache.pruning.request import PruneRequest
from kdcache.pruning.structured import ChannelPruner


class Pruning:
    """What goes of a network, and what has gone.

    Args:
        request: what is to go.
        name: of the network, for errors.
        network: as it begins; pruned in place.
        inputs: a small batch that it takes.

    Attributes:
        widths: of the layers that will be narrower in the end; empty where only single weights go.

    Raises:
        UsageError: see `ChannelPruner`.
    """

    def __init__(
        self, request: PruneRequest, name: str, network: nn.Module, inputs: Tensor
    ) -> None:
        self.request, self.network = request, network
        self.done = 0
        self.gradients: dict[str, Tensor] = {}
        self.channels: ChannelPruner | None = None
        self.widths: Widths = {}
        if request.kind == "structured":
            self.channels = ChannelPruner(name, network, inputs)
            self.widths = self.channels.final_widths(network, request.ratio)

    def observe(self) -> None:
        """After each backward pass: remember its gradients, where the next part is chosen by them."""
        if self.request.by != "gradient" or self.done >= self.request.epochs:
            return
        for name, parameter in self.network.named_parameters():
            if parameter.grad is None:
                continue
            if name in self.gradients:
                self.gradients[name] += parameter.grad
            else:
                self.gradients[name] = parameter.grad.clone()

    def end_epoch(self, epochs: int) -> bool:
        """After so many epochs, take out what is due; whether the network has other parameters now."""
        if self.done >= min(epochs, self.request.epochs):
            return False
        before, self.done = self.request.ratio_after(self.done), min(epochs, self.request.epochs)
        ratio = self.request.ratio_after(self.done)
        if self.channels is not None:
            self.channels.prune(self.network, ratio, self.request.by, self.gradients)
        else:
            self._zero((ratio - before) / (1 - before))
        self.gradients = {}
        return self.channels is not None

    def _zero(self, share: float) -> None:
        """Set a share of the weights that are left to zero, the least important of all layers together."""
        named = _weights(self.network)
        scores = None
        if self.request.by == "gradient":
            scores = {
                (layer, "weight"): (_trained(layer) * self._gradient(name)).abs()
                for name, layer in named.items()
            }
        prune.global_unstructured(
            [(layer, "weight") for layer in named.values()],
            pruning_method=prune.L1Unstructured,
            importance_scores=scores,
            amount=share,
        )

    def _gradient(self, name: str) -> Tensor:
        masked = f"{name}.weight_orig"
        return self.gradients[masked if masked in self.gradients else f"{name}.weight"]

    def state_dict(self) -> dict[str, Any]:
        """How far it is: epochs, and the widths of the layers."""
        return {"done": self.done, "widths": widths_of(self.network)}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Give the network, as it began, the layers that it had; their numbers are to be loaded.

        Returns:
            Whether it has other parameters now; masks leave them, and their order in an optimizer.
        """
        self.done = state["done"]
        if self.channels is not None:
            narrow(self.network, state["widths"])
        elif self.done:
            for layer in _weights(self.network).values():
                prune.identity(layer, "weight")
        return self.channels is not None

    def finish(self) -> None:
        """Make the masks part of the weights."""
        for layer in _weights(self.network).values():
            if prune.is_pruned(layer):
                prune.remove(layer, "weight")

    def summary(self) -> dict[str, Any]:
        """Parameters that no mask sets to zero."""
        buffers = self.network.named_buffers()
        masked = sum(int((t == 0).sum()) for name, t in buffers if name.endswith("weight_mask"))
        return {"nonzero_parameters": sum(p.numel() for p in self.network.parameters()) - masked}


def _weights(network: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers, by name."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, kinds)}


def _trained(layer: nn.Module) -> Tensor:
    weight = layer.weight_orig if prune.is_pruned(layer) else layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()
