"""Taps: what passes through a network on its way to the logits, by the name of a field.

The zoo's networks name their stages and their head; of torchvision's and timm's, their own feature
extraction does. A user's module gives a mapping {field: tensor} itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from kdcache.fields.maps import attention_at, attention_heights, averaged
from kdcache.fields.spelling import FIELDS, spelled, stored_name, tap_of
from kdcache.models.dropout import FixedDropout
from kdcache.models.network import Network, Stage
from kdcache_stores.errors import DataError, UsageError

STAGES = {"stages": "", "stages:pre": "_pre"}
"""What stands for all stages but the stem, and how the names of their fields end."""

TRACED_SIDE = 64
"""Pixels of the image by which torchvision's stages are told apart: every size of map is another one."""


class Maps(NamedTuple):
    """What a network computed of some images.

    Attributes:
        stages: the stem's map and those of its stages; empty where nobody asked for them.
        last: (B, D, H, W), of which `pooled` is the mean; None where there is no such map.
        pooled: (B, D), what the head sees.
        logits: (B, K).
    """

    stages: Sequence[Stage]
    last: Tensor | None
    pooled: Tensor
    logits: Tensor


class MapSource(nn.Module):
    """A network with a linear layer at its end that gives its `Maps`.

    Args:
        network: in eval mode, if it is torchvision's.
        staged: whether maps are wanted, and not `pooled` alone.
    """

    def __init__(self, network: nn.Module, staged: bool) -> None:
        super().__init__()
        self.network: Any = network
        self.name = type(network).__name__
        self.staged = staged

    @property
    def head(self) -> nn.Linear:
        """The linear layer."""
        head = head_of(self.network)
        assert head is not None
        return head

    def forward(self, images: Tensor) -> Maps:
        """Of images (B, C, H, W)."""
        raise NotImplementedError


class ZooSource(MapSource):
    """A network of the zoo."""

    def forward(self, images: Tensor) -> Maps:
        """Of images (B, C, H, W)."""
        stages = self.network.stages(images)
        last = self.network.last(stages)
        pooled = self.network.pooled(last)
        return Maps(stages, last, pooled, self.network.head(pooled))


class TimmSource(MapSource):
    """A network of timm, whose stages are its intermediates."""

    def forward(self, images: Tensor) -> Maps:
        """Of images (B, C, H, W)."""
        maps: Sequence[Tensor] = ()
        if self.staged:
            features, maps = self.network.forward_intermediates(images)
        else:
            features = self.network.forward_features(images)
        pooled: Tensor = self.network.forward_head(features, pre_logits=True)
        is_map = features.ndim == 4 and features.shape[1] == pooled.shape[1]
        last = features if is_map else None
        return Maps([Stage(m, m) for m in maps], last, pooled, self.head(pooled))


class TorchvisionSource(MapSource):
    """A network of torchvision, traced; a stage is the last map of its size."""

    def __init__(self, network: nn.Module, staged: bool) -> None:
        kept = {"leaf_modules": [FixedDropout]}
        _, names = get_graph_node_names(network, dict(kept), suppress_diff_warning=True)
        if dict(network.named_modules()).get(names[-1]) is not head_of(network):
            raise UsageError(_no_pooled(network, f"its last step is {names[-1]}"))

        def extractor(wanted: Sequence[str]) -> nn.Module:
            module: nn.Module = create_feature_extractor(
                network,
                list(wanted),
                tracer_kwargs=dict(kept),
                suppress_diff_warning=True,
            )
            return module.eval()

        super().__init__(network, staged)
        self.ends = [names[-1], names[-2]]
        self.stage_names: list[str] = []
        self.averages = False
        if staged:
            self.stage_names, self.averages = _stage_nodes(network, extractor(names), names[-2])
        self.network = extractor(list(dict.fromkeys([*self.ends, *self.stage_names])))

    @property
    def head(self) -> nn.Linear:
        """The linear layer."""
        head = self.network.get_submodule(self.ends[0])
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, images: Tensor) -> Maps:
        """Of images (B, C, H, W)."""
        outputs = self.network(images)
        maps = [outputs[name] for name in self.stage_names]
        logits, pooled = (outputs[name] for name in self.ends)
        last = maps[-1] if self.averages else None
        return Maps([Stage(m, m) for m in maps], last, pooled, logits)


def _stage_nodes(network: nn.Module, everything: nn.Module, pooled: str) -> tuple[list[str], bool]:
    """The last node of every size of map, in order, and whether the last one's mean is the node `pooled`."""
    parameter = next(network.parameters())
    channels = next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))
    image = parameter.new_zeros(2, channels, TRACED_SIDE, TRACED_SIDE)
    image += torch.linspace(-1, 1, TRACED_SIDE, device=image.device)
    try:
        with torch.no_grad():
            outputs = everything(image)
    except (AssertionError, RuntimeError):  # an image of another size, which has no stages then
        return [], False
    last_of = {
        values.shape[2:]: name
        for name, values in outputs.items()
        if isinstance(values, Tensor)
        and values.ndim == 4
        and 1 < min(values.shape[2:]) < TRACED_SIDE
    }
    names = list(last_of.values())
    if len(names) < 2:  # the patches of a transformer are no stage
        return [], False
    return names, averages_to(outputs[names[-1]], outputs[pooled])


def averages_to(last: Tensor, pooled: Tensor) -> bool:
    """Whether the mean of a map (B, D, H, W) is a vector (B, D), but for rounding."""
    if last.ndim != 4 or pooled.shape != last.shape[:2]:
        return False
    difference = (last.mean((2, 3)) - pooled).abs().max()
    return bool(difference <= 1e-3 * pooled.abs().max())


class Taps(nn.Module):
    """A network that gives its logits and the fields that are asked for."""

    def __init__(self, source: MapSource, fields: Sequence[str]) -> None:
        super().__init__()
        self.source = source
        self.fields = tuple(dict.fromkeys(("logits", *fields)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> {field: (B, ...)}."""
        maps = self.source(images)
        return {name: self._read(name, maps) for name in self.fields}

    def _read(self, name: str, maps: Maps) -> Tensor:
        tap = tap_of(name)
        assert tap is not None
        if tap.kind == "logits":
            return maps.logits
        if tap.kind == "pooled":
            return maps.pooled
        if tap.kind in ("last", "cam"):
            if maps.last is None:
                raise UsageError(self._lacks(name, "its head does not see the mean of a map"))
            if tap.kind == "cam":
                return torch.einsum("kd,bdhw->bkhw", self.source.head.weight, maps.last)
            if tap.number is None:
                return maps.last
            if tap.number > min(maps.last.shape[2:]):
                side = "x".join(map(str, maps.last.shape[2:]))
                raise UsageError(self._lacks(name, f"its last map has {side}"))
            return averaged(maps.last, tap.number)
        if not maps.stages:
            raise UsageError(self._lacks(name, "nothing of it is known as its stages"))
        after = [stage.after for stage in maps.stages[1:]]
        if tap.kind == "attention":
            assert tap.number is not None
            if not any(m.shape[2] >= tap.number for m in after):
                raise UsageError(self._lacks(name, f"its stages are {_heights(after)} high"))
            return attention_at(after, tap.number)
        assert tap.number is not None
        if tap.number >= len(maps.stages):
            raise UsageError(self._lacks(name, f"its stages are 0 to {len(maps.stages) - 1}"))
        stage = maps.stages[tap.number]
        return stage.before if tap.before else stage.after

    def _lacks(self, name: str, why: str) -> str:
        return f"{self.source.name} has no field {spelled(name)}: {why}"


def _heights(maps: Sequence[Tensor]) -> str:
    return ", ".join(str(m.shape[2]) for m in maps)


def tapped(network: nn.Module, fields: Sequence[str]) -> nn.Module:
    """A module, weights shared with the network, whose forward gives at least these fields.

    Args:
        network: in eval mode. A user's own, which must give a mapping itself, is returned as it is,
            and so is any network of which logits alone are wanted.
        fields: stored names, see `expanded`.

    Returns:
        A module from images (B, C, H, W) to {field: (B, ...)}, or to logits (B, K).

    Raises:
        UsageError: the network is the zoo's, torchvision's or timm's and has no such field; for one that
            depends on the size of the images, when it is run.
    """
    own = not (isinstance(network, Network) or _is_timm(network) or _is_torchvision(network))
    if own or set(fields) <= {"logits"}:
        return network
    name = type(network).__name__
    if unknown := [field for field in fields if tap_of(field) is None]:
        raise UsageError(
            f"{name} has no field {', '.join(unknown)}: it has {', '.join(FIELDS)}. A module of your "
            "own may return a mapping {field: tensor} of whatever you want kept"
        )
    taps = [tap for tap in map(tap_of, fields) if tap is not None]
    if any(tap.before for tap in taps) and not isinstance(network, Network):
        raise UsageError(
            f"{name} has no field stage:N:pre: what is before a ReLU is kept of the zoo's networks "
            "alone (`kdcache list models`)"
        )
    return Taps(
        source_of(network, staged=bool({tap.kind for tap in taps} - {"logits", "pooled"})), fields
    )


def source_of(network: nn.Module, staged: bool = True) -> MapSource:
    """What gives the maps of a network of the zoo, of torchvision or of timm.

    Args:
        staged: whether maps are wanted, and not `pooled` alone.

    Raises:
        UsageError: it has no linear layer at its end, or is a user's own.
    """
    if head_of(network) is None:
        raise UsageError(_no_pooled(network, "it has no linear layer at its end"))
    if isinstance(network, Network):
        return ZooSource(network, staged)
    if _is_timm(network):
        return TimmSource(network, staged)
    if _is_torchvision(network):
        return TorchvisionSource(network, staged)
    raise UsageError(
        f"{type(network).__name__} is a module of your own, of which nothing is known as its maps"
    )


@torch.no_grad()
def expanded(network: nn.Module, fields: Sequence[str], images: Tensor) -> tuple[str, ...]:
    """The stored names that spellings stand for: "attention" for a map at every size, "stages" and
    "stages:pre" for each stage.

    Args:
        network: as for `tapped`.
        fields: spellings, or stored names.
        images: (B, C, H, W), of the size that the network will see.
    """
    names: list[str] = []
    for field in fields:
        tap = tap_of(field)
        several = field in STAGES or (
            tap is not None and tap.kind == "attention" and tap.number is None
        )
        if not several or not (
            isinstance(network, Network) or _is_timm(network) or _is_torchvision(network)
        ):
            names.append(stored_name(field))
            continue
        maps = _without_trace(network, images)
        if not maps.stages:
            raise UsageError(
                f"{type(network).__name__} has no field {field}: nothing of it is known as its stages"
            )
        if field in STAGES:
            names += [f"stage_{n}{STAGES[field]}" for n in range(1, len(maps.stages))]
            continue
        heights = attention_heights([stage.after.shape[2] for stage in maps.stages[1:]])
        names += [f"attention_{height}" for height in heights]
    return tuple(dict.fromkeys(names))


def _without_trace(network: nn.Module, images: Tensor) -> Maps:
    """The maps of some images by a network in eval mode, which is then as it was."""
    training = network.training
    try:
        maps: Maps = source_of(network.eval())(images)
        return maps
    finally:
        network.train(training)


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
