"""Teachers: a frozen model, its preprocessing, its precision, and a digest of all three.

A teacher gives fields, by name: `logits`, and what else is asked for (`kdcache.models.taps`).

SPEC                                  what it is
resnet32x4@FILE                       a network of the zoo with weights from a file
torchvision:resnet34@IMAGENET1K_V1    torchvision's with its own weights (or @DEFAULT, or @FILE)
timm:resnet18@a1_in1k                 timm's with the weights of a tag (or @DEFAULT, or @FILE)
my.module:make_teacher[@FILE]         a user's own function
RUN[@FILE]                            a directory written by `kdcache train-teacher`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdcache.models.dropout import fix_dropout
from kdcache.models.library import (
    Pretrained,
    pretrained_timm,
    pretrained_torchvision,
    torchvision_class_names,
)
from kdcache.models.taps import head_of, read_outputs, tapped
from kdcache.models.weights import load_weights, names_file, tensor_digest
from kdcache.models.zoo import MODELS, build_model
from kdcache.precision import autocast, require_precision
from kdcache.preprocessing import PREPROCESSINGS, Preprocessing
from kdcache.runs import WEIGHTS, load_run_model
from kdcache_stores import StoredTeacher
from kdcache_stores.errors import DataError, MismatchError, UsageError

#: Where weights come from when they are named and not a file.
LIBRARIES = {
    "torchvision": pretrained_torchvision,
    "timm": pretrained_timm,
}


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen model from uint8 views to float32 fields.

    Args:
        architecture: its name, as `load_teacher` takes it, without the weights.
        module: in eval mode, on the device, without gradients; gives logits (B, K), or a mapping
            {field: (B, ...)} that holds them.
        preprocessing: applied to the views first.
        classes: how many logits it gives.
        weights_sha256: `tensor_digest` of the module's state (batch counters left out).
        file_sha256: of the file that the weights came from, if there was one.
        precision: "float32", "bf16" or "fp16".
        class_map: which of the module's logits is class 0, 1, ... of the dataset; None: in order.
            Of logits alone: other fields stay as they are.
        dropout_seed: of the posterior sample whose dropout masks are in the module, or None.
        channels_last: run the module in that memory format.
        compile: run the module through torch.compile.
        batch_size: forward at most so many views at a time; None: as many as are asked for.
        fields: what it gives per view, by name.
        shapes: the shape of each field per row; those of fields that are not named here are not
            known, and not compared.
    """

    architecture: str
    module: nn.Module
    preprocessing: Preprocessing
    classes: int
    weights_sha256: str
    file_sha256: str | None = None
    precision: str = "float32"
    class_map: tuple[int, ...] | None = None
    dropout_seed: int | None = None
    channels_last: bool = False
    compile: bool = False
    batch_size: int | None = None
    fields: tuple[str, ...] = ("logits",)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    _forward: nn.Module = field(init=False, repr=False)
    _columns: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require_precision(self.precision)
        taps = tapped(self.module, self.fields)
        forward = torch.compile(taps) if self.compile else taps
        mapped = self.class_map is not None
        columns = torch.tensor(self.class_map, device=self.device) if mapped else None
        object.__setattr__(self, "_forward", forward)
        object.__setattr__(self, "_columns", columns)
        object.__setattr__(self, "shapes", {**self.shapes, "logits": (self.classes,)})

    @property
    def device(self) -> torch.device:
        """Where the module lies."""
        return next(self.module.parameters(), torch.empty(0)).device

    @property
    def head(self) -> tuple[Tensor, Tensor] | None:
        """Weight (K, D) and bias (K,) that make the logits of `pooled`, float32.

        None where `pooled` is not among the fields, or a user's module names no layer as `head`.
        """
        linear = head_of(self.module) if "pooled" in self.fields else None
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
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(views.device, self.precision):
            given = self._forward(images)
        outputs = read_outputs(self.architecture, given, fields, len(views))
        if self._columns is not None and "logits" in outputs:
            outputs["logits"] = outputs["logits"][:, self._columns]
        for name, values in outputs.items():
            shape = tuple(values.shape[1:])
            if shape != self.shapes.get(name, shape):
                raise MismatchError(self._other_shape(name, shape))
        return outputs

    def _other_shape(self, name: str, shape: tuple[int, ...]) -> str:
        who, expected = f"teacher {self.architecture}", self.shapes[name]
        if name == "logits":
            return (
                f"{who} gives logits of shape {shape} per row, {expected} was expected: use a teacher "
                "trained for this dataset, or --class-map where its classes are ordered otherwise"
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


def load_teacher(
    spec: str | Path,
    weights: str | Path | None = None,
    *,
    classes: int,
    channels: int = 3,
    size: int = 32,
    preprocessing: Preprocessing | None = None,
    fallback: Preprocessing | None = None,
    class_map: Sequence[int] | None = None,
    precision: str = "float32",
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    compile: bool = False,
    allow_untrained: bool = False,
    allow_code: bool = False,
    fields: Sequence[str] = ("logits",),
) -> Teacher:
    """A teacher for views of a dataset.

    Args:
        spec: as in the table above; what follows "@" is `weights`.
        weights: a file, or the name of a library's own weights.
        classes: of the dataset.
        channels: of the views.
        size: side of the views in pixels.
        preprocessing: of the model. None: what the library's weights or the run say.
        fallback: preprocessing where neither says it; the teacher then holds this very object.
        class_map: the module's logit for each class of the dataset (`load_class_map`).
        precision: "float32", "bf16" or "fp16".
        device: where it runs.
        channels_last: run in that memory format.
        compile: through torch.compile.
        allow_untrained: fresh weights where there is nothing to load.
        allow_code: import the function that a run names, if its network is a user's own.
        fields: what it shall give (`kdcache.models.taps`).

    Raises:
        UnknownName: no such model, weights or precision.
        UsageError: no preprocessing where it must be given, or a field that the model does not have.
        DataError: no weights, or not readable ones.
        MismatchError: they do not fit the model, or the model does not fit the dataset.
    """
    name, at, after = str(spec).partition("@")
    if at and weights is not None:
        raise UsageError(f"teacher {spec}: weights are given twice, {after} and {weights}")
    require_precision(precision)
    if not fields or len(set(fields)) < len(fields):
        raise UsageError(f"fields {', '.join(fields)}: name one at least, and each once")
    source = str(weights) if weights is not None else after or None
    prefix, _, rest = name.partition(":")
    if prefix in LIBRARIES and source is not None and not names_file(source):
        loaded = LIBRARIES[prefix](rest, source)
    elif name not in MODELS and Path(name).is_dir():
        name, loaded = _from_run(Path(name), source, allow_code)
    elif source is None and Path(name).is_file():
        raise UsageError(
            f"teacher {name} is a file: name the network that its weights are of, NETWORK@{name}"
        )
    elif "/" in name:
        raise DataError(f"teacher {name}: there is no such directory")
    elif source is not None or allow_untrained or prefix not in (*MODELS, *LIBRARIES):
        assumed = preprocessing or fallback
        inputs = assumed.channels if assumed else channels
        side = (assumed and assumed.size) or size
        loaded = _built(name, source, classes, inputs, side, mapped=class_map is not None)
    else:
        own = f", or take the library's: {name}@DEFAULT" if rest else ""
        raise DataError(
            f"teacher {name}: no weights are given. Give a file, --weights FILE or {name}@FILE{own}"
        )
    preprocessing = preprocessing or loaded.preprocessing or fallback
    if preprocessing is None:
        raise UsageError(
            f"teacher {name}: the mean and std that it was trained with are not known. Give them as "
            f"its preprocessing, by numbers or by the name of one: {', '.join(PREPROCESSINGS)}"
        )
    state = loaded.module.state_dict()
    digest = tensor_digest({n: state[n] for n in state if not n.endswith("num_batches_tracked")})
    module = loaded.module.eval().requires_grad_(False).to(device)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    teacher = Teacher(
        architecture=name,
        module=module,
        preprocessing=preprocessing,
        classes=classes,
        weights_sha256=digest,
        file_sha256=loaded.file_sha256,
        precision=precision,
        class_map=None if class_map is None else tuple(class_map),
        channels_last=channels_last,
        fields=tuple(fields),
    )
    return replace(teacher, shapes=_try_out(teacher, channels, size), compile=compile)


def _built(
    name: str, source: str | None, classes: int, channels: int, size: int, *, mapped: bool
) -> Pretrained:
    """A model by name with the weights of a file; with a class map, of as many classes as those."""
    if source is None:  # a user's function that loads its own weights, or allow_untrained
        return Pretrained(build_model(name, classes, channels, size))
    file = load_weights(source)
    module = build_model(name, file.classes if mapped else classes, channels, size)
    file.apply(module)
    return Pretrained(module, file_sha256=file.file_sha256)


def _from_run(path: Path, source: str | None, allow_code: bool) -> tuple[str, Pretrained]:
    """The architecture and model of a run, with another checkpoint of its training if given."""
    run = load_run_model(path, allow_code)
    file = load_weights(source or path / WEIGHTS)
    if source is not None:
        file.apply(run.module)
    trained = Pretrained(run.module, run.preprocessing, file_sha256=file.file_sha256)
    return run.config["model"]["name"], trained


def _try_out(teacher: Teacher, channels: int, size: int) -> dict[str, tuple[int, ...]]:
    """One small batch: what does not fit is found now, and dropout masks are drawn.

    Returns:
        The shape of each field per row.
    """
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(
        256, (3, channels, size, size), dtype=torch.uint8, generator=generator
    ).to(teacher.device)
    images = teacher.preprocessing(views)
    try:
        with torch.no_grad():
            given = teacher._forward(images)
    except Exception as error:  # whatever a network raises: an assertion about the size, say
        shape = "x".join(map(str, images.shape[1:]))
        halved = {str(p.dtype) for p in teacher.module.parameters()} - {"torch.float32"}
        advice = (
            f"Its weights are {', '.join(sorted(halved))}: make them float32 (module.float()); "
            "--precision chooses what is computed in"
            if halved
            else "Another size: --size (224, say)"
        )
        raise MismatchError(
            f"teacher {teacher.architecture} does not take images of {shape}, which its "
            f"preprocessing makes of the views: {type(error).__name__}: {error}. {advice}."
        ) from error
    outputs = read_outputs(teacher.architecture, given, ("logits", *teacher.fields), len(views))
    logits = outputs["logits"]
    if logits.ndim != 2:
        raise DataError(
            f"teacher {teacher.architecture}: expected logits (B, K), found shape "
            f"{tuple(logits.shape)}"
        )
    if teacher.class_map is None and logits.shape[1] != teacher.classes:
        raise MismatchError(
            f"teacher {teacher.architecture} gives {logits.shape[1]} logits, the dataset has "
            f"{teacher.classes} classes: choose another teacher, or give a class map (--class-map)"
        )
    if teacher.class_map is not None and (
        len(teacher.class_map) != teacher.classes or max(teacher.class_map) >= logits.shape[1]
    ):
        raise MismatchError(
            f"class map of {len(teacher.class_map)} classes up to the teacher's class "
            f"{max(teacher.class_map)}: the dataset has {teacher.classes} classes, "
            f"teacher {teacher.architecture} has {logits.shape[1]}, counted from 0"
        )
    if "pooled" in teacher.fields and (head := head_of(teacher.module)) is not None:
        _require_head(teacher, head, images, outputs)
    shapes = {name: tuple(values.shape[1:]) for name, values in outputs.items()}
    return shapes | {"logits": (teacher.classes,)}


@torch.no_grad()
def _require_head(
    teacher: Teacher, head: nn.Linear, images: Tensor, outputs: Mapping[str, Tensor]
) -> None:
    """Refuse a field `pooled` of which the head does not make the network's own logits."""
    who, pooled = f"teacher {teacher.architecture}", outputs["pooled"]
    if pooled.shape[1:] != (head.in_features,):
        raise DataError(
            f"{who}: expected pooled (B, {head.in_features}), the input of its head, found "
            f"{tuple(pooled.shape)}: give another field another name"
        )
    given = teacher.module(images)
    logits = read_outputs(teacher.architecture, given, ("logits",), len(images))["logits"]
    furthest = float((head(pooled) - logits).abs().max())
    if furthest > 1e-3 * float(logits.abs().max()):
        raise DataError(
            f"{who}: its head, on the field pooled, gives other logits than itself (by up to "
            f"{furthest:.3g}). pooled is the input of the linear layer `head`: give another field "
            "another name"
        )


def teacher_class_names(spec: str | Path) -> list[str] | None:
    """The names of a teacher's classes where its library knows them, for `load_class_map`."""
    name, _, source = str(spec).partition("@")
    prefix, _, rest = name.partition(":")
    if prefix != "torchvision" or not source or names_file(source):
        return None
    return torchvision_class_names(rest, source)


def mc_dropout(teacher: Teacher, seed: int) -> Teacher:
    """One posterior sample of a teacher: its dropout layers stay active, with fixed masks.

    The masks depend on the seed alone, not on the batch, so that rows of a store stay independent.
    Weights are shared with the teacher. Sample `seed` is the same network on every device.

    Raises:
        UsageError: the teacher has no active dropout layer.
    """
    return replace(teacher, module=fix_dropout(teacher.module, seed), dropout_seed=seed)
