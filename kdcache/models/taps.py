"""Taps: what passes through a network on its way to the logits, by the name of a field.

`logits` are what it gives; `pooled` is what its last linear layer sees, a vector per image. The zoo's
networks name that layer; of torchvision's and timm's, their own feature extraction does. A user's
module gives a mapping {field: tensor} itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from kdcache.models.dropout import FixedDropout
from kdcache.models.network import Network
from kdcache_stores.errors import DataError, UsageError

#: The fields that networks of the zoo, of torchvision and of timm have.
FIELDS = ("logits", "pooled")


class ZooTaps(nn.Module):
    """A network of the zoo that gives its fields."""

    network: Network

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> logits (B, K) and pooled (B, D)."""
        pooled = self.network.pooled(self.network.stages(images)[-1])
        return {"logits": self.network.head(pooled), "pooled": pooled}


class TimmTaps(nn.Module):
    """A network of timm that gives its fields; its head must be `head_of` it."""

    network: Any

    def __init__(self, network: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> logits (B, K) and pooled (B, D)."""
        features = self.network.forward_features(images)
        pooled: Tensor = self.network.forward_head(features, pre_logits=True)
        return {"logits": self.head(pooled), "pooled": pooled}


def tapped(network: nn.Module, fields: Sequence[str]) -> nn.Module:
    """A module, weights shared with the network, whose forward gives at least these fields.

    Args:
        network: in eval mode. A user's own, which must give a mapping itself, is returned as it is,
            and so is any network of which logits alone are wanted.
        fields: names.

    Returns:
        A module from images (B, C, H, W) to {field: (B, ...)}, or to logits (B, K).

    Raises:
        UsageError: the network is the zoo's, torchvision's or timm's and has no such field.
    """
    own = not (isinstance(network, Network) or _is_timm(network) or _is_torchvision(network))
    if own or set(fields) <= {"logits"}:
        return network
    name = type(network).__name__
    if unknown := [field for field in fields if field not in FIELDS]:
        raise UsageError(
            f"{name} has no field {', '.join(unknown)}: it has {', '.join(FIELDS)}. A module of your "
            "own may return a mapping {field: tensor} of whatever you want kept"
        )
    head = head_of(network)
    if head is None:
        raise UsageError(_no_pooled(network, "it has no linear layer at its end"))
    if isinstance(network, Network):
        return ZooTaps(network)
    if _is_timm(network):
        return TimmTaps(network, head)
    kept = {"leaf_modules": [FixedDropout]}
    _, names = get_graph_node_names(network, dict(kept), suppress_diff_warning=True)
    if dict(network.named_modules()).get(names[-1]) is not head:
        raise UsageError(_no_pooled(network, f"its last step is {names[-1]}"))
    extractor: nn.Module = create_feature_extractor(
        network,
        {names[-1]: "logits", names[-2]: "pooled"},
        tracer_kwargs=dict(kept),
        suppress_diff_warning=True,
    )
    return extractor.eval()


def as_fields(given: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a network gave, by field: a tensor is the logits."""
    return {"logits": given} if isinstance(given, Tensor) else given


def read_outputs(who: str, given: Any, fields: Sequence[str], rows: int) -> dict[str, Tensor]:
    """What a network gave for some views, as float32 (rows, *shape) by field.

    Args:
        who: the network's name, for messages.
        given: logits, or a mapping that holds them.
        fields: those wanted of the mapping.
        rows: how many views it was given.

    Raises:
        DataError: another type, a mapping without a field, or values that are not a row per view.
    """
    if not isinstance(given, (Tensor, Mapping)):
        raise DataError(
            f"teacher {who}: expected logits (B, K) or a mapping {{field: tensor}}, found "
            f"{type(given).__name__}. Wrap it in a module of your own whose forward gives either, and "
            "name that: MODULE:FUNCTION"
        )
    given = as_fields(given)
    if missing := [name for name in ("logits", *fields) if name not in given]:
        raise DataError(
            f"teacher {who} gives {', '.join(map(str, given)) or 'nothing'}, not {missing[0]}: a "
            "module may return a mapping {field: tensor}, with logits and every field asked for"
        )
    outputs = {}
    for name in fields:
        values = given[name]
        if isinstance(values, (list, tuple)) or (isinstance(values, Tensor) and values.is_nested):
            raise DataError(
                f"teacher {who}: {name} comes as rows of differing length ({type(values).__name__}), "
                "and a field has one shape for every view: pad or pool them in the module"
            )
        if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != rows:
            linear = (
                f"shape {tuple(values.shape)}"
                if isinstance(values, Tensor)
                else type(values).__name__
            )
            expected = "(B, K)" if name == "logits" else "(B, ...)"
            raise DataError(
                f"teacher {who}: expected {name} {expected}, a row for each of B = {rows} views, found "
                f"{linear}"
            )
        outputs[name] = values.float()
    return outputs


def head_of(network: nn.Module) -> nn.Linear | None:
    """The linear layer that makes the logits of `pooled`, where there is one.

    A user's own module may have it as its attribute `head`.
    """
    if _is_timm(network):
        head: Any = cast(Any, network).get_classifier()
    elif _is_torchvision(network):
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        head = layers[-1] if layers else None
    else:
        head = getattr(network, "head", None)
    return head if isinstance(head, nn.Linear) else None


def _no_pooled(network: nn.Module, why: str) -> str:
    return (
        f"{type(network).__name__} has no field pooled, the input of the linear layer that makes the "
        f"logits: {why}. It has logits alone"
    )


def _is_timm(network: nn.Module) -> bool:
    return hasattr(network, "forward_head") and hasattr(network, "get_classifier")


def _is_torchvision(network: nn.Module) -> bool:
    return type(network).__module__.startswith("torchvision.models")
