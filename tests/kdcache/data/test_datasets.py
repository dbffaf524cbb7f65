"""Datasets by name: shapes, keys, fingerprints, and what is refused."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from kdcache.augment.specs import make_augmentation
from kdcache.data.align import find_rows
from kdcache.data.dataset import Dataset, in_memory
from kdcache.data.folder import decode_file, image_folder
from kdcache.data.foreign import MapDataset
from kdcache.data.kept_shapes import kept_shape
from kdcache.data.loading import DATASETS, default_root, load_dataset
from kdcache.training.preparation import require_alike
from kdcache.views.plan import ViewPlan
from kdcache.views.sizes import view_shape
from kdcache_stores import Samples
from kdcache_stores.errors import DataError, MismatchError, UnknownName, UsageError
from kdcache_stores.format.probing import item_digest

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, seed: int = 0, side: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def check(dataset: Dataset) -> None:
    """What holds for every dataset."""
    assert len(dataset) == len(dataset.keys) == len(set(dataset.keys)) == len(dataset.labels)
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.max() < dataset.classes
    assert dataset.class_names is None or len(dataset.class_names) == dataset.classes
    image = dataset.decode(len(dataset) - 1)
    assert image.dtype == torch.uint8
    assert image.ndim == 3
    assert dataset.size(0) == tuple(dataset.decode(0).shape[1:])
    if dataset.images is not None:
        assert dataset.image_shape == tuple(image.shape)
        assert torch.equal(dataset.images[-1], image)
    part = dataset.subset([2, 0])
    assert part.keys == [dataset.keys[2], dataset.keys[0]]
    assert part.labels.tolist() == dataset.labels[[2, 0]].tolist()
    assert torch.equal(part.decode(1), dataset.decode(0))
    assert part.fingerprint != dataset.fingerprint
    again = part.subset([1])
    assert torch.equal(again.decode(0), dataset.decode(0))
    assert again.keys == [dataset.keys[0]]


def test_digits() -> None:
    train, test = load_dataset("digits"), load_dataset("digits", "test")
    for dataset, count in ((train, 1437), (test, 360)):
        check(dataset)
        assert len(dataset) == count
        assert dataset.image_shape == (1, 8, 8)
        assert not dataset.flip
    assert not set(train.keys) & set(test.keys)
    assert test.keys[:2] == ["digits/0000", "digits/0005"]
    assert train.images is not None
    assert (int(train.images.min()), int(train.images.max())) == (0, 255)
    assert train.labels[:5].tolist() == [1, 2, 3, 4, 6]


def pixel_digest(dataset: Dataset) -> str:
    total = hashlib.sha256(b"kdcache pixels\n")
    for row in range(len(dataset)):
        total.update(item_digest(dataset.decode(row).numpy()).encode())
    return total.hexdigest()


def test_digits_never_change() -> None:
    """Keys, labels and pixels of the embedded data: stores of it depend on them."""
    train = load_dataset("digits")
    assert train.fingerprint == FINGERPRINT
    assert pixel_digest(train) == CONTENT


FINGERPRINT = "b1b61c8ba3b892bbe1fa7b5cb0c7d9e8025db114dee7f93edba5ffb497516150"
CONTENT = "e7fd32603d283073aab1a4c3810fb50083f0580977d8af3b75fbba0423431119"


def cifar_files(root: Path, monkeypatch: pytest.MonkeyPatch, cls: Any, coarse: bool) -> np.ndarray:
    """Files in CIFAR's own format, and their digests in torchvision's place."""
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    label, names = ("fine_labels", "fine_label_names") if coarse else ("labels", "label_names")
    x = pixels(20, 3072)

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    half = {"data": x[:10], label: list(range(10))}
    monkeypatch.setattr(
        cls, "train_list", [write("one", half), write("two", half | {"data": x[10:]})]
    )
    monkeypatch.setattr(cls, "test_list", [write("three", half)])
    count = 100 if coarse else 10
    entry = write("meta", {names: [f"class {i}" for i in range(count)]})
    meta = {"filename": entry[0], "key": names, "md5": entry[1]}
    monkeypatch.setattr(cls, "meta", meta)
    return x


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(name: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = getattr(torchvision.datasets, name.upper())
    x = cifar_files(tmp_path, monkeypatch, cls, coarse=classes == 100)
    train = load_dataset(name, root=tmp_path)
    check(train)
    assert (len(train), train.classes, train.image_shape) == (20, classes, (3, 32, 32))
    assert np.array_equal(train.decode(13).numpy().ravel(), x[13])
    assert train.keys[13] == "train/13"
    assert len(load_dataset(name, "test", root=tmp_path)) == 10


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_mnist(name: str, folder: str, tmp_path: Path) -> None:
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    x, y = pixels(12, 28, 28), np.arange(12, dtype=np.uint8) % 10
    for split in ("train", "t10k"):
        header = struct.pack(">IIII", 0x803, 12, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + x.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, 12) + y.tobytes()
        )
    train = load_dataset(name, root=tmp_path)
    check(train)
    assert train.image_shape == (1, 28, 28)
    assert np.array_equal(train.decode(3).numpy()[0], x[3])
    assert train.flip == (name == "fashion-mnist")


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = torchvision.datasets.STL10
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    x = pixels(4, 3, 96, 96)
    stored = x.transpose(0, 1, 3, 2).tobytes()  # the published files go column by column
    content = {
        "train_X.bin": stored,
        "train_y.bin": bytes([1, 2, 10, 4]),
        "unlabeled_X.bin": stored,
        "test_X.bin": stored,
        "test_y.bin": bytes([1, 1, 1, 1]),
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    listed = {name: [name, hashlib.md5(data).hexdigest()] for name, data in content.items()}
    monkeypatch.setattr(cls, "train_list", [listed[n] for n in content if "test" not in n])
    monkeypatch.setattr(cls, "test_list", [listed[n] for n in content if "test" in n])
    train = load_dataset("stl10", root=tmp_path)
    check(train)
    assert train.labels.tolist() == [0, 1, 9, 3]
    assert np.array_equal(train.decode(2).numpy(), x[2])
    unlabeled = load_dataset("stl10", "unlabeled", root=tmp_path)
    check(unlabeled)
    assert unlabeled.labels.tolist() == [-1] * 4
    assert unlabeled.classes == 10


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "stl10"])
def test_a_missing_dataset_says_where_it_was_looked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(name, root=tmp_path)
    for part in (name, str(tmp_path), "--data-root", "--download"):
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is fetched or made unless asked"


def test_tiny_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for i, name in enumerate(("n01", "n02")):
        for j in range(3):
            save(root / "train" / name / "images" / f"{name}_{j}.JPEG", 10 * i + j, 64)
    for j in range(4):
        save(root / "val" / "images" / f"val_{j}.JPEG", 50 + j, 64)
    lines = [f"val_{j}.JPEG\tn0{1 + j % 2}\t0\t0\t62\t62\n" for j in range(4)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    train = load_dataset("tiny-imagenet", root=tmp_path)
    check(train)
    assert train.image_shape == (3, 64, 64)
    assert train.keys[4] == "n02/images/n02_1.JPEG"
    assert train.class_names == ["n01", "n02"]
    test = load_dataset("tiny-imagenet", "test", root=tmp_path)
    check(test)
    assert test.keys[3] == "images/val_3.JPEG"
    assert test.labels.tolist() == [0, 1, 0, 1]
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn09\t0\t0\t62\t62\n")
    with pytest.raises(DataError, match=r"classes that train/ does not have: \['n09'\]"):
        load_dataset("tiny-imagenet", "test", root=tmp_path)
    save(root / "train" / "n01" / "images" / "odd.JPEG", 1, 32)
    with pytest.raises(DataError, match=r"'n01/images/odd.JPEG'.*has the shape \(3, 32, 32\)"):
        load_dataset("tiny-imagenet", root=tmp_path)


def test_imagenet(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for name in ("n01440764", "n01443537"):
            for i in range(count):
                save(tmp_path / "imagenet" / split / name / f"{name}_{i}.JPEG", i)
    train, test = (
        load_dataset("imagenet", root=tmp_path),
        load_dataset("imagenet", "test", tmp_path),
    )
    check(train)
    check(test)
    assert (len(train), len(test)) == (6, 4)
    assert (train.name, train.keys[0]) == ("imagenet", "n01440764/n01440764_0.JPEG")


@pytest.mark.parametrize(
    ("name", "how"), [("imagenet", "image-net.org"), ("tiny-imagenet", "Unpack")]
)
def test_missing_imagenets(name: str, how: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=how) as caught:
        load_dataset(name, root=tmp_path)
    assert str(tmp_path) in str(caught.value)


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return f"arrays:{path}"


@pytest.mark.parametrize(
    ("stored", "shape"),
    [((9, 5, 6), (1, 5, 6)), ((9, 5, 6, 3), (3, 5, 6)), ((9, 3, 5, 6), (3, 5, 6)), ((9, 5, 6, 1), (1, 5, 6))],
)  # fmt: skip
def test_arrays(stored: tuple[int, ...], shape: tuple[int, ...], tmp_path: Path) -> None:
    x, y = pixels(*stored), np.arange(9) % 4
    name = npz(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3] % 2)
    train, test = load_dataset(name), load_dataset(name, "test")
    check(train)
    check(test)
    assert train.image_shape == test.image_shape == shape
    assert train.classes == test.classes == 4, "the number of classes is that of the training set"
    expected = x[7] if x.ndim == 3 else x[7] if shape[0] == stored[1] else x[7].transpose(2, 0, 1)
    assert np.array_equal(train.decode(7).numpy().reshape(shape), expected.reshape(shape))
    assert train.keys[7] == "train/7"
    assert train.name == "arrays:mine.npz"


def test_arrays_with_everything(tmp_path: Path) -> None:
    x, y = pixels(4, 5, 5), np.array([0, 1, 2, 0])
    name = npz(
        tmp_path / "mine.npz",
        x_train=x,
        y_train=y,
        keys_train=np.array(["d", "c", "b", "a"]),
        class_names=np.array(["ant", "bee", "cow"]),
        x_test=x,
        y_test=y,
        x_unlabeled=x,
    )
    train = load_dataset(name)
    assert train.keys == ["d", "c", "b", "a"]
    assert train.class_names == ["ant", "bee", "cow"]
    unlabeled = load_dataset(name, "unlabeled")
    assert unlabeled.labels.tolist() == [-1] * 4
    assert unlabeled.classes == 3


@pytest.mark.parametrize("names", [
    "train_images train_labels test_images test_labels",
    "images labels test_images test_labels",
    "images_train labels_train images_val labels_val",
    "X_train y_train X_test y_test",
])  # fmt: skip
def test_arrays_under_other_usual_names(tmp_path: Path, names: str) -> None:
    x, y = np.arange(4 * 75, dtype=np.uint8).reshape(4, 5, 5, 3), np.array([0, 1, 2, 0])
    own = names.split()
    np.savez(tmp_path / "own.npz", **dict(zip(own, (x, y, x[:2], y[:2]), strict=True)))
    train, test = (load_dataset(f"arrays:{tmp_path / 'own.npz'}", s) for s in ("train", "test"))
    assert train.images is not None
    assert torch.equal(train.images, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert (train.labels.tolist(), test.labels.tolist()) == (y.tolist(), y[:2].tolist())
    taken = [f"{n} as {c}" for n, c in zip(own, ("x_train", "y_train"), strict=False) if n != c]
    assert all(any(words in remark for remark in train.remarks) for words in taken)


def test_arrays_under_documented_names_come_first(tmp_path: Path) -> None:
    x, y = np.zeros((4, 5, 5, 3), np.uint8), np.array([0, 1, 2, 0])
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, images=x + 9, x_test=x, y_test=y)
    train = load_dataset(f"arrays:{tmp_path / 'own.npz'}")
    assert train.images is not None
    assert int(train.images.max()) == 0
    assert any("not used: ['images']" in remark for remark in train.remarks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": None}, r"lacks the arrays \['x_train'\]; it has \['y_train'\]"),
        ({"x_train": np.zeros((4, 5), dtype=np.uint8)}, "Features are float32, token ids int64"),
        ({"x_train": np.zeros((4, 5, 5, 2), dtype=np.uint8)}, r"found \(4, 5, 5, 2\)"),
        ({"y_train": np.zeros(3, dtype=np.int64)}, r"must be 4 integers, found int64 \(3,\)"),
        ({"y_train": np.zeros(4)}, "must be 4 integers, found float64"),
        ({"class_names": np.array(["a", "b"])}, r"label 2 of 'train/2' is outside the 2 classes"),
        (
            {"y_train": np.array([0, 1, 0, 2**64 - 1], np.uint64)},
            "class numbers from 0, found 18446744073709551615 in row 3",
        ),
        ({"y_train": np.array([{}] * 4)}, "not a readable .npz file of plain arrays"),
    ],
)
def test_wrong_arrays(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    arrays = {"x_train": pixels(4, 5, 5), "y_train": np.array([0, 1, 2, 0])} | change
    name = npz(tmp_path / "mine.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(DataError, match=message):
        load_dataset(name)


def test_arrays_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        load_dataset(f"arrays:{tmp_path / 'none.npz'}")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 but not a zip file")
    with pytest.raises(DataError, match="not a readable"):
        load_dataset(f"arrays:{tmp_path / 'bad.npz'}")


def test_arrays_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        claim, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)}
    )
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        archive.writestr("x_train.npy", claim.getvalue())
        archive.writestr("y_train.npy", claim.getvalue())
    with pytest.raises(DataError, match=r"x_train.npy claims 40000000000000 bytes .* holds \d+"):
        load_dataset(f"arrays:{tmp_path / 'mine.npz'}")


def test_an_entry_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    """The size of an entry is a claim too: no deflated byte gives more than 1032."""
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        claim, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 1, 1)}
    )
    file = tmp_path / "mine.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", claim.getvalue())
    size, lie = len(claim.getvalue()).to_bytes(4, "little"), (2 * 10**9).to_bytes(4, "little")
    data = file.read_bytes()
    assert data.count(size) == 2  # in the local and in the central header
    file.write_bytes(data.replace(size, lie))
    with pytest.raises(
        DataError, match=r"x_train.npy claims 1000000000 bytes .* holds \d{5,6} at most"
    ):
        load_dataset(f"arrays:{file}")


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    keys = np.array(["a", "b", "a"])
    name = npz(
        tmp_path / "mine.npz", x_train=pixels(3, 4, 4), y_train=np.arange(3), keys_train=keys
    )
    with pytest.raises(DataError, match="keys must be unique, found 'a' in rows 0 and 2"):
        load_dataset(name)


def folder_of(root: Path, layout: dict[str, list[str]]) -> str:
    for i, (place, files) in enumerate(layout.items()):
        (root / place).mkdir(parents=True)
        for file in files:
            save(root / place / file, i)
    return f"folder:{root}"


def test_folder(tmp_path: Path) -> None:
    name = folder_of(
        tmp_path / "mine",
        {
            "train/bee": ["2.jpg", "10.png", "deeper/1.JPEG"],
            "train/ant": ["x.webp"],
            "test/bee": ["a.jpg", "b.jpg", "c.jpg"],
        },
    )
    (tmp_path / "mine" / "train" / "bee" / "notes.txt").write_text("no image")
    train, test = load_dataset(name), load_dataset(name, "test")
    check(train)
    check(test)
    assert train.keys == ["ant/x.webp", "bee/10.png", "bee/2.jpg", "bee/deeper/1.JPEG"]
    assert train.labels.tolist() == [0, 1, 1, 1]
    assert train.image_shape == (3, 12, 12)
    assert test.labels.tolist() == [1, 1, 1], "a split that lacks a class keeps the others' numbers"
    assert test.class_names == ["ant", "bee"]
    assert train.name == "folder:mine", "where the folder lies is nobody's business"


def test_a_folder_of_classes_is_a_train_split(tmp_path: Path) -> None:
    name = folder_of(tmp_path / "mine", {"ant": ["1.jpg"], "bee": ["1.jpg"], "cow": ["1.jpg"]})
    assert load_dataset(name).keys == ["ant/1.jpg", "bee/1.jpg", "cow/1.jpg"]
    with pytest.raises(DataError, match="no class with two labelled samples"):
        load_dataset(name, "test")


@pytest.mark.parametrize("place", ["", "train/"])
def test_a_folder_without_a_test_split_holds_one_out(place: str, tmp_path: Path) -> None:
    many = [f"{i}.png" for i in range(20)]
    name = folder_of(
        tmp_path / "mine", {f"{place}ant": many, f"{place}bee": many[:3], f"{place}cow": ["1.png"]}
    )
    train, test = load_dataset(name), load_dataset(name, "test")
    check(train)
    check(test)
    assert np.bincount(test.labels, minlength=3).tolist() == [2, 1, 0]
    assert np.bincount(train.labels).tolist() == [18, 2, 1]
    assert not set(train.keys) & set(test.keys)
    assert "3 of its 24 samples" in train.remarks[0]
    assert train.remarks == test.remarks
    assert load_dataset(name, "test").keys == test.keys, "the same whoever asks, and when"
    save(tmp_path / "mine" / place / "cow" / "2.png")
    later = load_dataset(name, "test")
    assert [key for key in later.keys if "cow" not in key] == test.keys
    if place:
        save(tmp_path / "mine" / "validation" / "ant" / "9.png")
        assert load_dataset(name, "test").keys == ["ant/9.png"], "its own split comes first"


def test_splits_are_found_by_other_names(tmp_path: Path) -> None:
    both = {f"{split}/{label}": ["1.png"] for split in ("Training", "Testing") for label in "ab"}
    name = folder_of(tmp_path / "mri", both | {"extra/a": ["2.png"]})
    train, test = load_dataset(name), load_dataset(name, "test")
    assert train.class_names == test.class_names == ["a", "b"]
    assert train.keys == ["a/1.png", "b/1.png"]
    assert train.remarks == test.remarks
    assert "train from Training/, test from Testing/; not used: ['extra']" in train.remarks[0]


def test_a_test_folder_with_a_capital_is_used(tmp_path: Path) -> None:
    places = ("train/a", "train/b", "Test/a", "Test/b", "val/a")
    name = folder_of(tmp_path / "mine", {place: [f"{place[0]}.png"] for place in places})
    test = load_dataset(name, "test")
    assert test.keys == ["a/T.png", "b/T.png"]
    assert "test from Test/; not used: ['val']" in test.remarks[0]


def test_training_can_be_a_class(tmp_path: Path) -> None:
    name = folder_of(tmp_path / "mine", {"training": ["1.png"], "racing": ["1.png"]})
    assert load_dataset(name).class_names == ["racing", "training"]


def test_a_scan_says_what_it_left_out(tmp_path: Path) -> None:
    folder_of(tmp_path / "mine", {"ant": ["1.png"], "ant/in": ["2.png"], "bee": ["1.png"]})
    for file in ("x.jfif", "x.JPE", "x.gif", "y.gif", "x.avif"):
        (tmp_path / "mine" / "bee" / file).write_bytes(b"")
    (tmp_path / "mine" / "ant" / "up").symlink_to("..", target_is_directory=True)
    (tmp_path / "mine" / "ant" / "in" / "self").symlink_to("../../ant", target_is_directory=True)
    (tmp_path / "mine" / "ant" / "again").symlink_to("in", target_is_directory=True)
    data = image_folder(tmp_path / "mine", "train")
    assert data.keys == ["ant/1.png", "ant/in/2.png", "bee/1.png"]
    (remark,) = data.remarks
    for part in ("3 images are taken", "1 with .JPE", "1 with .avif", "2 with .gif", "1 with .jfif",
                 "['ant/again', 'ant/in/self', 'ant/up']"):  # fmt: skip
        assert part in remark


def test_a_linked_folder_elsewhere_is_followed(tmp_path: Path) -> None:
    folder_of(tmp_path / "mine", {"ant": ["1.png"], "bee": ["1.png"]})
    save(tmp_path / "other" / "3.png")
    (tmp_path / "mine" / "ant" / "more").symlink_to(tmp_path / "other", target_is_directory=True)
    data = image_folder(tmp_path / "mine", "train")
    assert data.keys == ["ant/1.png", "ant/more/3.png", "bee/1.png"]
    assert data.remarks == []


def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    name = folder_of(tmp_path / "mine", {"ant": ["1.png"], "bee": ["1.png"]})
    data = (tmp_path / "mine" / "ant" / "1.png").read_bytes()
    with open(bytes(tmp_path / "mine" / "ant") + b"/caf\xe9.png", "wb") as file:
        file.write(data)
    with pytest.raises(DataError, match=r"'ant/caf\\udce9.png' is not UTF-8 text: rename it"):
        load_dataset(name)


@pytest.mark.parametrize("hashed", [False, True])
def test_keys_of_another_unicode_form_are_told(hashed: bool, tmp_path: Path) -> None:
    decomposed, composed = "cafe\u0301", "caf\u00e9"
    name = npz(
        tmp_path / "mine.npz",
        x_train=pixels(2, 4, 4),
        y_train=np.arange(2),
        keys_train=np.array([decomposed, "b"]),
        x_test=pixels(2, 4, 4),
        y_test=np.arange(2),
    )
    keys = [composed, "b"]
    if hashed:
        keys = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    plan = Samples(keys, np.arange(2), hashed)
    with pytest.raises(MismatchError, match=r"1 of them are here .*NFD.*'cafe\\u0301': rename"):
        find_rows(load_dataset(name), plan)


def test_images_of_one_size_have_a_shape(tmp_path: Path) -> None:
    """Read from the headers, so that augmentations which need one size can be used."""
    name = folder_of(tmp_path / "mine", {"train/ant": ["1.png", "2.png"], "train/bee": ["1.png"],
                                         "test/ant": ["1.png"]})  # fmt: skip
    dataset = load_dataset(name)
    assert dataset.image_shape == (3, 12, 12)
    plan = ViewPlan(dataset, make_augmentation("exhaustive", dataset), seed=0)
    assert view_shape(plan) == (3, 12, 12)
    save(tmp_path / "mine" / "train" / "bee" / "2.png", side=13)
    assert load_dataset(name).image_shape is None


def test_the_shape_of_many_images_is_kept_until_a_file_changes(tmp_path: Path) -> None:
    mine, kept = tmp_path / "mine", tmp_path / "kept"
    name = folder_of(mine, {"train/ant": ["1.png", "2.png"], "train/bee": ["1.png"],
                             "test/ant": ["1.png"]})  # fmt: skip
    second = mine / "train" / "ant" / "2.png"

    def shape(folder: Path = kept) -> tuple[int, int, int] | None:
        return kept_shape(image_folder(mine, "train"), folder, many=2)

    assert shape() == (3, 12, 12)
    sound, before = second.read_bytes(), second.stat()
    second.write_bytes(bytes(len(sound)))
    os.utime(second, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shape() == (3, 12, 12)  # no header was read
    next(kept.iterdir()).write_text("[3, 12")  # damaged: headers are read
    assert shape() is None
    second.write_bytes(sound)
    assert shape() == (3, 12, 12)
    save(second, side=13)
    assert shape() is None
    assert shape(mine / "train" / "ant" / "1.png") is None  # nothing can be written there
    second.unlink()
    many = len(list(kept.iterdir()))
    assert load_dataset(name, root=kept).image_shape == (3, 12, 12)  # few images: nothing is kept
    assert len(list(kept.iterdir())) == many


def test_own_images_of_one_size_have_a_shape(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_dataset("somebodys:mine").image_shape == (3, 6, 7)

    class Large(Mine):
        def __getitem__(self, row: int) -> Any:
            assert row == 0, "large images are not all decoded"
            return Image.new("L", (97, 6))

    module.large = Large  # type: ignore[attr-defined]
    assert load_dataset("somebodys:large").image_shape is None
    fake_hub(monkeypatch, train={"label": [0, 1, 2]}, test={"label": [0, 1, 2]})
    assert load_dataset("hf:mine").image_shape == (3, 6, 7)
    fake_hub(monkeypatch, (240, 224), train={"label": [0, 1, 2]}, test={"label": [0, 1, 2]})
    assert load_dataset("hf:mine").image_shape == (3, 224, 240)  # read from headers at any size


def test_valid_can_be_a_class(tmp_path: Path) -> None:
    name = folder_of(tmp_path / "mine", {"valid": ["1.png"], "invalid": ["1.png"]})
    assert load_dataset(name).class_names == ["invalid", "valid"]


def test_arrays_without_a_test_split_hold_one_out(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2] * 10 + [-1] * 5)
    name = npz(tmp_path / "mine.npz", x_train=pixels(35, 4, 4), y_train=labels)
    train, test = load_dataset(name), load_dataset(name, "test")
    check(train)
    check(test)
    assert sorted(test.labels) == [0, 1, 2]
    assert (train.labels == -1).sum() == 5
    assert sorted(train.keys + test.keys) == [f"train/{i:02d}" for i in range(35)]


def test_arrays_for_validation_are_the_test_split(tmp_path: Path) -> None:
    x, y = pixels(6, 4, 4), np.array([0, 1, 2, 0, 1, 2])
    train = {"x_train": x, "y_train": y}
    name = npz(tmp_path / "mine.npz", **train, x_val=x[3:], y_val=y[3:], extra=y)
    test = load_dataset(name, "test")
    assert (test.split, test.keys) == ("test", ["val/0", "val/1", "val/2"])
    assert len(load_dataset(name)) == 6, "nothing is held out"
    assert "x_val and y_val are its test split" in test.remarks[0]
    assert "not used: ['extra']" in test.remarks[1]
    name = npz(tmp_path / "both.npz", **train, x_val=x, y_val=y, x_test=x[:3], y_test=y[:3])
    test = load_dataset(name, "test")
    assert test.keys == ["test/0", "test/1", "test/2"]
    assert test.remarks == ["arrays:both.npz holds arrays that are not used: ['x_val', 'y_val']"]


def test_classes_without_a_sample_are_told(tmp_path: Path) -> None:
    x = pixels(6, 4, 4)
    for labels, parts in (
        ([1, 2, 3, 1, 2, 3], ("1 of the 4 classes", "[0]", "Do its labels count from 1?")),
        ([0, 2, 4, 0, 2, 4], ("2 of the 5 classes", "[1, 3]")),
        ([0, 1, 2, 0, 1, -1], ()),
    ):
        name = npz(
            tmp_path / "mine.npz",
            x_train=x,
            y_train=np.array(labels),
            x_test=x,
            y_test=np.array(labels),
        )
        remarks = load_dataset(name).remarks
        assert len(remarks) == bool(parts)
        assert all(part in remarks[0] for part in parts)
        assert load_dataset(name, "test").remarks == []


def test_a_test_split_without_labels_is_refused_before_training(tmp_path: Path) -> None:
    x, y = pixels(3, 4, 4), np.arange(3)
    name = npz(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x, y_test=np.full(3, -1))
    with pytest.raises(DataError, match=r"none of the 3 test samples of .* has a label"):
        require_alike(load_dataset(name), load_dataset(name, "test"))


def test_hidden_files_and_folders_are_no_data(tmp_path: Path) -> None:
    name = folder_of(
        tmp_path / "mine",
        {
            "train/ant": ["1.png", "._1.png"],
            "train/bee": ["1.png"],
            "train/bee/.ipynb_checkpoints": ["1-checkpoint.png"],
            "train/.ipynb_checkpoints": ["x.png"],
            "val/ant": ["1.png"],
        },
    )
    data = load_dataset(name)
    assert data.class_names == ["ant", "bee"]
    assert data.keys == ["ant/1.png", "bee/1.png"]


def test_bad_images_left_out_are_told(tmp_path: Path) -> None:
    name = folder_of(tmp_path / "mine", {"train/ant": ["1.png", "2.png"], "train/bee": ["1.png"]})
    (tmp_path / "mine" / "val" / "ant").mkdir(parents=True)
    save(tmp_path / "mine" / "val" / "ant" / "1.png")
    (tmp_path / "mine" / "train" / "ant" / "2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"ant/2.png.*0 bytes.*--skip-bad"):
        load_dataset(name).decode(1)
    left = load_dataset(name, skip_bad=True)
    assert left.remarks == [
        "1 of 3 images of folder:mine (train) cannot be decoded and are left out: ['ant/2.png']"
    ]


def test_a_path_is_not_a_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"write folder:{tmp_path}"):
        load_dataset(str(tmp_path))


def test_grey_of_16_bits_keeps_its_greys(tmp_path: Path) -> None:
    grey = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    found = decode_file(tmp_path / "deep.png")
    assert found.shape == (3, 4, 4)
    assert np.array_equal(found[1].numpy(), grey >> 8)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"32 bits .*mode F.*save it with 8 bits"):
        decode_file(tmp_path / "float.tiff")


@pytest.mark.parametrize(
    ("layout", "split", "message"),
    [
        ({}, "train", "there is no such folder"),
        ({"train": []}, "train", "must hold a sub-folder per class, at least two; found none"),
        ({"train/ant": ["1.jpg"]}, "train", r"at least two; found \['ant'\]"),
        ({"train/ant": [], "train/bee": []}, "train", "2 class folders, but no image"),
        (
            {"train/ant": ["1.jpg"], "train/bee": [], "val/ant": ["1.jpg"]},
            "train",
            r"without an image .*: \['bee'\]. Each would count as a class",
        ),
        (
            {"train/ant": ["1.jpg"], "train/bee": ["1.jpg"], "val/cow": ["1.jpg"]},
            "test",
            r"has classes that .*train does not have: \['cow'\]; labels would mean different",
        ),
        ({"val/ant": ["1.jpg"], "val/bee": ["1.jpg"]}, "train", "has no folder train"),
    ],
)
def test_wrong_folders(
    layout: dict[str, list[str]], split: str, message: str, tmp_path: Path
) -> None:
    name = folder_of(tmp_path / "mine", layout)
    with pytest.raises(DataError, match=message):
        load_dataset(name, split)


def test_reordering_and_renaming_change_the_fingerprint(tmp_path: Path) -> None:
    name = folder_of(tmp_path, {"train/ant": ["1.jpg", "2.jpg"], "train/bee": ["1.jpg"], "val": []})
    before = load_dataset(name)
    assert load_dataset(name).fingerprint == before.fingerprint
    assert before.subset([1, 0, 2]).fingerprint != before.fingerprint
    save(tmp_path / "train" / "bee" / "2.jpg")
    assert load_dataset(name).fingerprint != before.fingerprint


def test_a_dataset_in_memory_has_the_pixels_of_its_files(tmp_path: Path) -> None:
    name = folder_of(tmp_path / "mine", {"ant": ["1.png", "2.png"], "bee": ["1.png"]})
    assert pixel_digest(in_memory(load_dataset(name))) == pixel_digest(load_dataset(name))


class Mine:
    """A user's own dataset."""

    class_names = ("no", "yes")

    def __init__(self, split: str) -> None:
        self.keys = [f"{split}-{i}" for i in range(5)]
        self.labels = [0, 1, 0, 1, -1]

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return Image.new("L", (7, 6), row), self.labels[row]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType("somebodys")
    made.mine = Mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys", made)
    return made


def test_a_dataset_of_the_users(module: types.ModuleType) -> None:
    dataset = load_dataset("somebodys:mine", "test")
    assert isinstance(dataset, MapDataset)
    check(dataset)
    assert dataset.keys[2] == "test-2"
    assert dataset.class_names == ["no", "yes"]
    assert dataset.labels[4] == -1
    assert torch.equal(
        dataset.subset([3, 1]).decode(0), torch.full((3, 6, 7), 3, dtype=torch.uint8)
    )


def test_wrong_datasets_of_the_users(module: types.ModuleType) -> None:
    module.keyless = lambda split: torchvision.datasets.FakeData(4)
    with pytest.raises(UsageError, match="must have `keys`"):
        load_dataset("somebodys:keyless")
    with pytest.raises(UsageError, match="cannot import 'somebodys:absent'"):
        load_dataset("somebodys:absent")

    class Floats(Mine):
        def __getitem__(self, row: int) -> Any:
            return torch.zeros(3, 4, 4)

    module.floats = Floats
    (remark,) = load_dataset("somebodys:floats").remarks
    assert "float32 items of shape 3x4x4" in remark
    assert "If they are pictures, give them as uint8" in remark


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_labels_do_not_wrap(dtype: Any, module: types.ModuleType) -> None:
    def factory(split: str) -> Mine:
        made = Mine(split)
        made.labels = np.array([0, 1, 0, 1, -1]).astype(dtype)
        return made

    module.wrapped = factory  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"found \d{10,20} in row 4; .*-1 in a signed dtype"):
        load_dataset("somebodys:wrapped")


def test_hugging_face(tmp_path: Path) -> None:
    hub = pytest.importorskip("datasets", reason="needs the extra kdcache[hf]")
    features = hub.Features({"picture": hub.Image(), "kind": hub.ClassLabel(names=["ant", "bee"])})
    images = [Image.fromarray(pixels(5 + i, 6, 3)) for i in range(4)]
    content = {"picture": images, "kind": [0, 1, 1, 0]}
    (tmp_path / "mine").mkdir()
    for split in ("train", "validation"):
        table = hub.Dataset.from_dict(content, features=features)
        table.to_parquet(str(tmp_path / "mine" / f"{split}.parquet"))
    name = f"hf:{tmp_path / 'mine'}"
    train = load_dataset(name, root=tmp_path)
    check(train)
    assert train.class_names == ["ant", "bee"]
    assert train.keys == ["train/0", "train/1", "train/2", "train/3"]
    assert np.array_equal(train.decode(2).permute(1, 2, 0).numpy(), np.asarray(images[2]))
    assert load_dataset(name, "test", root=tmp_path).keys[0] == "validation/0"
    with pytest.raises(DataError, match="was looked for in"):
        load_dataset("hf:nobody/nothing-like-this", root=tmp_path)


class FakeTable:
    """What kdcache uses of a table of `datasets`."""

    def __init__(self, features: dict[str, Any], content: dict[str, list[Any]]) -> None:
        self.features, self.content = features, content

    def __len__(self) -> int:
        return len(next(iter(self.content.values())))

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, str):
            return self.content[at]
        return {name: values[at] for name, values in self.content.items()}

    def cast_column(self, name: str, feature: FakeImage) -> FakeTable:
        assert not feature.decode
        return self

    def select_columns(self, names: list[str]) -> FakeTable:
        return FakeTable(self.features, {name: self.content[name] for name in names})


class FakeImage:
    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class FakeLabel:
    names = ("a", "b", "c")


def png(image: Image.Image) -> dict[str, Any]:
    data = io.BytesIO()
    image.save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def fake_hub(
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int] = (7, 6),
    **splits: dict[str, list[Any]],
) -> None:
    """`datasets` holding one dataset; columns of numbers or None are class labels."""

    def table(labels: dict[str, list[Any]]) -> FakeTable:
        images = [png(Image.new("L", size, i)) for i in range(len(next(iter(labels.values()))))]
        features = {"image": FakeImage()} | {name: FakeLabel() for name in labels}
        return FakeTable(features, {"image": images} | labels)

    made = types.ModuleType("datasets")
    hub = types.ModuleType("huggingface_hub")
    content: dict[str, Any] = {
        "Image": FakeImage,
        "ClassLabel": FakeLabel,
        "config": types.SimpleNamespace(HF_HUB_OFFLINE=False),
        "load_dataset": lambda *args, **options: {s: table(c) for s, c in splits.items()},
    }
    vars(made).update(content)
    vars(hub).update(constants=types.SimpleNamespace(HF_HUB_OFFLINE=False))
    monkeypatch.setitem(sys.modules, "datasets", made)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def test_hugging_face_takes_the_column_called_label(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"source": [0, 0, 0, 0], "label": [0, 1, 2, 1]}
    fake_hub(monkeypatch, train=columns, test=columns)
    data = load_dataset("hf:mine")
    check(data)
    assert data.labels.tolist() == [0, 1, 2, 1]
    assert "['source', 'label']; 'label' is used" in data.remarks[0]
    other = load_dataset("hf:mine::source")
    assert other.labels.tolist() == [0, 0, 0, 0]
    assert not any("is used" in remark for remark in other.remarks)
    with pytest.raises(DataError, match="none is 'sauce'"):
        load_dataset("hf:mine::sauce")


def test_hugging_face_does_not_guess_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, train={"fine": [0, 1, 2], "coarse": [0, 1, 1]})
    with pytest.raises(DataError, match="not clear: name it, as in hf:NAME:CONFIG:LABEL:IMAGE"):
        load_dataset("hf:mine")
    assert load_dataset("hf:mine::coarse").classes == 3


def test_hugging_face_null_labels_are_unlabelled(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, train={"label": [0, None, 2, 1]}, test={"label": [0, 1, 2]})
    assert load_dataset("hf:mine").labels.tolist() == [0, -1, 2, 1]


def test_hugging_face_tests_where_labels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"label": [0, 1, 2, 0, 1, 2]}
    hidden, shown = {"label": [-1, -1, None]}, {"label": [0, 1, 2]}
    fake_hub(monkeypatch, train=train, test=hidden, validation=shown)
    test = load_dataset("hf:mine", "test")
    assert test.keys[0] == "validation/0"
    assert test.labels.tolist() == [0, 1, 2]
    assert "no labels in ['test']" in test.remarks[0]
    fake_hub(monkeypatch, train=train, test=hidden)
    held = load_dataset("hf:mine", "test")
    assert sorted(held.labels) == [0, 1, 2]
    assert "held out of train" in held.remarks[-1]


def test_hugging_face_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'kdcache\[hf\]'"):
        load_dataset("hf:cifar10")


def test_unknown_names() -> None:
    with pytest.raises(UnknownName, match="did you mean 'cifar100'") as caught:
        load_dataset("cifar-100")
    for name in (*DATASETS, "arrays:FILE.npz", "folder:PATH", "hf:NAME"):
        assert name in str(caught.value)
    with pytest.raises(UsageError, match="digits has the splits train, test; asked for 'val'"):
        load_dataset("digits", "val")


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "kdcache" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_root() == tmp_path / "home" / ".cache" / "kdcache" / "data"
    with pytest.raises(DataError, match=r"\.cache/kdcache/data"):
        load_dataset("cifar10")


def test_real_cifar100(real_data: Path) -> None:
    train = load_dataset(f"arrays:{real_data / 'cifar100.npz'}")
    check(train)
    assert (len(train), train.classes, train.image_shape) == (50_000, 100, (3, 32, 32))
    assert train.images is not None
    mean = train.images.double().mean(dim=(0, 2, 3)) / 255
    np.testing.assert_allclose(mean, [0.50707516, 0.48654887, 0.44091784], atol=1e-7)
    assert train.class_names is not None
    assert train.class_names[train.labels[0]] == "cattle"


def test_real_fashion_mnist(real_data: Path) -> None:
    for split, count in (("train", 60_000), ("test", 10_000)):
        dataset = load_dataset("fashion-mnist", split, root=real_data)
        check(dataset)
        assert (len(dataset), dataset.image_shape) == (count, (1, 28, 28))
