"""A teacher: a frozen model, its preprocessing, its precision, and a digest of all three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kdcache.fields.spelling import needs_head
from kdcache.models.network import batch_statistics
from kdcache.models.taps import head_of, read_outputs, tapped
from kdcache.preprocessing import Inputs, autocast, channels_last, require_precision
from kdcache_stores import StoredTeacher
from kdcache_stores.errors import MismatchError


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen model from uint8 views, or items that are no images, to float32 fields.

    Args:
        architecture: its name, as `load_teacher` takes it, without the weights.
        module: in eval mode, on the device, without gradients; gives logits (B, K), or a mapping
            {field: (B, ...)} that holds them.
        preprocessing: applied to the views first.
        classes: how many logits it gives.
        weights_sha256: `tensor_digest` of the module's state (batch counters left out).
        file_sha256: of the file that the weights came from, if there was one.
        weights_entry: of that file, "model_ema" say, where it holds more than the weights.
        precision: "float32", "bf16" or "fp16".
        class_map: which of the module's logits is class 0, 1, ... of the dataset; None: in order.
            Of logits alone: other fields stay as they are.
        dropout_seed: of the posterior sample whose dropout masks are in the module, or None.
        channels_last: run the module in that memory format.
        compile: run the module through torch.compile.
        batch_size: forward at most so many views at a time; None: as many as are asked for.
        by_batch: its batch norms use the mean and variance of each batch that it sees, instead of
            those that it was trained to; the digest does not cover it, since no store is written so.
        fields: what it gives per view, by name (`kdcache.models.taps`).
        shapes: the shape of each field per row; those of fields that are not named here are not
            known, and not compared.

    Attributes:
        forward: the module with the taps that give the fields, compiled where that is asked for.
    """

    architecture: str
    module: nn.Module
    preprocessing: Inputs
    classes: int
    weights_sha256: str
    file_sha256: str | None = None
    weights_entry: str | None = None
    precision: str = "float32"
    class_map: tuple[int, ...] | None = None
    dropout_seed: int | None = None
    channels_last: bool = False
    compile: bool = False
    batch_size: int | None = None
    by_batch: bool = False
    fields: tuple[str, ...] = ("logits",)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    forward: nn.Module = field(init=False, repr=False)
    _columns: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require_precision(self.precision)
        taps = tapped(self.module, self.fields)
        forward = torch.compile(taps) if self.compile else taps
        mapped = self.class_map is not None
        columns = torch.tensor(self.class_map, device=self.device) if mapped else None
        object.__setattr__(self, "forward", forward)
        object.__setattr__(self, "_columns", columns)
        object.__setattr__(self, "shapes", {**self.shapes, "logits": (self.classes,)})

    @property
    def device(self) -> torch.device:
        """Where the module lies."""
        return next(self.module.parameters(), torch.empty(0)).device

    @property
    def head(self) -> tuple[Tensor, Tensor] | None:
        """Weight (K, D) and bias (K,) that make the logits of `pooled`, float32.

        None where no field needs it (`kdcache.fields.spelling.needs_head`), or a user's module names no
        layer as `head`.
        """
        linear = head_of(self.module) if any(map(needs_head, self.fields)) else None
        if linear is None:
            return None
        weight = linear.weight.detach().float()
        bias = (
            weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().float()
        )
        return (
            (weight, bias)
            if self._columns is None
            else (weight[self._columns], bias[self._columns])
        )

    def __call__(self, views: Tensor) -> dict[str, Tensor]:
        """The fields, float32 (B, *shape) each, of views uint8 (B, C, H, W) on its device.

        Raises:
            DataError: what the module gives is not a row per view for every field.
            MismatchError: rows of another shape than `shapes` says.
        """
        return self._read(views, self.fields)

    def logits(self, views: Tensor) -> Tensor:
        """The logits, float32 (B, classes), whatever the fields; see `__call__`."""
        return self._read(views, ("logits",))["logits"]

    @torch.no_grad()  # not inference mode: a student's loss may save these values for backward
    def _read(self, views: Tensor, fields: Sequence[str]) -> dict[str, Tensor]:
        if self.batch_size is None:
            return self._outputs(views, fields)
        parts = [self._outputs(part, fields) for part in torch.split(views, self.batch_size)]
        return {name: torch.cat([part[name] for part in parts]) for name in fields}

    def _outputs(self, views: Tensor, fields: Sequence[str]) -> dict[str, Tensor]:
        images = self.preprocessing(views)
        if self.channels_last:
            images = channels_last(images)
        modes = batch_statistics(self.forward) if self.by_batch else nullcontext()
        with modes, autocast(views.device, self.precision):
            given = self.forward(images)
        outputs = read_outputs(self.architecture, given, fields, len(views))
        if self._columns is not None and "logits" in outputs:
            outputs["logits"] = outputs["logits"][:, self._columns]
        for name, values in outputs.items():
            shape = tuple(values.shape[1:])
            if shape != self.shapes.get(name, shape):
                raise MismatchError(self._other_shape(name, shape))
        return outputs

    def _other_shape(self, name: str, shape: tuple[int, ...]) -> str:
        who, expected = f"network {self.architecture}", self.shapes[name]
        if name == "logits":
            return (
                f"{who} gives logits of shape {shape} per row, {expected} was expected: use one "
                "trained for this dataset, or dump-teacher --class-map where its classes are ordered otherwise"
            )
        return (
            f"{who} gives rows of {name} of shape {shape} here and of {expected} before: a field has "
            "one shape for every view. Pad or pool them to one length in the module, whatever the batch"
        )

    def to_store(self, clean_top1: dict[str, float] | None = None) -> StoredTeacher:
        """What a store keeps of it. Its digest covers the class map and the dropout seed too."""
        preprocessing = self.preprocessing.to_dict()
        if self.class_map is not None:
            preprocessing["class_map"] = list(self.class_map)
        if self.dropout_seed is not None:
            preprocessing["dropout_seed"] = self.dropout_seed
        return StoredTeacher(
            architecture=self.architecture,
            weights_sha256=self.weights_sha256,
            preprocessing=preprocessing,
            precision=self.precision,
            classes=self.classes,
            file_sha256=self.file_sha256,
            clean_top1=clean_top1,
        )
