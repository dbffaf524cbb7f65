"""compare: runs and exported files in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache import build_model, load_dataset
from kdcache.data.item import Item
from kdcache.data.loading import DatasetSource
from kdcache.deploying.deploy import export, onnx_program
from kdcache.deploying.exported import Packaged, load_exported
from kdcache.evaluation.comparison import compare
from kdcache.runs import load_run_model
from tests.conftest import Result, Trained, needs

HERE = ("--dataset", "digits", "--threads", 1)
MACS = 763_520  # of a resnet8 at 8 x 8 in grey: what torch counts as it runs


def exported(trained: Trained, folder: Path, form: str, name: str) -> Path:
    export(load_run_model(trained.teacher), form, folder / name)
    return folder / name


def test_a_run_and_a_file_beside_their_teacher(
    trained: Trained, tmp_path: Path, kdcache: Any
) -> None:
    file = exported(trained, tmp_path, "safetensors", "net.safetensors")
    done: Result = kdcache("compare", file, *HERE, "--teacher", trained.teacher, "--repeats", 3,
                           "--batch-size", 1, "--batch-size", 7, "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert (done.json["threads"], done.json["samples"]) == (1, 360)
    teacher, same = done.json["networks"]
    assert [teacher["teacher"], same["teacher"]] == [True, False]
    alone = kdcache("evaluate", trained.teacher, *HERE, "--device", "cpu", "--json").json
    parameters = sum(p.numel() for p in build_model("resnet8", 10, 1, 8).parameters())
    for row in (teacher, same):
        assert (row["runtime"], row["dtype"]) == ("torch", "float32")
        assert (row["parameters"], row["macs"]) == (parameters, MACS)
        for name in ("top1", "top5", "nll", "ece", "temperature", "calibrated_ece"):
            assert row[name] == pytest.approx(alone[name], rel=1e-4)
        assert row["agreement"]["top1_agreement"] == 1
        assert row["agreement"]["kl"] == pytest.approx(0, abs=1e-6)
        assert list(row["latency"]) == ["1", "7"]
        for times in row["latency"].values():
            assert 0 < times["latency_p50_ms"] <= times["latency_p95_ms"]
    assert teacher["file_bytes"] == (trained.teacher / "model.safetensors").stat().st_size
    assert same["file_bytes"] == file.stat().st_size


def test_the_page(trained: Trained, tmp_path: Path, kdcache: Any) -> None:
    out = tmp_path / "page"
    done: Result = kdcache("compare", trained.teacher, *HERE, "--repeats", 1, "--out", out)
    assert done.code == 0, done.err
    assert "threads: 1" in done.out
    assert "763,520" in done.out
    assert "same top-1" not in done.out  # nobody to agree with
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "763,520" in page
    (_, line) = (out / "size-and-accuracy.csv").read_text().splitlines()
    weights = (trained.teacher / "model.safetensors").stat().st_size
    assert line.split(",")[-1] == str(weights)


def test_a_store_stands_for_the_teacher(trained: Trained) -> None:
    source = DatasetSource("digits")
    table = compare(
        [str(trained.teacher)], source, "train", store=trained.store, batch_sizes=(1,), repeats=1
    )
    assert table["networks"][0]["agreement"]["views"] == 4
    assert table["networks"][0]["agreement"]["kl"] == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_compared(trained: Trained, tmp_path: Path, kdcache: Any) -> None:
    run = trained.teacher
    bad, other = tmp_path / "net.onnx2", tmp_path / "net.safetensors"
    bad.write_bytes(b"x")
    other.write_bytes(b"x" * 64)
    for words, code, text in (
        ((run, f"{run}/"), 2, "each a single time"),
        ((bad,), 2, "unknown ending of an exported file '.onnx2'"),
        ((other,), 1, "its header must name the model"),
        ((tmp_path / "gone.onnx",), 1, "no such"),
        ((run, "--store", trained.store), 1, "--split test"),
    ):
        done: Result = kdcache("compare", *words, *HERE)
        assert done.code == code, (words, done.err)
        assert text in done.err


@pytest.mark.parametrize("form", ["torch-export", "onnx"])
def test_costs_are_read_from_the_file(trained: Trained, tmp_path: Path, form: str) -> None:
    if form == "onnx":
        needs("onnxruntime")
        needs("onnxscript")
    name = {"onnx": "net.onnx", "torch-export": "net.pt2"}[form]
    exported(trained, tmp_path, form, name)
    table = compare([str(tmp_path / name)], DatasetSource("digits"), batch_sizes=(1,), repeats=1)
    (row,) = table["networks"]
    network = build_model("resnet8", 10, 1, 8)
    counts = sum(p.numel() for p in network.parameters())
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    # ONNX files have batch norms folded into the convolutions, which have a bias then.
    folded = sum(norm.weight.numel() for norm in norms)
    assert row["parameters"] == (counts - folded if form == "onnx" else counts)
    assert row["macs"] == MACS
    assert row["runtime"] == ("ONNX Runtime" if form == "onnx" else "torch")
    images = load_dataset("digits", "test").images
    assert images is not None
    assert load_exported(tmp_path / name).logits(images).shape == (360, 10)


class Bag(torch.nn.Module):
    """The mean of the embeddings of some tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, 3) of tokens (B, T)."""
        logits: torch.Tensor = self.head(self.embedding(tokens).mean(1))
        return logits


def test_an_embedding_counts_in_float_and_in_int8(tmp_path: Path) -> None:
    needs("onnxruntime")
    needs("onnxscript")
    from kdcache.deploying.int8 import write_int8

    tokens = torch.randint(50, (16, 6))
    program = onnx_program(Packaged(Bag(), Item("int64", (6,))).eval(), tokens[:2])
    (tmp_path / "float.onnx").write_bytes(program.SerializeToString())
    write_int8(program, iter([tokens]), tmp_path / "int8.onnx")
    for name in ("float", "int8"):
        file = load_exported(tmp_path / f"{name}.onnx")
        assert (file.dtype, file.parameters, file.macs) == (
            "float32" if name == "float" else "int8", 50 * 8 + 8 * 3 + 3, 8 * 3,
        )  # fmt: skip
        assert file.logits(tokens).shape == (16, 3)
