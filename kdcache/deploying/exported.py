"""A file of `kdcache export` as something that runs: uint8 images, or other items, in, logits out."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kdcache.data.item import Item
from kdcache.imports import require_package
from kdcache.models.taps import as_fields
from kdcache.preprocessing import Inputs, inputs_from_dict
from kdcache.runs import build, trained_size
from kdcache_stores import DataError, UnknownName
from kdcache_stores.objects.urls import require_local

#: The usual ending of each format's file.
SUFFIXES = {"torch-export": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors"}


class Packaged(nn.Module):
    """A network with its preprocessing: uint8 (N, C, H, W), or items, -> float32 logits (N, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Inputs) -> None:
        super().__init__()
        self.network, self.preprocessing = network, preprocessing
        if isinstance(preprocessing, Item):
            return
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images as they are stored."""
        if not isinstance(self.preprocessing, Item):
            images = (images.float() / 255 - self.mean) / self.std
        return as_fields(self.network(images))["logits"]

    @property
    def input_name(self) -> str:
        """What an exported program calls its input."""
        return "items" if isinstance(self.preprocessing, Item) else "images"


@dataclass(frozen=True)
class Exported:
    """A file that runs.

    Attributes:
        file: where it lies.
        runtime: what runs it: "torch" or "ONNX Runtime".
        dtype: of its weights: "float32" or "int8".
        example: one input (1, *shape).
        logits: inputs (N, *shape) as they are stored -> float32 logits (N, K), on the CPU.
        parameters: numbers that the training found.
        macs: multiply-adds of one input, where the file's graph has them; else count what torch runs.
    """

    file: Path
    runtime: str
    dtype: str
    example: Tensor
    logits: Callable[[Tensor], Tensor]
    parameters: int
    macs: int | None = None


def load_exported(
    file: str | os.PathLike[str], allow_code: bool = False, form: str | None = None
) -> Exported:
    """What `kdcache export` wrote, ready to run.

    Args:
        file: where it lies.
        allow_code: import the user's own network that a .safetensors file names.
        form: a key of `SUFFIXES`; None: by the ending of the file's name.

    Raises:
        UnknownName: another ending.
        DataError: no such file, or not one that `kdcache export` wrote.
        UsageError: ONNX without its packages; a network of a user's own and no ``allow_code``.
    """
    file = Path(require_local(file))
    if not file.is_file():
        raise DataError(f"{file}: there is no such file. Make one with: kdcache export RUN")
    if form is None and file.suffix not in SUFFIXES.values():
        raise UnknownName("ending of an exported file", file.suffix, SUFFIXES.values())
    form = form or next(name for name, suffix in SUFFIXES.items() if suffix == file.suffix)
    return LOADERS[form](file, allow_code)


def _program(file: Path, allow_code: bool) -> Exported:
    try:
        program = torch.export.load(file)
    except Exception as error:  # a damaged archive raises many kinds
        raise DataError(
            f"{file} is no program of torch.export ({error}); export it again."
        ) from error
    if program.example_inputs is None or len(program.example_inputs[0]) != 1:
        raise DataError(
            f"{file} is no export of kdcache, whose programs keep one example of their input."
        )
    (examples,) = program.example_inputs[0]
    module = program.module()
    dtypes = {t.dtype for t in program.state_dict.values()} | {
        t.dtype for t in program.constants.values() if isinstance(t, Tensor)
    }

    @torch.no_grad()
    def logits(inputs: Tensor) -> Tensor:
        given: Tensor = module(inputs)
        return given

    return Exported(
        file, "torch", "int8" if torch.int8 in dtypes else "float32", examples[:1],
        logits, sum(p.numel() for p in module.parameters()),
    )  # fmt: skip


def _safetensors(file: Path, allow_code: bool) -> Exported:
    try:
        with safetensors.safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
        spec, preprocessing = (json.loads(header[name]) for name in ("model", "preprocessing"))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            f"{file} is no export of kdcache ({error!r}): its header must name the model and its "
            "preprocessing. Make one with: kdcache export RUN --format safetensors"
        ) from error
    network = build(spec, allow_code)
    network.load_state_dict(safetensors.torch.load_file(file))
    inputs = inputs_from_dict(preprocessing)
    packaged = Packaged(network, inputs).eval()
    if isinstance(inputs, Item):
        example = inputs.examples(1, network)
    else:
        side = trained_size(spec) or ()
        example = torch.zeros(1, spec["channels"], *side, dtype=torch.uint8)

    @torch.no_grad()
    def logits(images: Tensor) -> Tensor:
        given: Tensor = packaged(images)
        return given

    count = sum(p.numel() for p in network.parameters())
    return Exported(file, "torch", "float32", example, logits, count)


def _onnx(file: Path, allow_code: bool) -> Exported:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise require_package(f"running {file.name}", "onnx", error) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        model = onnx.load(file)
    except Exception as error:  # of classes that onnxruntime keeps to itself
        raise DataError(f"{file} is no model of ONNX ({error}); export it again.") from error
    (taken, *more), (given, *_) = session.get_inputs(), session.get_outputs()
    if more or len(taken.shape) < 2:
        raise DataError(
            f"{file} takes {[i.name for i in session.get_inputs()]}: expected one input, images or items, "
            "as of `kdcache export --format onnx`."
        )

    def logits(inputs: Tensor) -> Tensor:
        values = session.run([given.name], {taken.name: inputs.numpy()})[0]
        return torch.from_numpy(np.asarray(values))

    example = torch.zeros(1, *taken.shape[1:], dtype=_DTYPES.get(taken.type, torch.float32))
    parameters, macs = _counted(model, taken.name)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    weights = "int8" if quantized else "float32"
    return Exported(file, "ONNX Runtime", weights, example, logits, parameters, macs)


_DTYPES = {"tensor(uint8)": torch.uint8, "tensor(int64)": torch.int64}


def _counted(model: Any, name: str) -> tuple[int, int]:
    """Numbers in the weights and biases of an ONNX model's layers, and multiply-adds of one input.

    Args:
        model: a ModelProto, which is changed.
        name: of its input.
    """
    from onnx.shape_inference import infer_shapes

    for value in model.graph.input:
        if value.name == name:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]  # what was inferred for any number of inputs
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = infer_shapes(model).graph
    shapes: dict[str, tuple[int, ...]] = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input, *graph.output)
    } | {weight.name: tuple(weight.dims) for weight in graph.initializer}
    weights = {weight.name for weight in graph.initializer}
    scaled = {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"
    }
    held = Counter[str]()
    macs = 0
    for node in graph.node:
        if node.op_type == "Gather" and scaled.get(node.input[0], node.input[0]) in weights:
            table = scaled.get(node.input[0], node.input[0])  # of an embedding
            held[table] = math.prod(shapes[table])
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        for source in (scaled.get(each, each) for each in node.input[1:]):
            if source in weights:
                held[source] = math.prod(shapes[source])
        outputs, weight = math.prod(shapes[node.output[0]]), shapes[node.input[1]]
        if node.op_type == "Conv":
            macs += outputs * math.prod(weight[1:])
        else:
            macs += outputs * shapes[node.input[0]][-1]
    return held.total(), macs


LOADERS: Mapping[str, Callable[[Path, bool], Exported]] = {
    "torch-export": _program,
    "onnx": _onnx,
    "safetensors": _safetensors,
}
