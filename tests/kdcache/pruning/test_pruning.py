"""Pruned students: what goes, when, and that every later command builds them again."""

from __future__ import annotations

import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdcache import build_model, train
from kdcache.checks.check import CheckRequest, check_stores
from kdcache.pruning.narrowing import narrow, widths_of
from kdcache.pruning.request import PruneRequest
from kdcache.report.collect import grouped, read_run
from kdcache.runs import load_run_model, read_summary
from kdcache.training.observer import Unwatched
from kdcache_stores import DataError, MismatchError, UsageError
from tests.conftest import Result, Trained, needs
from tests.kdcache.training.job import training

KD = {"method": "kd"}


def how(trained: Trained, prune: str, **options: Any) -> dict[str, Any]:
    """A small student by KD from the teacher's weights; parts go in the first two of three epochs."""
    return {
        "stores": [str(trained.store)],
        "model": "resnet8",
        "objective": KD,
        "prune": prune,
        "prune_epochs": 2,
        "init_weights": str(trained.teacher / "model.safetensors"),
        "optimization": {"epochs": 3, "batch_size": 25, "lr": 0.01},
    } | options


class Stop(Unwatched):
    """Interrupts in the third epoch."""

    def step(self, epoch: int, done: int, total: int) -> None:
        if (epoch, done) == (3, 2):
            raise KeyboardInterrupt


def test_most_goes_in_the_first_epochs() -> None:
    request = PruneRequest.parse("structured:0.5", "magnitude", None, 12)
    assert request.epochs == 4
    parts = [request.ratio_after(epochs) for epochs in range(14)]
    assert parts[0] == 0
    assert parts[1] == pytest.approx(0.5 * (1 - 0.75**3))
    assert parts[4:] == [0.5] * 10
    steps = [after - before for before, after in pairwise(parts)]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize(
    ("text", "by", "epochs", "message"),
    [
        ("half", "magnitude", None, "structured, unstructured"),
        ("structured:1", "magnitude", None, "between 0 and 1"),
        ("structured:x", "magnitude", None, "between 0 and 1"),
        ("unstructured:0.5", "luck", None, "gradient, magnitude"),
        ("unstructured:0.5", "gradient", 9, "8 epochs"),
    ],
)
def test_what_is_no_request(text: str, by: str, epochs: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PruneRequest.parse(text, by, epochs, 8)


def test_a_narrower_network_has_the_widths_of_the_table() -> None:
    network = build_model("resnet8", 10, 1, 8)
    full = widths_of(network)
    narrow(network, {"conv1": [5, 1, 1], "bn1": [5]})
    assert {name for name, widths in widths_of(network).items() if widths != full[name]} == {
        "conv1", "bn1",
    }  # fmt: skip
    assert isinstance(network.conv1, nn.Conv2d)
    assert network.conv1.weight.shape == (5, 1, 3, 3)
    assert network.bn1.running_mean.shape == (5,)


@pytest.mark.parametrize(
    "widths",
    [
        {"gone": [1]},
        {"conv1": [0, 1, 1]},
        {"conv1": [10**9, 1, 1]},
        {"conv1": [4, 1]},
        {"conv1": "4"},
        {"conv1": [True, 1, 1]},
        {"bn1": [4.0]},
        {"layer1.0.conv1": [3, 3, 2]},
    ],
)
def test_a_table_of_other_widths_is_refused(widths: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        narrow(build_model("resnet8", 10, 1, 8), widths)


@pytest.mark.parametrize("by", ["magnitude", "gradient"])
def test_single_weights_go_to_zero_and_stay(trained: Trained, tmp_path: Path, by: str) -> None:
    run = train(training(how(trained, "unstructured:0.8", prune_by=by)), tmp_path / "run")
    state = load_file(run.path / "model.safetensors")
    assert state.keys() == build_model("resnet8", 10, 1, 8).state_dict().keys()
    kernels = [t for name, t in state.items() if t.ndim > 1]
    zeros = sum(int((t == 0).sum()) for t in kernels)
    assert zeros == pytest.approx(0.8 * sum(t.numel() for t in kernels), abs=3)
    summary = read_summary(run.path, ())
    assert summary["nonzero_parameters"] == summary["parameters"] - zeros
    if by == "magnitude":
        with pytest.raises(KeyboardInterrupt):
            train(training(how(trained, "unstructured:0.8")), tmp_path / "cut", Stop())
        cut = train(training(how(trained, "unstructured:0.8")), tmp_path / "cut")
        assert (cut.path / "model.safetensors").read_bytes() == (
            run.path / "model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("by", ["magnitude", "gradient"])
def test_channels_go_with_what_depends_on_them(trained: Trained, tmp_path: Path, by: str) -> None:
    needs("torch_pruning")
    run = train(training(how(trained, "structured:0.5", prune_by=by)), tmp_path / "run")
    widths = tomllib.loads((run.path / "config.toml").read_text())["model"]["widths"]
    full = widths_of(build_model("resnet8", 10, 1, 8))
    model = load_run_model(run.path).module
    for name, (outputs, *_) in widths_of(model).items():
        half = full[name][0] if name == "fc" else full[name][0] // 2
        assert outputs == half
    assert {n: w for n, w in widths_of(model).items() if w != full[n]} == widths
    assert widths["layer3.0.conv2"] == [32, 32, 1]
    assert read_summary(run.path, ())["parameters"] == sum(p.numel() for p in model.parameters())
    with pytest.raises(KeyboardInterrupt):
        train(training(how(trained, "structured:0.5", prune_by=by)), tmp_path / "cut", Stop())
    torch.manual_seed(99)
    cut = train(training(how(trained, "structured:0.5", prune_by=by)), tmp_path / "cut")
    assert (cut.path / "model.safetensors").read_bytes() == (
        run.path / "model.safetensors"
    ).read_bytes()


def test_another_ratio_is_another_run_and_is_named(trained: Trained, tmp_path: Path) -> None:
    needs("torch_pruning")
    options = how(trained, "structured:0.5", optimization={"epochs": 1, "batch_size": 25})
    train(training(options | {"prune_epochs": 1}), tmp_path / "half")
    with pytest.raises(
        MismatchError, match=r"training.prune was 'structured:0.5', now 'structured"
    ):
        train(
            training(options | {"prune": "structured:0.25", "prune_epochs": 1}), tmp_path / "half"
        )
    plain = options | {"prune": None, "prune_epochs": None}
    train(training(plain), tmp_path / "whole")
    groups = grouped([read_run(tmp_path / name) for name in ("half", "whole")])
    assert [group.label for group in groups] == ["kd structured:0.5", "kd"]


def test_the_gradient_chooses_what_the_loss_needs_least(trained: Trained, tmp_path: Path) -> None:
    """Channels that the head ignores have large weights and no gradient."""
    needs("torch_pruning")
    from kdcache.pruning.structured import ChannelPruner

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(4, 10))  # fmt: skip
    images = torch.randn(8, 1, 8, 8)
    with torch.no_grad():
        network[0].weight[:2] *= 10
        network[4].weight[:, :2] = 0
    network(images).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
    kept = network[0].weight[2:].clone()
    ChannelPruner("tiny", network, images[:2]).prune(network, 0.5, "gradient", gradients)
    torch.testing.assert_close(network[0].weight, kept)


def test_every_later_command_builds_it_again(
    trained: Trained, tmp_path: Path, kdcache: Any
) -> None:
    needs("torch_pruning")
    run, common = tmp_path / "run", ("--dataset", "digits", "--device", "cpu")
    done: Result = kdcache("train-student", *common, "--student", "resnet8", "--store", trained.store,
                           "--method", "kd", "--prune", "structured:0.5", "--epochs", 2,
                           "--train-samples", 200, "--out", run, "--json")  # fmt: skip
    assert done.code == 0, done.err
    parameters = done.json["parameters"]
    assert parameters < 0.3 * sum(p.numel() for p in build_model("resnet8", 10, 1, 8).parameters())
    found = kdcache("evaluate", run, *common, "--json").json
    assert (found["parameters"], found["top1"]) == (parameters, done.json["last_top1"])
    assert found["macs"] < 0.3 * 763_520
    for form in ("torch-export", "safetensors"):
        out = kdcache("export", run, "--format", form, "--json")
        assert out.code == 0, out.err
        table = kdcache(
            "compare", out.json["file"], "--dataset", "digits", "--repeats", 1, "--json"
        )
        (row,) = table.json["networks"]
        assert (row["parameters"], row["macs"]) == (parameters, found["macs"])
        assert row["top1"] == pytest.approx(found["top1"], abs=1e-6)
    store = tmp_path / "s.zarr"
    dumped = kdcache("dump-teacher", *common, "--teacher", run, "--views", 1, "--out", store,
                     "--allow-untrained", "-q")  # fmt: skip
    assert dumped.code == 0, dumped.err
    taught = kdcache("train-student", *common, "--student", "resnet8", "--store", store, "--method", "kd",
                     "--online", run, "--epochs", 1, "--train-samples", 50, "--out", tmp_path / "n",
                     "-q")  # fmt: skip
    assert taught.code == 0, taught.err


def test_what_cannot_be_pruned_is_named(trained: Trained, tmp_path: Path) -> None:
    needs("torch_pruning")
    for options, message in (
        (
            {"prune": "structured:0.99"},
            "leaves conv1 of resnet8 no channel of 16: give 0.938 at most",
        ),
        ({"model": "ShuffleV2", "init_weights": None}, "cannot trace ShuffleV2"),
        (
            {"model": f"{__name__}:counting", "init_weights": None},
            r"fails in second \(RuntimeError",
        ),
        ({"model": f"{__name__}:convolutional", "init_weights": None}, "come from no linear layer"),
    ):
        with pytest.raises(UsageError, match=message):
            train(training(how(trained, "structured:0.5") | options), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 0.9}, "--ema"),
        ({"compile": True}, "--compile"),
        ({"graph": True}, "--graph"),
        ({"objective": {"method": "rkd"}}, "reads pooled of the student"),
    ],
)
def test_what_would_not_notice_is_refused(
    trained: Trained, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        training(how(trained, "structured:0.5", **options))


def test_an_absent_package_is_named(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(UsageError, match=r"kdcache\[prune\]"):
        train(training(how(trained, "structured:0.5")), tmp_path / "run")


class Counting(nn.Module):
    """A network whose forward pass counts on its width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, 10)."""
        maps: torch.Tensor = self.second(self.first(x).reshape(len(x), 4, -1, 6))
        logits: torch.Tensor = self.fc(maps.mean((2, 3)))
        return logits


def counting(classes: int, channels: int, size: int) -> nn.Module:
    return Counting()


def convolutional(classes: int, channels: int, size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.Conv2d(8, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "named"), [(0.25, False), (0.5, False), (0.875, True)])
def test_a_pruning_past_the_knee_is_named(
    trained: Trained, tmp_path: Path, ratio: float, named: bool
) -> None:
    needs("torch_pruning")
    options = how(trained, f"structured:{ratio}", train_samples=None,
                  optimization={"epochs": 8, "batch_size": 64})  # fmt: skip
    run = train(training(options), tmp_path / "run")
    rules = [warning["rule"] for warning in read_summary(run.path, ())["warnings"]]
    assert ("pruned-too-far" in rules) == named
    again = check_stores(CheckRequest.of_run(run.path))
    assert ("pruned-too-far" in [finding.rule for finding in again]) == named
