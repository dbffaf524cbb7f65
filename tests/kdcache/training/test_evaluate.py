"""evaluate and export: against formulas and libraries that are not ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.special import log_softmax
from scipy.stats import spearmanr
from torch import nn

from kdcache import build_model, load_dataset
from kdcache.deploying.deploy import USAGE
from kdcache.evaluation.agreement import agreement
from kdcache.evaluation.cost import macs
from kdcache.evaluation.scores import calibration, fit_temperature, scores
from kdcache.preprocessing import Preprocessing
from kdcache.runs import load_run_model, read_config, read_summary
from kdcache.teachers.teacher import Teacher
from tests.conftest import Result, Trained, needs


def test_scores_are_those_of_the_definitions() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 7)) * 3, rng.integers(-1, 7, 200)
    known = labels >= 0
    z, y = logits[known], labels[known]
    p = np.exp(log_softmax(z, 1))
    order = np.argsort(-z, 1)
    confidence, right = p.max(1), order[:, 0] == y
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            ece += abs(confidence[inside].mean() - right[inside].mean()) * inside.mean()
    found = scores(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found["top1"] == pytest.approx(right.mean())
    assert found["top5"] == pytest.approx((order[:, :5] == y[:, None]).any(1).mean())
    assert found["nll"] == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), rel=1e-5)
    assert found["ece"] == pytest.approx(ece, rel=1e-4)


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(true: float) -> None:
    """Labels drawn from softmax(z) and logits T z: the best temperature is T up to sampling noise."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(20000, 5, generator=generator, dtype=torch.float64) * 2
    labels = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    found = fit_temperature(z * true, labels)
    assert found == pytest.approx(true, rel=0.03)
    # A stationary point of the likelihood: d/dT = 0.
    temperature = torch.tensor(found, dtype=torch.float64, requires_grad=True)
    nn.functional.cross_entropy(z * true / temperature, labels).backward()
    assert temperature.grad is not None
    assert abs(temperature.grad.item()) < 1e-4
    report = calibration(z * true, labels)
    assert report["calibrated_nll"] <= scores(z * true, labels)["nll"] + 1e-9


def test_agreement_against_scipy() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 40, 9))
    teacher[:, 3] = teacher[:, 4]  # ties
    found = agreement(torch.from_numpy(student), torch.from_numpy(teacher))
    p, q = log_softmax(teacher, 1), log_softmax(student, 1)
    assert found["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(1).mean())

    def zscore(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-7) / 2

    p, q = log_softmax(zscore(teacher), 1), log_softmax(zscore(student), 1)
    assert found["kl_standardized"] == pytest.approx((np.exp(p) * (p - q)).sum(1).mean())
    ranks = [spearmanr(a, b).statistic for a, b in zip(student, teacher, strict=True)]
    assert found["rank_correlation"] == pytest.approx(np.mean(ranks))
    assert found["std_ratio"] == pytest.approx((student.std(1) / teacher.std(1)).mean())
    same = (student.argmax(1) == teacher.argmax(1)).mean()
    assert found["top1_agreement"] == pytest.approx(same)


def test_macs_of_a_layer_by_hand() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Flatten(),
                           nn.Linear(8 * 16 * 16, 10))  # fmt: skip
    teacher = Teacher("by-hand", module, Preprocessing((0.5,) * 3, (0.5,) * 3), 10, "")
    views = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    assert macs(teacher, views) == 8 * 3 * 9 * 16 * 16 + 8 * 16 * 16 * 10


def test_evaluate_beside_its_teacher(trained: Trained, tmp_path: Path, kdcache: Any) -> None:
    store = tmp_path / "test.zarr"
    common = ("--dataset", "digits", "--device", "cpu")
    done: Result = kdcache("dump-teacher", *common, "--teacher", trained.teacher, "--views", 2,
                           "--split", "test", "--encoding", "float32", "--out", store, "-q")  # fmt: skip
    assert done.code == 0, done.err
    done = kdcache("evaluate", trained.teacher, *common, "--teacher", trained.teacher, "--store", store,
                   "--json")  # fmt: skip
    assert done.code == 0, done.err
    found, beside = done.json, done.json["teacher"]
    for name in ("top1", "nll", "parameters", "macs", "file_bytes", "calibrated_ece"):
        assert found[name] == beside[name] is not None
    assert 0 < found["latency_p50_ms"] <= found["latency_p95_ms"]
    assert found["parameters"] == sum(
        p.numel() for p in build_model("resnet8", 10, 1, 8).parameters()
    )
    said = found["agreement"]
    assert said["top1_agreement"] == 1
    assert said["kl"] == pytest.approx(0, abs=1e-6)
    assert said["rank_correlation"] == pytest.approx(1, abs=1e-3)
    assert (said["views"], said["samples"]) == (2, found["samples"])
    page = kdcache("evaluate", trained.teacher, *common, "--store", store)
    assert "same top-1" in page.out
    wrong = kdcache("evaluate", trained.teacher, *common, "--store", trained.store)
    assert wrong.code == 1
    assert "--split test" in wrong.err


def test_evaluate_bare_weights(trained: Trained, kdcache: Any) -> None:
    """A model's name and a file give what the run gives: the normalisation is the training set's."""
    common = ("--dataset", "digits", "--device", "cpu", "--json")
    file = trained.teacher / "model.safetensors"
    bare, run = (kdcache("evaluate", *spec, *common) for spec in
                 (("resnet8", "--weights", file), (trained.teacher,)))  # fmt: skip
    assert bare.code == 0, bare.err
    for name in ("top1", "nll", "file_bytes"):
        assert bare.json[name] == run.json[name]


OWN = """
from kdcache.models.zoo import build_model

def net(classes, channels, size):
    return build_model("resnet8", classes, channels, size)
"""


def test_a_network_of_ones_own_takes_its_preprocessing_as_given_or_from_its_store(
    trained: Trained, tmp_path: Path, kdcache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_net.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    weights, common = (
        trained.teacher / "model.safetensors",
        ("--dataset", "digits", "--device", "cpu"),
    )
    spec = f"own_net:net@{weights}"
    refused: Result = kdcache("evaluate", spec, *common)
    assert refused.code == 2
    assert "--mean and --std, or --normalize" in refused.err
    own = read_config(trained.teacher)["preprocessing"]
    mean, std = (str(own[name][0]) for name in ("mean", "std"))
    given = kdcache("evaluate", spec, *common, "--mean", mean, "--std", std, "--json")
    run = kdcache("evaluate", trained.teacher, *common, "--json")
    assert given.code == 0, given.err
    assert given.json["top1"] == run.json["top1"]
    assert given.json["preprocessing"] == run.json["preprocessing"]
    other = kdcache(
        "evaluate", spec, *common, "--mean", "0.4", "--std", "0.2", "--size", "16", "--json"
    )
    assert other.json["preprocessing"]["size"] == 16
    assert other.json["nll"] != run.json["nll"]
    done = kdcache("dump-teacher", *common, "--teacher", spec, "--out", "s.zarr", "--augment", "none",
                   "--mean", "0.4", "--std", "0.2", "--allow-untrained", "-q")  # fmt: skip
    assert done.code == 0, done.err
    for words in ((spec,), (trained.teacher, "--teacher", spec)):
        found = kdcache("evaluate", *words, *common, "--store", "s.zarr")
        assert found.code == 0, found.err
        assert "preprocessing of the store that it filled: mean 0.4, std 0.2" in found.err
        assert "no agreement measured" in found.err
    runs = kdcache("evaluate", trained.teacher, *common, "--normalize", "cifar10")
    assert runs.code == 2
    assert "a run states its own" in runs.err


def test_a_held_out_temperature_is_used(trained: Trained, tmp_path: Path, kdcache: Any) -> None:
    out = tmp_path / "run"
    done: Result = kdcache("train-student", "--store", trained.store, "--dataset", "digits", "--method",
                           "kd", "--student", "resnet8", "--out", out, "--train-samples", 100,
                           "--epochs", 1, "--val-split", 0.3, "--device", "cpu", "-q")  # fmt: skip
    assert done.code == 0, done.err
    summary = read_summary(out)
    assert summary["temperature_fitted_on"] == "held-out training samples"
    found = kdcache("evaluate", out, "--dataset", "digits", "--device", "cpu", "--json").json
    assert found["temperature"] == summary["temperature"]
    assert found["calibrated_nll"] == pytest.approx(summary["calibrated_nll"], rel=1e-5)
    assert found["temperature_fitted_on"] == "training samples held out in its run"


@pytest.mark.parametrize("form", ["torch-export", "safetensors", "onnx"])
def test_an_export_gives_the_same_logits(
    trained: Trained, tmp_path: Path, kdcache: Any, form: str
) -> None:
    if form == "onnx":
        needs("onnxruntime")
        needs("onnxscript")
    out = tmp_path / {"torch-export": "m.pt2", "onnx": "m.onnx"}.get(form, "m.safetensors")
    done: Result = kdcache("export", trained.teacher, "--format", form, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["bytes"] == out.stat().st_size
    model, images = load_run_model(trained.teacher), load_dataset("digits", "test").images
    assert images is not None
    with torch.no_grad():
        expected = model.module(model.preprocessing(images))
    files = {USAGE: ""}
    if form == "torch-export":
        found = torch.export.load(out, extra_files=files).module()(images)
    elif form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(out))
        files = session.get_modelmeta().custom_metadata_map
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    else:
        module = build_model("resnet8", 10, 1, 8)
        module.load_state_dict(load_file(out))
        with torch.no_grad():
            found = module.eval()(model.preprocessing(images))
        with safe_open(out, "pt") as file:
            files = file.metadata()
    use = json.loads(files[USAGE])
    assert use == done.json["use"]
    assert (use["mode"], use["height"], use["resize"], use["crop"]) == ("L", 8, 9, 8)
    assert use["classes"] == load_dataset("digits", "test").class_names
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_folder_of_runs_names_them(trained: Trained, tmp_path: Path, kdcache: Any) -> None:
    for seed in (0, 1):
        (tmp_path / f"kd-seed{seed}").mkdir()
        shutil.copy(trained.teacher / "config.toml", tmp_path / f"kd-seed{seed}")
    done: Result = kdcache("export", tmp_path)
    assert done.code == 1
    runs = ", ".join(str(tmp_path / f"kd-seed{seed}") for seed in (0, 1))
    assert f"{tmp_path} is not a run: it is a folder of runs. Give one of them: {runs}" in done.err


def test_onnx_absent_is_said(trained: Trained, tmp_path: Path, kdcache: Any,
                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    done: Result = kdcache(
        "export", trained.teacher, "--format", "onnx", "--out", tmp_path / "m.onnx"
    )
    assert done.code == 2
    assert "kdcache[onnx]" in done.err
    assert not (tmp_path / "m.onnx").exists()
