"""A trained network as an ONNX file of int8, by ONNX Runtime, compared with the float network.

Weights and activations have eight bits, weights with a scale per output channel, activations with the range
that they have on calibration rows. Both are unsigned: x86 processors without VNNI multiply unsigned by signed
bytes with saturating sums, and with ONNX Runtime's default types (signed weights) the logits of some networks
differ there from the file's own definition by several times what rounding does. Unsigned weights saturate on no
processor. The output of the last layer stays float, so that logits are no multiples of a step.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kdcache.augment.specs import make_augmentation
from kdcache.checks.rules.smaller import int8_loss
from kdcache.data.choice import choose
from kdcache.data.dataset import Dataset
from kdcache.data.loading import DatasetSource
from kdcache.deploying.deploy import USAGE, onnx_program, random_inputs, usage
from kdcache.deploying.exported import Packaged, load_exported
from kdcache.evaluation.agreement import agreement, agreement_with_store
from kdcache.evaluation.scores import CleanImages, scores
from kdcache.imports import require_package
from kdcache.runs import RunModel, trained_size, write_atomically
from kdcache_stores import MismatchError, UsageError, open_store
from kdcache_stores.objects.urls import require_local

#: Rows of a calibration unless told otherwise.
CALIBRATION = 512

Network = Callable[[Tensor], Tensor]


def export_int8(
    model: RunModel,
    out: str | os.PathLike[str],
    source: DatasetSource,
    calibration: int = CALIBRATION,
    store: str | os.PathLike[str] | None = None,
    augment: str | None = None,
) -> dict[str, Any]:
    """Write a trained network as an ONNX file of int8, run it, and compare it with the float network.

    Args:
        model: of `load_run_model`.
        out: the file.
        source: the data that the network was trained on.
        calibration: how many training samples, as many of each class as possible and without
            augmentation, the ranges of the activations are measured on.
        store: logits of a teacher; both networks are compared with it on its views.
        augment: the store's augmentation, where it is a user's own.

    Returns:
        file, format, quantized ("int8"), bytes, float_bytes (of the same file in float32), calibration_samples,
        split and samples of the comparison; "float" and "int8", each with top1, top5, nll and ece, and with a
        store "teacher" (`agreement_with_store`); "agreement" of the int8 with the float network, and
        "disagreements": samples where float alone is right ("lost") and where int8 alone is ("won"), and
        "findings", of `int8_loss`.

    Raises:
        UsageError: the packages of the extra `onnx` are not there, or the dataset has fewer samples.
        MismatchError: the data is not what the network was trained on.
    """
    out = Path(require_local(out))
    trainset, testset = source.load("train"), source.load("test")
    _require_same_data(model, trainset)
    if calibration > len(trainset):
        raise UsageError(
            f"--calibration {calibration}: {trainset.name} has {len(trainset)} samples."
        )
    packaged = Packaged(model.module, model.preprocessing).eval()
    size = trained_size(model.config["model"])
    program, use = onnx_program(packaged, random_inputs(model)[:2]), usage(model)
    program.metadata_props.add(key=USAGE, value=json.dumps(use))
    rows, _ = choose(trainset, calibration, 0.0, seed=0)
    clean = CleanImages(trainset, rows, size, workers=source.workers)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_int8(program, (images for images, _ in clean.batches()), out)
    networks: dict[str, Network] = {
        "float": packaged,
        "int8": load_exported(out, form="onnx").logits,
    }
    tested = CleanImages(testset, None, size, workers=source.workers)
    outputs = dict(zip(networks, tested.logits_of(list(networks.values())), strict=True))
    right = {name: logits.argmax(1) == labels for name, (logits, labels) in outputs.items()}
    (float_logits, labels), (int8_logits, _) = outputs["float"], outputs["int8"]
    results: dict[str, Any] = {name: dict(scores(*each)) for name, each in outputs.items()}
    if store is not None:
        for name, compared in _with_store(networks, source, store, augment).items():
            results[name]["teacher"] = compared
    known = int((labels >= 0).sum())
    lost = int((right["float"] & ~right["int8"]).sum())
    won = int((right["int8"] & ~right["float"]).sum())
    return {
        "file": str(out),
        "format": "onnx",
        "quantized": "int8",
        "bytes": out.stat().st_size,
        "float_bytes": program.ByteSize(),
        "calibration_samples": calibration,
        "split": testset.split,
        "samples": len(labels),
        **results,
        "agreement": agreement(int8_logits, float_logits),
        "disagreements": {"lost": lost, "won": won},
        "use": use,
        "findings": [f.to_dict() for f in int8_loss(lost, won, known, calibration)],
    }


def _require_same_data(model: RunModel, trainset: Dataset) -> None:
    own = model.config["data"].get("fingerprint")
    if own != trainset.fingerprint:
        raise MismatchError(
            f"{model.file.parent} was trained on samples of fingerprint {str(own)[:12]}, {trainset.name} has "
            f"{trainset.fingerprint[:12]}: give the --data-root of the run's own data."
        )


def _with_store(
    networks: Mapping[str, Network],
    source: DatasetSource,
    store: str | os.PathLike[str],
    augment: str | None,
) -> dict[str, dict[str, float]]:
    """How far each network agrees with the teacher of a store, on its views."""
    with open_store(store) as held:
        views_of = source.load(held.plan.split)
        own = make_augmentation(augment, views_of) if augment else None
        return {
            name: agreement_with_store(
                network, views_of, held, workers=source.workers, augmentation=own
            )
            for name, network in networks.items()
        }


def write_int8(program: Any, batches: Iterator[Tensor], out: Path) -> None:
    """Write an ONNX model of float32 as one of int8.

    Args:
        program: a ModelProto with one input.
        batches: inputs (B, ...) that the ranges of the activations are measured on.
        out: the file.

    Raises:
        UsageError: the packages of the extra `onnx` are not there.
    """
    try:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise require_package("--quantize int8", "onnx", error) from None
    name = program.graph.input[0].name

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        """What the quantizer asks for its inputs."""

        def get_next(self) -> dict[str, Any] | None:
            """The next batch by the name of the input; None after the last."""
            batch = next(batches, None)
            return None if batch is None else {name: batch.cpu().numpy()}

    with tempfile.TemporaryDirectory() as folder:
        names = ("float.onnx", "prepared.onnx", "int8.onnx")
        floats, prepared, quantized = (Path(folder) / name for name in names)
        floats.write_bytes(program.SerializeToString())
        quant_pre_process(floats, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantized,
            Batches(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QUInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        whole = onnx.load_model(quantized)
        del whole.metadata_props[:]
        whole.metadata_props.extend(program.metadata_props)
        content = whole.SerializeToString()
    write_atomically(out, lambda stream: stream.write(content))
