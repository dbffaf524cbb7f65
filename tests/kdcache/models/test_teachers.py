"""Teachers: where they come from, what they compute, what their digest covers."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.models as tv
from safetensors.torch import save_file
from torch import Tensor, nn

from kdcache.models.classes import load_class_map
from kdcache.models.zoo import build_model
from kdcache.preprocessing import PREPROCESSINGS, Preprocessing
from kdcache.teachers.load import load_teacher, teacher_class_names
from kdcache.teachers.posterior import mc_dropout
from kdcache.teachers.sanity import clean_check
from kdcache.teachers.teacher import Teacher
from kdcache_stores.errors import DataError, MismatchError, UnknownName, UsageError

GREY = Preprocessing((0.3,), (0.2,))


def views(n: int, channels: int = 1, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A resnet8 of 10 classes for grey 8x8 images, as published ones are saved."""
    torch.manual_seed(0)
    state = build_model("resnet8", classes=10, channels=1, size=8).state_dict()
    path = tmp_path / "resnet8.pth"
    torch.save({"epoch": 240, "model": {f"module.{n}": t for n, t in state.items()}}, path)
    return path


def load(checkpoint: Path, **changes: object) -> Teacher:
    arguments = {"classes": 10, "channels": 1, "size": 8, "preprocessing": GREY} | changes
    return load_teacher(f"resnet8@{checkpoint}", **arguments)  # type: ignore[arg-type]


def test_logits_are_those_of_the_module_on_normalised_views(checkpoint: Path) -> None:
    teacher = load(checkpoint)
    x = views(5)
    expected = teacher.module((x.float() / 255 - 0.3) / 0.2)
    logits = teacher.logits(x)
    torch.testing.assert_close(logits, expected)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert not logits.is_inference()
    assert not teacher.module.training
    assert not any(p.requires_grad for p in teacher.module.parameters())


def test_one_mean_and_std_are_of_all_channels(tmp_path: Path) -> None:
    torch.save(build_model("resnet8", 10).state_dict(), tmp_path / "c.pth")
    teacher = load_teacher(
        f"resnet8@{tmp_path / 'c.pth'}", classes=10, channels=3, size=8, preprocessing=GREY
    )
    assert isinstance(teacher.preprocessing, Preprocessing)
    assert (teacher.preprocessing.mean, teacher.preprocessing.std) == (GREY.mean * 3, GREY.std * 3)


def test_weights_by_argument_or_after_the_at_sign(checkpoint: Path) -> None:
    beside = load_teacher("resnet8", checkpoint, classes=10, channels=1, size=8, preprocessing=GREY)
    assert torch.equal(beside.logits(views(2)), load(checkpoint).logits(views(2)))
    with pytest.raises(UsageError, match="given twice"):
        load_teacher("resnet8@a.pth", "b.pth", classes=10)


def test_digest_covers_weights_preprocessing_precision_map_and_masks(checkpoint: Path) -> None:
    teacher = load(checkpoint)
    other = replace(teacher, weights_sha256="0" * 64)
    variants = [
        teacher,
        other,
        load(checkpoint, preprocessing=Preprocessing((0.3,), (0.21,))),
        load(checkpoint, precision="bf16"),
        load(checkpoint, class_map=(*range(1, 10), 0)),
        replace(teacher, dropout_seed=0),
        replace(teacher, dropout_seed=1),
    ]
    assert len({t.to_store().digest for t in variants}) == len(variants)


def test_digest_does_not_depend_on_the_file_or_how_it_runs(
    checkpoint: Path, tmp_path: Path
) -> None:
    teacher = load(checkpoint)
    state = teacher.module.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    old = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pt")
    same = [load(tmp_path / "w.safetensors"), load(tmp_path / "old.pt")]
    same += [load(checkpoint, channels_last=True)]
    assert {t.to_store().digest for t in same} == {teacher.to_store().digest}
    assert same[0].file_sha256 != teacher.file_sha256


def test_a_class_map_serves_both_kinds_of_file_alike(checkpoint: Path, tmp_path: Path) -> None:
    state = load(checkpoint).module.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    fewer = [
        load(file, classes=7, class_map=(9, 8, 7, 6, 5, 4, 3))
        for file in (checkpoint, tmp_path / "w.safetensors")
    ]
    assert len({teacher.to_store().digest for teacher in fewer}) == 1
    assert torch.equal(fewer[0].logits(views(2)), fewer[1].logits(views(2)))
    assert fewer[0].logits(views(2)).shape == (2, 7)


def test_an_entry_of_a_file_by_the_spec(checkpoint: Path) -> None:
    assert load(checkpoint).weights_entry == "model"
    chosen = load_teacher(
        f"resnet8@{checkpoint}#model", classes=10, channels=1, size=8, preprocessing=GREY
    )
    assert torch.equal(chosen.logits(views(2)), load(checkpoint).logits(views(2)))


def test_what_the_store_keeps(checkpoint: Path) -> None:
    stored = load(checkpoint).to_store(clean_top1={"test": 0.5})
    assert (stored.architecture, stored.classes, stored.precision) == ("resnet8", 10, "float32")
    assert Preprocessing.from_dict(stored.preprocessing) == GREY
    assert stored.clean_top1 == {"test": 0.5}
    assert str(checkpoint) not in str(stored.to_dict())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_is_near_float32(checkpoint: Path, precision: str) -> None:
    x = views(16)
    exact, near = load(checkpoint).logits(x), load(checkpoint, precision=precision).logits(x)
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, atol=0.05 * float(exact.std()), rtol=0.05)


def test_channels_last_gives_the_same_logits(checkpoint: Path) -> None:
    teacher = load(checkpoint, channels_last=True)
    conv = teacher.module.get_submodule("layer1.0.conv1")
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(teacher.logits(views(4)), load(checkpoint).logits(views(4)))


@pytest.mark.slow
def test_compiled_gives_the_same_logits(checkpoint: Path) -> None:
    teacher = load(checkpoint, compile=True)
    for n in (4, 3):
        torch.testing.assert_close(
            teacher.logits(views(n)), load(checkpoint).logits(views(n)), atol=1e-4, rtol=1e-4
        )


def test_grey_views_for_a_teacher_of_three_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(build_model("resnet8", classes=10).state_dict(), tmp_path / "w.pt")
    pre = PREPROCESSINGS["cifar100"]
    teacher = load_teacher(
        f"resnet8@{tmp_path / 'w.pt'}", classes=10, channels=1, size=8, preprocessing=pre
    )
    assert torch.equal(teacher.logits(views(2)), teacher.logits(views(2).expand(2, 3, 8, 8)))


def test_a_class_map_picks_and_orders_the_logits(checkpoint: Path) -> None:
    teacher = load(checkpoint, classes=3, class_map=(7, 0, 2))
    assert teacher.classes == 3
    assert torch.equal(teacher.logits(views(4)), load(checkpoint).logits(views(4))[:, [7, 0, 2]])


def test_class_names_that_a_library_knows() -> None:
    names = teacher_class_names("torchvision:squeezenet1_1@DEFAULT")
    assert names is not None
    assert (len(names), names[0]) == (1000, "tench")
    assert teacher_class_names("resnet20@weights.pth") is None
    assert teacher_class_names("torchvision:resnet18@weights.pth") is None


def test_a_library_s_teacher_through_a_class_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    cached = tmp_path / "checkpoints" / Path(tv.SqueezeNet1_1_Weights.DEFAULT.url).name
    torch.save(tv.squeezenet1_1().state_dict(), cached)
    (tmp_path / "map.csv").write_text("teacher,dataset\ntench,fish\nEnglish springer,dog\n")
    spec = "torchvision:squeezenet1_1@DEFAULT"
    names = teacher_class_names(spec)
    chosen = load_class_map(tmp_path / "map.csv", 2, ["dog", "fish"], teacher_names=names)
    assert chosen == (217, 0)

    teacher = load_teacher(spec, classes=2, size=64, class_map=chosen)
    assert teacher.preprocessing.size == 224
    assert teacher.logits(views(2, 3, 64)).shape == (2, 2)
    assert teacher.file_sha256 == hashlib.sha256(cached.read_bytes()).hexdigest()
    with pytest.raises(MismatchError, match=r"gives 1000 logits, the dataset has 2.*--class-map"):
        load_teacher(spec, classes=2, size=64)


def test_class_maps_that_do_not_fit_are_refused(checkpoint: Path) -> None:
    with pytest.raises(MismatchError, match="up to the teacher's class 10"):
        load(checkpoint, classes=2, class_map=(0, 10))
    with pytest.raises(MismatchError, match="class map of 3 classes"):
        load(checkpoint, classes=2, class_map=(0, 1, 2))


def test_refusals_name_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="they are for 10 classes, 7 are wanted"):
        load(checkpoint, classes=7)
    with pytest.raises(DataError, match=r"no weights are given.*resnet8@FILE"):
        load_teacher("resnet8", classes=10, preprocessing=GREY)
    with pytest.raises(DataError, match=r"torchvision:resnet18@DEFAULT"):
        load_teacher("torchvision:resnet18", classes=10)
    with pytest.raises(UsageError, match=r"mean and std.*not known.*cifar100"):
        load(checkpoint, preprocessing=None)
    with pytest.raises(UnknownName, match="unknown precision 'half'"):
        load(checkpoint, precision="half")
    with pytest.raises(UnknownName, match="unknown model 'resnet9'"):
        load_teacher("resnet9", checkpoint, classes=10)
    with pytest.raises(DataError, match=r"absent\.pth: there is no such file"):
        load_teacher("resnet8", tmp_path / "absent.pth", classes=10, preprocessing=GREY)
    with pytest.raises(DataError, match="there is no such directory"):
        load_teacher(tmp_path / "runs" / "absent", classes=10)


def test_fresh_weights_only_on_request() -> None:
    teacher = load_teacher(
        "resnet8", classes=4, channels=1, size=8, preprocessing=GREY, allow_untrained=True
    )
    assert teacher.logits(views(2)).shape == (2, 4)
    assert teacher.file_sha256 is None


def test_a_run_directory(tmp_path: Path) -> None:
    net = build_model("resnet8", classes=4, channels=1, size=8)
    (tmp_path / "config.toml").write_text(
        '[model]\nname = "resnet8"\nclasses = 4\nchannels = 1\nsize = 8\n'
        "[preprocessing]\nmean = [0.3]\nstd = [0.2]\n"
        '[data]\nname = "digits"\n[objective]\nmethod = "ce"\n[training]\nseed = 0\nepochs = 1\n'
    )
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    teacher = load_teacher(tmp_path, classes=4, channels=1, size=8)
    assert (teacher.architecture, teacher.preprocessing) == ("resnet8", GREY)
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(views(3)), net.eval()(GREY(views(3))))

    other = build_model("resnet8", classes=4, channels=1, size=8)
    torch.save(other.state_dict(), tmp_path / "epoch7.pt")
    earlier = load_teacher(f"{tmp_path}@{tmp_path / 'epoch7.pt'}", classes=4, channels=1, size=8)
    assert earlier.weights_sha256 != teacher.weights_sha256
    with pytest.raises(MismatchError, match="gives 4 logits, the dataset has 5 classes"):
        load_teacher(tmp_path, classes=5, channels=1, size=8)


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"teachers_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\n\n"
        "class Pair(torch.nn.Flatten):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x), x\n\n"
        "class Fussy(torch.nn.Flatten):\n"
        "    def forward(self, x):\n"
        "        raise AssertionError('Wrong image height!')\n\n"
        "def fussy():\n    return Fussy()\n\n"
        "def broken(classes):\n    return 1 / 0\n\n"
        "def halved(classes):\n    return torch.nn.Sequential(Fussy(), torch.nn.Linear(1, 1).half())\n\n"
        "def flat():\n    return torch.nn.Flatten()\n\n"
        "def pair():\n    return Pair()\n"
    )
    monkeypatch.chdir(tmp_path)
    return name


def test_a_user_s_factory_needs_no_file(factory: str) -> None:
    teacher = load_teacher(
        f"{factory}:flat", classes=64, channels=1, size=8, preprocessing=Preprocessing((0,), (1,))
    )
    torch.testing.assert_close(teacher.logits(views(2)), views(2).flatten(1) / 255)
    assert teacher.architecture == f"{factory}:flat"


def test_outputs_that_are_no_logits_are_refused(factory: str) -> None:
    with pytest.raises(DataError, match=r"expected logits \(B, K\) or a mapping.*, found tuple"):
        load_teacher(f"{factory}:pair", classes=64, channels=1, size=8, preprocessing=GREY)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("fussy", MismatchError, r"images of 1x8x8.*AssertionError: Wrong image height!.*--size"),
        ("broken", UsageError, r"called as broken\(classes=64\) it raised ZeroDivisionError"),
        ("halved", MismatchError, r"Its weights are torch\.float16: make them float32"),
    ],
)
def test_whatever_a_user_s_network_raises_is_told(
    factory: str, function: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_teacher(f"{factory}:{function}", classes=64, channels=1, size=8, preprocessing=GREY)


def test_a_file_alone_is_no_teacher(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=f"is a file: name the network .*NETWORK@{checkpoint}"):
        load_teacher(checkpoint, classes=10, channels=1, size=8)


def test_mc_dropout_samples_are_independent_of_the_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build_model("wrn_16_2_dropout", classes=10, channels=1, size=8)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    teacher = load_teacher(
        f"wrn_16_2_dropout@{tmp_path / 'w.pt'}",
        classes=10,
        channels=1,
        size=8,
        preprocessing=GREY,
    )
    samples = [mc_dropout(teacher, seed) for seed in (0, 1)]
    x = views(6)
    whole = samples[0].logits(x)
    rows = torch.cat([samples[0].logits(x[i : i + 2]) for i in (0, 2, 4)])
    torch.testing.assert_close(rows, whole)
    assert torch.equal(mc_dropout(teacher, 0).logits(x), whole)
    assert not torch.allclose(samples[1].logits(x), whole, atol=1e-3)
    assert not torch.allclose(teacher.logits(x), whole, atol=1e-3)
    assert len({t.to_store().digest for t in (teacher, *samples)}) == 3
    assert samples[0].weights_sha256 == teacher.weights_sha256


def test_mc_dropout_without_dropout_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="no dropout layer"):
        mc_dropout(load(checkpoint), 0)


def cifar100_test() -> tuple[Path, Tensor, np.ndarray]:
    folder = Path(os.environ.get("KDCACHE_TEST_DATA", ""))
    file = folder / "resnet20-cifar100.pth"
    if not os.environ.get("KDCACHE_TEST_DATA") or not file.exists():
        pytest.skip("KDCACHE_TEST_DATA has no resnet20-cifar100.pth")
    with np.load(folder / "cifar100.npz") as arrays:
        images = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2).contiguous()
        return file, images, arrays["y_test"].astype(np.int64)


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [(1000, 0.60, 0.70), pytest.param(10_000, 0.6520, 0.6535, marks=pytest.mark.slow)],
)
def test_a_checkpoint_of_cifar100_reaches_its_accuracy(count: int, low: float, high: float) -> None:
    file, images, labels = cifar100_test()
    teacher = load_teacher(
        f"resnet20@{file}", classes=100, preprocessing=PREPROCESSINGS["cifar100"]
    )
    assert low < clean_check(teacher, images[:count], labels[:count]).top1 < high
