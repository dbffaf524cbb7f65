"""Export in int8: how far it is from the float network, what its file holds, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import load_dataset
from kdcache.evaluation.agreement import agreement
from kdcache.runs import load_run_model
from tests.conftest import Result, Trained, needs

INT8 = ("--format", "onnx", "--quantize", "int8")


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An int8 file of the teacher, calibrated on 256 digits, and what the export returned."""
    needs("onnxruntime")
    needs("onnxscript")
    from kdcache.data.loading import DatasetSource
    from kdcache.deploying.int8 import export_int8

    out = tmp_path_factory.mktemp("int8") / "int8.onnx"
    model, source = load_run_model(trained.teacher), DatasetSource("digits")
    return out, export_int8(model, out, source, 256, trained.store)


def logits_of(file: Path, images: torch.Tensor, optimized: bool) -> torch.Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not optimized:  # the file as it is written: float arithmetic on rounded numbers
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options)
    return torch.from_numpy(np.asarray(session.run(None, {"images": images.numpy()})[0]))


def test_int8_is_close_to_float_and_a_third_of_its_size(
    exported: tuple[Path, Any], trained: Trained
) -> None:
    out, done = exported
    images = load_dataset("digits", "test").images
    assert images is not None
    model = load_run_model(trained.teacher)
    with torch.no_grad():
        expected = model.module(model.preprocessing(images))
    measured = agreement(logits_of(out, images, True), expected)
    assert done["agreement"]["kl"] == pytest.approx(measured["kl"], rel=1e-3)
    assert measured["kl"] < 2e-3
    assert measured["top1_agreement"] > 0.98
    assert out.stat().st_size == done["bytes"] < 0.45 * done["float_bytes"]
    assert done["int8"]["top1"] == pytest.approx(done["float"]["top1"], abs=0.02)
    lost, won = done["disagreements"]["lost"], done["disagreements"]["won"]
    difference = (done["float"]["top1"] - done["int8"]["top1"]) * done["samples"]
    assert lost - won == round(difference)
    # The store is of this very network, over augmented views.
    float_kl, int8_kl = (done[name]["teacher"]["kl"] for name in ("float", "int8"))
    assert float_kl < 1e-5 < int8_kl < 1e-2


def test_the_integers_of_the_processor_are_those_of_the_file(exported: tuple[Path, Any]) -> None:
    """What runs differs from the file's definition by less than the definition from float."""
    out, done = exported
    images = load_dataset("digits", "test").images
    assert images is not None
    run, defined = (logits_of(out, images, optimized) for optimized in (True, False))
    rounding = done["agreement"]["kl"]
    assert agreement(run, defined)["kl"] < 0.2 * rounding


def test_int8_of_a_wrong_range_is_named(trained: Trained, tmp_path: Path) -> None:
    """Calibrated on black images; the one calibrated on digits has no finding."""
    needs("onnxruntime")
    needs("onnxscript")
    from kdcache.checks.rules.smaller import int8_loss
    from kdcache.deploying.deploy import onnx_program, random_inputs
    from kdcache.deploying.exported import Packaged
    from kdcache.deploying.int8 import write_int8

    model, data = load_run_model(trained.teacher), load_dataset("digits", "test")
    assert data.images is not None
    packaged = Packaged(model.module, model.preprocessing).eval()
    program = onnx_program(packaged, random_inputs(model)[:2])
    write_int8(program, iter([torch.zeros(8, 1, 8, 8, dtype=torch.uint8)]), tmp_path / "sick.onnx")
    labels = torch.from_numpy(data.labels)
    with torch.no_grad():
        right = packaged(data.images).argmax(1) == labels
    sick = logits_of(tmp_path / "sick.onnx", data.images, True).argmax(1) == labels
    lost, won = int((right & ~sick).sum()), int((sick & ~right).sum())
    (finding,) = int8_loss(lost, won, len(labels), 8)
    assert finding.rule == "int8-loss"
    assert f"{lost} that float has right" in finding.message


def test_a_sound_int8_has_no_finding(exported: tuple[Path, Any]) -> None:
    assert exported[1]["findings"] == []


def test_weights_are_unsigned_with_a_scale_per_channel_and_logits_are_float(
    exported: tuple[Path, Any],
) -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(exported[0]).graph
    held = {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}
    source = {n.output[0]: n.input for n in graph.node if n.op_type == "DequantizeLinear"}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 9
    for node in convolutions:
        weight, scale = (held[name] for name in source[node.input[1]][:2])
        assert weight.dtype == np.uint8
        assert scale.shape == (weight.shape[0],)
    (last,) = (node for node in graph.node if "logits" in node.output)
    assert last.op_type == "Gemm"


def test_the_command_compares_with_the_teacher(
    trained: Trained, tmp_path: Path, kdcache: Any
) -> None:
    needs("onnxruntime")
    out = tmp_path / "int8.onnx"
    done: Result = kdcache("export", trained.teacher, *INT8, "--calibration", 64, "--out", out,
                           "--store", trained.store)  # fmt: skip
    assert done.code == 0, done.err
    assert out.exists()
    for words in ("KL(float | int8)", "KL(teacher | network)", "float alone is right"):
        assert words in done.out


def test_bad_input_is_refused(trained: Trained, tmp_path: Path, kdcache: Any) -> None:
    needs("onnxruntime")
    out = tmp_path / "int8.onnx"
    many: Result = kdcache("export", trained.teacher, *INT8, "--calibration", 10**6, "--out", out)
    assert many.code == 2
    assert "--calibration 1000000: digits has 1437 samples" in many.err
    odd = kdcache("export", trained.teacher, "--format", "onnx", "--quantize", "int4")
    assert odd.code == 2
    assert "int8" in odd.err
    plain = kdcache("export", trained.teacher, "--quantize", "int8")
    assert plain.code == 2
    assert "--format onnx" in plain.err
    assert not out.exists()


def test_other_data_is_refused(trained: Trained, tmp_path: Path, kdcache: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for file in trained.teacher.iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    config = (run / "config.toml").read_text()
    before, _, after = config.partition('fingerprint = "')
    (run / "config.toml").write_text(f'{before}fingerprint = "{"0" * 64}{after[64:]}')
    done: Result = kdcache("export", run, *INT8)
    assert done.code == 1
    assert "fingerprint 000000000000" in done.err
    assert "--data-root" in done.err


def test_an_absent_package_is_named(
    trained: Trained, tmp_path: Path, kdcache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    out = tmp_path / "int8.onnx"
    done: Result = kdcache("export", trained.teacher, *INT8, "--out", out)
    assert done.code == 2
    assert "kdcache[onnx]" in done.err
    assert not out.exists()
