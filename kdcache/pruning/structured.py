"""Channels that go with all that depends on them, by Torch-Pruning."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdcache.imports import require_package
from kdcache.models.taps import as_fields
from kdcache.pruning.narrowing import Widths, widths_of
from kdcache_stores import UsageError


def kept_of(full: int, ratio: float) -> int:
    """How many of a layer's channels stay."""
    return round(full * (1 - ratio))


class ChannelPruner:
    """Takes channels out of a network, the same part of every layer.

    The inputs of the first and the outputs of the last layer stay. Channels that are added to each other
    (around a shortcut) go together.

    Args:
        name: of the network, for errors.
        network: with all its channels.
        inputs: a small batch that it takes, (2, ...).

    Attributes:
        full: its widths.
    """

    def __init__(self, name: str, network: nn.Module, inputs: Tensor) -> None:
        try:
            import torch_pruning
        except ImportError as error:
            raise require_package("--prune structured", "prune", error) from None
        self.library, self.name, self.inputs = torch_pruning, name, inputs
        self.full = widths_of(network)

    def final_widths(self, network: nn.Module, ratio: float) -> Widths:
        """The widths that differ once a part of the channels is gone; the network is left as it is.

        Raises:
            UsageError: a layer would be empty, the network cannot be traced, or not be run without these
                channels.
        """
        trial = copy.deepcopy(network)
        self.prune(trial, ratio, "magnitude", {})
        self._require_runs(trial, self._classes(network))
        pruned = widths_of(trial)
        changed = {layer: widths for layer, widths in pruned.items() if widths != self.full[layer]}
        if not changed:
            raise UsageError(
                f"--prune structured: nothing of {self.name} can go: Torch-Pruning sees no layer with "
                "channels of its own."
            )
        return changed

    def prune(
        self, network: nn.Module, ratio: float, by: str, gradients: Mapping[str, Tensor]
    ) -> None:
        """Take channels out, so that a part of those it had in the beginning is gone.

        Args:
            network: with all its channels, or some; it is changed.
            ratio: the part.
            by: "magnitude" or "gradient".
            gradients: of the parameters by name, for the latter.
        """
        importances = self.library.pruner.importance
        importance = (
            importances.GroupTaylorImportance()
            if by == "gradient"
            else importances.GroupMagnitudeImportance(p=2)
        )
        training = network.training
        network.eval()
        layers, last = dict(network.named_modules()), self._last_layers(network)
        ratios = {}
        for name, (now, *_) in widths_of(network).items():
            if layers[name] in last:
                continue
            if (kept := kept_of(self.full[name][0], ratio)) < 1:
                full = self.full[name][0]
                raise UsageError(
                    f"--prune structured:{ratio:g} leaves {name} of {self.name} no channel of {full}: give "
                    f"{1 - 1 / full:.3g} at most."
                )
            # Torch-Pruning rounds down what stays.
            ratios[layers[name]] = max(0.0, 1 - (kept + 1e-6) / now)
        try:
            pruner = self.library.BasePruner(
                network,
                self._inputs(network),
                importance,
                pruning_ratio=ratio,
                pruning_ratio_dict=ratios,
                ignored_layers=last,
                output_transform=lambda output: as_fields(output)["logits"],
            )
            for name, parameter in network.named_parameters():
                parameter.grad = gradients.get(name)
            pruner.step()
        except UsageError:
            raise
        except Exception as error:  # whatever its tracing meets in a network
            raise UsageError(
                f"--prune structured: Torch-Pruning cannot trace {self.name} ({type(error).__name__}: "
                f"{error}): choose another network, or prune single weights (unstructured)."
            ) from error
        network.zero_grad(set_to_none=True)
        network.train(training)

    def _inputs(self, network: nn.Module) -> Tensor:
        """A small batch where the network is."""
        return self.inputs.to(next(network.parameters()).device)

    def _classes(self, network: nn.Module) -> int:
        training = network.training
        with torch.no_grad():
            classes: int = as_fields(network.eval()(self._inputs(network)))["logits"].shape[1]
        network.train(training)
        return classes

    def _last_layers(self, network: nn.Module) -> list[nn.Module]:
        """The layers whose outputs are the logits."""
        classes = self._classes(network)
        linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        return [layer for layer in linear[-1:] if layer.out_features == classes]

    def _require_runs(self, trial: nn.Module, classes: int) -> None:
        entered = [""]
        handles = [
            layer.register_forward_pre_hook(lambda *_, name=name: entered.__setitem__(0, name))
            for name, layer in trial.named_modules()
        ]
        training = trial.training
        try:
            with torch.no_grad():
                given = as_fields(trial.eval()(self._inputs(trial)))["logits"]
        except Exception as error:  # whatever a network raises
            raise UsageError(
                f"--prune structured: without these channels {self.name} fails in {entered[0]} "
                f"({type(error).__name__}: {error}): its forward pass counts on its widths. Choose another "
                "network, or prune single weights (unstructured)."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            trial.train(training)
        if given.shape[1] != classes:
            raise UsageError(
                f"--prune structured: the logits of {self.name} come from no linear layer, and would be "
                f"{given.shape[1]} instead of {classes}: choose another network, or prune single weights "
                "(unstructured)."
            )
