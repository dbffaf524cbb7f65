"""A trained network as a file for others to run: from uint8 images to logits, without kdcache.

What is exported takes images as they are stored (uint8, (N, C, H, W), any N) and normalises them itself,
so nobody has to know mean and std; or items that are no images, as their dataset holds them. Each export is
run on random images, or items, before it counts as done.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from kdcache.data.item import Item
from kdcache.deploying.exported import Packaged, load_exported
from kdcache.evaluation.scores import resized
from kdcache.imports import require_package
from kdcache.runs import SUMMARY, RunModel, read_summary, trained_size, write_atomically
from kdcache_stores import DataError, UnknownName
from kdcache_stores.objects.urls import require_local

#: Largest difference between a logit of the export and of the network, relative to the largest logit.
TOLERANCE = 1e-4

#: What the file calls the JSON of `usage`: an extra file of a .pt2, metadata of the other formats.
USAGE = "kdcache.json"


def export(model: RunModel, form: str, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Write a trained network to a file and check it by running the file.

    Args:
        model: of `load_run_model`.
        form: a key of `FORMATS`.
        out: the file.

    Returns:
        file, format, bytes, dtype and input (shape with "N"), and max_difference, the largest difference
        of a logit between the file and the network on eight random inputs; and "use", see `usage`.

    Raises:
        UnknownName: no such format.
        UsageError: ONNX without its packages.
        DataError: the file does not give the network's logits.
    """
    if form not in FORMATS:
        raise UnknownName("format", form, FORMATS)
    out = Path(require_local(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    use = usage(model)
    packaged = Packaged(model.module, model.preprocessing).eval()
    images = random_inputs(model)
    with torch.no_grad():
        expected = packaged(images)
    FORMATS[form](packaged, images[:2], model, out, json.dumps(use))
    run = load_exported(out, allow_code=True, form=form).logits  # its code ran when it was loaded
    # Another number of images than the export saw: a frozen batch size would show.
    logits = torch.cat([run(images[:5]), run(images[5:])])
    difference = (logits - expected).abs().max().item()
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        out.unlink(missing_ok=True)
        raise DataError(
            f"the export to {out} gives logits that differ by up to {difference:.2g} from the "
            f"network's; it was removed. Choose another format of {', '.join(FORMATS)}."
        )
    return {
        "file": str(out),
        "format": form,
        "bytes": out.stat().st_size,
        "dtype": str(images.dtype).removeprefix("torch."),
        "input": ["N", *images.shape[1:]],
        "max_difference": difference,
        "use": use,
    }


def usage(model: RunModel) -> dict[str, Any]:
    """How to use an exported network; the file holds it as JSON, named `USAGE`.

    Returns:
        preparation: in words, how images were prepared when the network was tested; for images also
        channels, mode ("RGB", "L" for grey, as Pillow calls them; None of other numbers of channels), height,
        width, and where they are square, resize and crop: sides in pixels for images of another size.
        classes: the names in the order of the logits, None where they are not known.
    """
    summary = model.file.parent / SUMMARY
    names = read_summary(model.file.parent, ()).get("class_names") if summary.is_file() else None
    shape = trained_size(model.config["model"])
    if shape is None:
        known: dict[str, Any] = {"preparation": f"{model.preprocessing}, as the dataset holds them"}
        return known | {"classes": names}
    height, width = shape
    channels = model.config["model"]["channels"]
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    known = {
        "preparation": f"{kind} images of {height}x{width} pixels as they are",
        "channels": channels,
        "mode": {1: "L", 3: "RGB"}.get(channels),
        "height": height,
        "width": width,
    }
    if height == width:
        known |= {"resize": resized(width), "crop": width}
        known["preparation"] += (
            f"; of others the shorter side resized to {known['resize']} pixels (bilinear, antialiased), then "
            f"the central {width}x{width}"
        )
    return known | {"classes": names}


def random_inputs(model: RunModel) -> Tensor:
    """Eight images as they are stored, or other items."""
    if isinstance(model.preprocessing, Item):
        return model.preprocessing.examples(8, model.module)
    spec, size = model.config["model"], trained_size(model.config["model"])
    assert size is not None
    generator = torch.Generator().manual_seed(0)
    shape = (8, spec["channels"], *size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _torch_export(
    packaged: Packaged, example: Tensor, model: RunModel, out: Path, use: str
) -> None:
    batch = torch.export.Dim("N", min=1)
    program = torch.export.export(packaged, (example,), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()  # its writer goes back in the file, and dies of an error under it
    torch.export.save(program, buffer, extra_files={USAGE: use})
    write_atomically(out, lambda stream: stream.write(buffer.getbuffer()))


def _onnx(packaged: Packaged, example: Tensor, model: RunModel, out: Path, use: str) -> None:
    program = onnx_program(packaged, example)
    program.metadata_props.add(key=USAGE, value=use)
    content = program.SerializeToString()
    write_atomically(out, lambda stream: stream.write(content))


def onnx_program(packaged: Packaged, example: Tensor) -> Any:
    """The network as a ModelProto of ONNX that takes any number of inputs.

    Raises:
        UsageError: without the packages of the extra `onnx`.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise require_package("--format onnx", "onnx", error) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own insides
        program = torch.onnx.export(
            packaged,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
            input_names=[packaged.input_name],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _safetensors(packaged: Packaged, example: Tensor, model: RunModel, out: Path, use: str) -> None:
    state = {name: tensor.contiguous() for name, tensor in model.module.state_dict().items()}
    header = {
        "format": "pt",
        "model": json.dumps(model.config["model"]),
        "preprocessing": json.dumps(model.preprocessing.to_dict()),
        USAGE: use,
    }
    blob = safetensors.torch.save(state, header)
    write_atomically(out, lambda stream: stream.write(blob))


#: Name -> function that writes the file, with the JSON of `usage`.
FORMATS: dict[str, Callable[[Packaged, Tensor, RunModel, Path, str], None]] = {
    "torch-export": _torch_export,
    "onnx": _onnx,
    "safetensors": _safetensors,
}
