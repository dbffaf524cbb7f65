"""Weights from files: formats, nests, prefixes, refusals, digests."""

from __future__ import annotations

import argparse
import hashlib
import re
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from kdcache.models.weights import load_weights, tensor_digest
from kdcache.models.zoo import build_model
from kdcache.teachers.load import load_teacher
from kdcache_stores.errors import DataError, MismatchError, UnknownName, UsageError


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet8", classes=10, channels=1, size=8)


def test_safetensors_and_torch_give_one_digest(net: nn.Module, tmp_path: Path) -> None:
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    torch.save(net.state_dict(), tmp_path / "w.pth")
    weights = [load_weights(tmp_path / name) for name in ("w.safetensors", "w.pth")]
    assert weights[0].file_sha256 != weights[1].file_sha256
    assert {tensor_digest(w.state) for w in weights} == {tensor_digest(net.state_dict())}


@pytest.mark.parametrize("nest", ["state_dict", "model", "net", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_published_nests_and_prefixes(
    net: nn.Module, tmp_path: Path, nest: str | None, prefix: str
) -> None:
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    content = {"epoch": 240, nest: state, "best_acc": torch.tensor(72.5)} if nest else state
    torch.save(content, tmp_path / "w.th")
    other = build_model("resnet8", classes=10, channels=1, size=8)
    load_weights(tmp_path / "w.th").apply(other)
    assert tensor_digest(other.state_dict()) == tensor_digest(net.state_dict())


@pytest.mark.parametrize("prefix", ["model.", "net.backbone.", "module.model."])
def test_a_lightning_checkpoint(net: nn.Module, tmp_path: Path, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    beside = {"loss.weight": torch.ones(10), "metric.count": torch.tensor(1)}
    torch.save({"state_dict": beside | state, "hyper_parameters": {"lr": 0.1}}, tmp_path / "w.ckpt")
    other = build_model("resnet8", classes=10, channels=1, size=8)
    load_weights(tmp_path / "w.ckpt").apply(other)
    assert tensor_digest(other.state_dict()) == tensor_digest(net.state_dict())


def test_two_networks_in_one_file_are_not_chosen_between(net: nn.Module, tmp_path: Path) -> None:
    both = {p + name: t for p in ("student.", "teacher.") for name, t in net.state_dict().items()}
    torch.save(both, tmp_path / "w.pth")
    with pytest.raises(MismatchError, match=r"under each of student, teacher.*w\.pth#student or"):
        load_weights(tmp_path / "w.pth").apply(net)
    with pytest.raises(UnknownName, match="'teachers'; did you mean 'teacher'"):
        load_weights(f"{tmp_path / 'w.pth'}#teachers")
    chosen = load_weights(f"{tmp_path / 'w.pth'}#teacher")
    chosen.apply(net)
    assert chosen.entry == "teacher"


AVERAGES = {
    "model_ema": lambda state: state,
    "ema_state": lambda state: {
        "n_averaged": torch.tensor(3),
        **{f"module.{n}": t for n, t in state.items()},
    },
    "ema.shadow": lambda state: {n: t for n, t in state.items() if "num_batches" not in n},
}


@pytest.mark.parametrize("entry", AVERAGES)
def test_weights_beside_their_moving_average_are_a_choice(
    net: nn.Module, tmp_path: Path, entry: str
) -> None:
    path = tmp_path / "w.pth"
    averaged = {n: t + 1 for n, t in net.state_dict().items()}
    content: dict[str, object] = {"epoch": 3, "model": net.state_dict()}
    outer, _, inner = entry.partition(".")
    average = AVERAGES[entry](averaged)
    content[outer] = {inner: average, "decay": 0.9} if inner else average
    torch.save(content, path)
    with pytest.raises(DataError) as refused:
        load_weights(path)
    assert f"{path}#model or {path}#{entry}" in str(refused.value)
    for name, expected in (("model", net.state_dict()), (entry, averaged)):
        other = build_model("resnet8", classes=10, channels=1, size=8)
        chosen = load_weights(f"{path}#{name}")
        chosen.apply(other)
        assert chosen.entry == name
        assert torch.equal(other.state_dict()["conv1.weight"], expected["conv1.weight"])


def test_an_optimizer_a_loss_or_a_copy_beside_the_weights_is_no_choice(
    net: nn.Module, tmp_path: Path
) -> None:
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.rand(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    content = {"optimizer": optimizer.state_dict(), "center_loss": {"centers": torch.ones(3)}}
    torch.save(content | {"model": net.state_dict(), "best": net.state_dict()}, tmp_path / "w.pth")
    taken = load_weights(tmp_path / "w.pth")
    assert taken.entry == "model"
    assert tensor_digest(taken.state) == tensor_digest(net.state_dict())


def test_a_file_whose_own_name_has_a_hash(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "run.pth#2.pth")
    assert load_weights(tmp_path / "run.pth#2.pth").entry is None
    with pytest.raises(DataError, match=r"run#2/w\.pth: there is no such file"):
        load_weights(tmp_path / "run#2/w.pth")


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "MobileNetV2", "ShuffleV1", "wrn_16_1"])
def test_the_number_of_classes_whatever_the_order_of_names(tmp_path: Path, name: str) -> None:
    state = build_model(name, classes=100).state_dict()
    torch.save(state, tmp_path / "w.pth")
    torch.save(dict(reversed(state.items())), tmp_path / "reversed.pth")
    save_file(state, tmp_path / "w.safetensors")
    for classes in (10, 64, 100):
        module = build_model(name, classes=classes)
        for file in ("w.pth", "reversed.pth", "w.safetensors"):
            assert load_weights(tmp_path / file).classes(module, classes) == 100


def test_the_only_state_dict_is_found_under_any_name(net: nn.Module, tmp_path: Path) -> None:
    torch.save({"epoch": 3, "params": net.state_dict()}, tmp_path / "w.pth")
    assert tensor_digest(load_weights(tmp_path / "w.pth").state) == tensor_digest(net.state_dict())
    torch.save({"a": net.state_dict(), "b": net.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="found: a, b, of which a, b are state dicts"):
        load_weights(tmp_path / "w.pth")


def test_a_torchscript_archive_and_an_empty_file_say_what_they_are(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:  # as torch.jit.save lays it out
        archive.writestr("w/constants.pkl", b"")
    with pytest.raises(DataError, match=r"TorchScript.*torch\.jit\.load"):
        load_weights(tmp_path / "w.pt")
    (tmp_path / "none.pt").write_bytes(b"")
    with pytest.raises(DataError, match=r"the file is empty \(0 bytes\)"):
        load_weights(tmp_path / "none.pt")


def test_a_saved_command_line_beside_the_weights_is_read(net: nn.Module, tmp_path: Path) -> None:
    opt = argparse.Namespace(model="resnet8", learning_rate=0.05)
    torch.save({"opt": opt, "model": net.state_dict()}, tmp_path / "last.pth")
    assert tensor_digest(load_weights(tmp_path / "last.pth").state)


def test_pickled_code_is_refused_and_not_run(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net, tmp_path / "module.pt")
    with pytest.raises(DataError, match=r"pickled code.*convert it once: content = torch\.load"):
        load_weights(tmp_path / "module.pt")

    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": net.state_dict(), "opt": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(DataError, match="pickled code"):
        load_weights(tmp_path / "harmful.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_files_are_refused(net: nn.Module, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(net.state_dict(), path)
    else:
        save_file(net.state_dict(), path)
    content = path.read_bytes()
    for damaged in (b"", b"not weights at all", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"not a readable|pickled|is empty"):
            load_weights(path)


def test_what_is_no_weights_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_weights(tmp_path / "absent.pth")
    (tmp_path / "w.onnx").touch()
    with pytest.raises(UsageError, match=r"ending in \.safetensors"):
        load_weights(tmp_path / "w.onnx")
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "w.pt")
    with pytest.raises(DataError, match="found: epoch, optimizer"):
        load_weights(tmp_path / "w.pt")
    torch.save(torch.zeros(3), tmp_path / "t.pt")
    with pytest.raises(DataError, match="found Tensor"):
        load_weights(tmp_path / "t.pt")


def saved(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


class Holder:
    """What a file holds that is no plain data."""


@pytest.mark.parametrize(
    "kind", ["network", "weights in a dict", "network in a dict", "script", "mixed"]
)
def test_the_conversion_that_a_refusal_names_runs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    linear, file = nn.Linear(2, 3), tmp_path / "w.pt"
    state = linear.state_dict()
    if kind == "script":
        with pytest.warns(FutureWarning):  # torch deprecates what old files were made by
            torch.jit.script(linear).save(str(file))
    else:
        torch.save({
            "network": linear, "weights in a dict": {"model": state, "args": Holder()},
            "network in a dict": {"model": linear}, "mixed": {**state, "epoch": 3},
        }[kind], file)  # fmt: skip
    with pytest.raises(DataError) as refused:
        load_weights(file)
    said = str(refused.value)
    if kind == "mixed":
        assert "a state dict of 2 tensors but for epoch (int)" in said
    code = re.search(r"(content = |torch\.save).*?'weights\.pt'\)", said)
    assert code is not None
    snippet = code[0].replace("FILE", repr(str(file)))
    if kind.endswith("in a dict"):
        whole = {"weights in a dict": "content['model']",
                 "network in a dict": "content['model'].state_dict()"}[kind]  # fmt: skip
        assert whole in said
        snippet = snippet.replace("content.state_dict()", whole)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        exec(snippet, {"torch": torch})
    assert load_weights(tmp_path / "weights.pt").state.keys() == {"weight", "bias"}


def test_a_file_of_another_network_names_a_few_tensors(net: nn.Module, tmp_path: Path) -> None:
    others = {f"block{i}.weight": torch.zeros(2) for i in range(300)}
    with pytest.raises(MismatchError) as refused:
        load_weights(saved(others, tmp_path / "w.pt")).apply(net)
    said = str(refused.value)
    assert (
        "300 unexpected: block0.weight, block1.weight, block2.weight, block3.weight and 296 more"
        in said
    )
    assert "no name agrees, so they are of another network" in said
    assert len(said) < 500


def test_missing_and_unexpected_names_are_listed(net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    state["extra.weight"] = state.pop("layer1.0.conv1.weight")
    with pytest.raises(
        MismatchError,
        match=r"1 missing: layer1\.0\.conv1\.weight; 1 unexpected: extra\.weight",
    ):
        load_weights(saved(state, tmp_path / "w.pt")).apply(net)


def test_shapes_that_differ_are_listed(tmp_path: Path) -> None:
    small = build_model("resnet8", classes=10, channels=1, size=8)
    state = build_model("resnet8", classes=10, channels=3, size=8).state_dict()
    before = tensor_digest(small.state_dict())
    with pytest.raises(MismatchError, match=r"conv1\.weight 16x3x3x3 where 16x1x3x3 is wanted"):
        load_weights(saved(state, tmp_path / "w.pt")).apply(small)
    assert tensor_digest(small.state_dict()) == before


@pytest.mark.parametrize("name", ["resnet8", "ResNet18"])
def test_a_wrong_class_count_is_named_as_such(tmp_path: Path, name: str) -> None:
    state = build_model(name, classes=100).state_dict()
    with pytest.raises(MismatchError, match="they are for 100 classes, 10 are wanted"):
        load_weights(saved(state, tmp_path / "w.pt")).apply(build_model(name, classes=10))


def test_old_files_without_batch_counters_load(net: nn.Module, tmp_path: Path) -> None:
    state = {n: t for n, t in net.state_dict().items() if not n.endswith("num_batches_tracked")}
    load_weights(saved(state, tmp_path / "w.pt")).apply(net)


@given(st.permutations(["a.weight", "a.bias", "b.weight"]))
def test_digest_does_not_depend_on_order_or_layout(order: list[str]) -> None:
    state = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}
    state["b.weight"] = torch.arange(24).view(1, 2, 3, 4)
    expected = tensor_digest(state)
    shuffled = {name: state[name] for name in order}
    shuffled["b.weight"] = state["b.weight"].contiguous(memory_format=torch.channels_last)
    assert tensor_digest(shuffled) == expected


def test_digest_sees_names_dtypes_shapes_and_values() -> None:
    a = torch.zeros(2, 3)
    states = [
        {"a": a},
        {"b": a},
        {"a": a.double()},
        {"a": a.view(3, 2)},
        {"a": a + 1},
        {"a": a.bfloat16()},
        {"a": a.half()},
        {"a": torch.tensor(0.0)},
        {},
    ]
    assert len({tensor_digest(s) for s in states}) == len(states)


def test_digest_is_of_the_documented_bytes() -> None:
    state = {"w": torch.tensor([[1.0, -2.0]]), "n": torch.tensor(3)}
    content = b"n\0int64\0scalar\0" + struct.pack("<q", 3)
    content += b"w\0float32\x001x2\0" + struct.pack("<2f", 1, -2)
    assert tensor_digest(state) == hashlib.sha256(content).hexdigest()


def test_weights_of_another_network_of_the_zoo_are_told_which(tmp_path: Path) -> None:
    file = tmp_path / "resnet20.pth"
    torch.save(build_model("resnet20", 100, 3, 32).state_dict(), file)
    with pytest.raises(MismatchError) as refused:
        load_teacher(f"resnet32@{file}", classes=100, channels=3, size=32)
    said = str(refused.value)
    assert said.startswith(f"weights {file} do not fit resnet32: ")
    assert said.endswith("They fit resnet20")
    with pytest.raises(MismatchError) as refused:
        load_teacher(f"resnet20@{file}", classes=10, channels=3, size=32)
    assert "They fit" not in str(refused.value)


def test_a_network_of_the_zoo_has_no_prefix() -> None:
    with pytest.raises(
        UsageError, match="torchvision has no resnet8; the zoo has it, without a prefix"
    ):
        build_model("torchvision:resnet8", 10, 3, 32)
