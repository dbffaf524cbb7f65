"""Images in archives and tables: the same samples, pixels and views as in the folder they come from."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kdcache.augment.specs import make_augmentation
from kdcache.data.dataset import Dataset
from kdcache.data.encoded import tar_shards
from kdcache.data.loading import load_dataset, with_columns
from kdcache.views.plan import ViewPlan
from kdcache_stores.errors import DataError, UsageError

CLASSES = ["ant", "bee", "bee 2"]


def jpeg(seed: int, height: int = 20, width: int = 26, form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(data, form)
    return data.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of three classes in train/ and val/, in JPEG and PNG, of several sizes."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 4), ("val", 2)):
        for number, label in enumerate(CLASSES):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                form = "PNG" if i == 1 else "JPEG"
                data = jpeg(100 * number + i + 50 * (split == "val"), 20 + i, 26 + number, form)
                (root / split / label / f"{i:03d}.{'png' if i == 1 else 'JPEG'}").write_bytes(data)
    return root


def load(name: str, split: str = "train", root: Path | None = None) -> Dataset:
    return load_dataset(name, split, root=root)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def content(folder: Path, split: str) -> list[tuple[str, bytes]]:
    data = load(f"folder:{folder}", split)
    place = folder / ("train" if split == "train" else "val")
    return [(key, (place / key).read_bytes()) for key in data.keys]


def packed(folder: Path, out: Path) -> str:
    """train.tar and val.tar with a folder per class, in disorder."""
    for split in ("train", "val"):
        write_tar(out / f"{split}.tar", [(f"./{k}", d) for k, d in content(folder, split)[::-1]])
    return f"tar:{out}/*.tar"


def web_shards(folder: Path, out: Path) -> str:
    """WebDataset shards of five samples, each with its number in NAME.cls."""
    for split in ("train", "val"):
        samples = content(folder, split)
        for at in range(0, len(samples), 5):
            members = []
            for key, data in samples[at : at + 5]:
                number = str(CLASSES.index(key.split("/")[0])).encode()
                members += [(key, data), (key.rpartition(".")[0] + ".cls", number + b"\n")]
            write_tar(out / f"photos-{split}-{at // 5:04d}.tar", members)
    return f"tar:{out}/photos-{{train,val}}-*.tar"


def table(folder: Path, out: Path) -> str:
    """Parquet files as Hugging Face writes them, in groups of five rows."""
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    for split in ("train", "val"):
        samples = content(folder, split)
        images = [{"bytes": data, "path": key} for key, data in samples]
        labels = [CLASSES.index(key.split("/")[0]) for key, _ in samples]
        pq.write_table(
            pa.table({"image": images, "label": labels}).replace_schema_metadata(noted),
            out / f"{split}-00000-of-00001.parquet",
            row_group_size=5,
        )
    return f"parquet:{out}/*.parquet"


Packer = Callable[[Path, Path], str]
PACKERS: list[Packer] = [packed, web_shards, table]


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_equal_to_the_folder_view_by_view(
    folder: Path, tmp_path: Path, pack: Packer, split: str
) -> None:
    expected = load(f"folder:{folder}", split)
    data = load(pack(folder, tmp_path), split, tmp_path / "root")
    assert data.keys == expected.keys
    assert data.labels.tolist() == expected.labels.tolist()
    assert data.fingerprint == expected.fingerprint
    assert (data.classes, data.image_shape) == (3, None)
    assert data.class_names == (None if pack is web_shards else CLASSES)
    assert data.remarks == []
    assert [data.size(row) for row in range(len(data))] == [
        expected.size(row) for row in range(len(data))
    ]
    for spec in ("resized-crop-flip:size=16", "resized-crop-flip:size=16+rand-augment+cutmix"):
        ours, theirs = (ViewPlan(d, make_augmentation(spec, d), 3) for d in (data, expected))
        assert ours.to_store().digest == theirs.to_store().digest
        rows = np.random.default_rng(0).permutation(len(data))
        for view in range(3):
            assert torch.equal(ours.images(rows, view), theirs.images(rows, view))


@pytest.mark.parametrize("pack", PACKERS)
def test_workers_read_the_same(folder: Path, tmp_path: Path, pack: Packer) -> None:
    data = load(pack(folder, tmp_path), root=tmp_path / "root")
    plan = ViewPlan(data, make_augmentation("resized-crop-flip:size=16", data), 0)
    batches = [(np.arange(6), 0), (np.arange(6, 12), 1)]
    for one, other in zip(plan.stream(batches), plan.stream(batches, workers=1), strict=True):
        assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("pack", PACKERS)
def test_a_subset_reads_its_own_rows(folder: Path, tmp_path: Path, pack: Packer) -> None:
    data = load(pack(folder, tmp_path), root=tmp_path / "root")
    part = data.subset([7, 2]).subset([1])
    assert part.keys == [data.keys[2]]
    assert torch.equal(part.decode(0), data.decode(2))


@pytest.mark.parametrize("pack", PACKERS)
def test_an_index_is_made_once_and_again_when_it_or_its_file_changes(
    folder: Path, tmp_path: Path, pack: Packer, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    name = pack(folder, tmp_path)
    first = load(name, root=root)
    kept = {path: path.read_bytes() for path in (root / "indices").iterdir()}
    assert load(name, root=root).keys == first.keys
    assert {path: path.read_bytes() for path in (root / "indices").iterdir()} == kept
    for path, data in kept.items():  # a flipped bit is noticed
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    assert load(name, root=root).keys == first.keys
    assert {path: path.read_bytes() for path in kept} == kept
    files = [p for p in tmp_path.iterdir() if "train" in p.name and p.is_file()]
    for file in files:
        os.utime(file, ns=(1, 1))
    with pytest.raises(DataError, match="was changed while it was in use"):
        first.subset([0, 1]).decode(0)
    assert load(name, root=root).keys == first.keys
    assert len(list((root / "indices").iterdir())) == len(kept) + len(files)


def test_without_a_test_split_a_tenth_is_held_out(folder: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "photos.tar", content(folder, "train"))
    name = f"tar:{tmp_path}/photos.tar"
    train, test = load(name, root=tmp_path), load(name, "test", tmp_path)
    assert (len(train), len(test)) == (9, 3)
    assert "held out of train" in test.remarks[-1]
    own = load(f"folder:{folder / 'train'}", "test")
    assert test.keys == own.keys


def test_names_of_classes_and_json(tmp_path: Path) -> None:
    samples = [("a", "wolf"), ("b", "ape"), ("c", "wolf")]
    members = []
    for i, (key, label) in enumerate(samples):
        noted = json.dumps({"caption": "x", "species": label, "label": i}).encode()
        members += [(f"{key}.jpg", jpeg(i)), (f"{key}.json", noted)]
    write_tar(tmp_path / "train.tar", members)
    write_tar(tmp_path / "test.tar", members[:2])
    name = f"tar:{tmp_path}/*.tar"
    data = load(with_columns(name, None, "species"), root=tmp_path)
    assert (data.class_names, data.labels.tolist()) == (["ape", "wolf"], [1, 0, 1])
    assert load(with_columns(name, None, "species"), "test", tmp_path).labels.tolist() == [1]
    assert load(name, root=tmp_path).labels.tolist() == [0, 1, 2]


def test_several_images_of_a_sample(tmp_path: Path) -> None:
    members = []
    for i in range(4):
        members += [(f"{i}.left.jpg", jpeg(i)), (f"{i}.right.jpg", jpeg(i + 10)),
                    (f"{i}.cls", str(i % 2).encode())]  # fmt: skip
    write_tar(tmp_path / "train.tar", members)
    write_tar(tmp_path / "test.tar", members)
    name = f"tar:{tmp_path}/*.tar"
    with pytest.raises(
        DataError, match=r"several images of one sample, '0.left.jpg'.*--image-column"
    ):
        load(name, root=tmp_path)
    data = load(with_columns(name, "right.jpg", None), root=tmp_path)
    assert data.keys == [f"{i}.right.jpg" for i in range(4)]
    with pytest.raises(DataError, match=r"no images called NAME.middle.jpg"):
        load(with_columns(name, "middle.jpg", None), root=tmp_path)


def test_stray_hidden_repeated_and_linked_members(folder: Path, tmp_path: Path) -> None:
    samples = content(folder, "train")
    name, data = samples[0]
    path = write_tar(tmp_path / "train.tar", [
        (name, b"an earlier version"), *samples, ("notes.txt", b"x"), ("ant/Thumbs.db", b"x"),
        (".DS_Store", b"x"), ("ant/._000.JPEG", b"x"), ("lost.cls", b"1"),
    ])  # fmt: skip
    with tarfile.open(path, "a") as archive:
        for linked, target, kind in (("ant/900.JPEG", name, tarfile.LNKTYPE),
                                     ("ant/901.JPEG", "000.JPEG", tarfile.SYMTYPE),
                                     ("ant/902.JPEG", "../elsewhere.JPEG", tarfile.SYMTYPE)):  # fmt: skip
            member = tarfile.TarInfo(linked)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    write_tar(tmp_path / "val.tar", content(folder, "val"))
    data_set = load(f"tar:{tmp_path}/*.tar", root=tmp_path)
    assert sorted(data_set.keys) == sorted(
        [k for k, _ in samples] + ["ant/900.JPEG", "ant/901.JPEG"]
    )
    for key in (name, "ant/900.JPEG", "ant/901.JPEG"):
        assert data_set.read(data_set.keys.index(key)) == data  # type: ignore[attr-defined]
    (remark,) = data_set.remarks
    for part in ("14 images are taken", "1 with .db, 1 with .txt", "['ant/000.JPEG']",
                 "['ant/902.JPEG']", "['lost']"):  # fmt: skip
        assert part in remark


def test_a_name_in_several_archives(tmp_path: Path) -> None:
    for split, shards in (("train", 2), ("test", 1)):
        for shard in range(shards):
            members = [
                member
                for i in range(3)
                for member in (
                    (f"{i}.jpg", jpeg(10 * shard + i)),
                    (f"{i}.cls", str(i % 2).encode()),
                )
            ]
            write_tar(tmp_path / f"{split}-{shard}.tar", members)
    data = load(f"tar:{tmp_path}/*.tar", root=tmp_path)
    assert data.keys == [f"train-{s}/{i}.jpg" for s in range(2) for i in range(3)]
    assert "3 names of members are in several archives" in data.remarks[0]
    assert load(f"tar:{tmp_path}/*.tar", "test", tmp_path).keys == ["0.jpg", "1.jpg", "2.jpg"]


@pytest.mark.parametrize(("harm", "message"), [
    (lambda d: d[:1500], "cannot be read as a tar archive"),
    (lambda d: d[:512] + bytes([255] * 512) + d[1024:], None),
    (lambda d: d[: 512 + 1024] + b"\xff" * 512 + d[2048:], "cannot be read as a tar archive"),
    (lambda d: __import__("gzip").compress(d), "Compressed archives cannot be read in parts"),
    (lambda d: b"", "cannot be read as a tar archive"),
])  # fmt: skip
def test_damaged_archives(
    folder: Path, tmp_path: Path, harm: Callable[[bytes], bytes], message: str | None
) -> None:
    samples = content(folder, "train")
    path = write_tar(tmp_path / "train.tar", samples)
    write_tar(tmp_path / "val.tar", content(folder, "val"))
    path.write_bytes(harm(path.read_bytes()))
    name = f"tar:{tmp_path}/*.tar"
    if message is not None:
        with pytest.raises(DataError, match=message):
            load(name, root=tmp_path)
        return
    data = load(name, root=tmp_path)  # a damaged image is an error when its turn comes
    with pytest.raises(DataError, match=r"image 'ant/000.JPEG' of tar:\*.tar \(row 0\)"):
        data.decode(0)
    kept = load_dataset(name, root=tmp_path, skip_bad=True)
    assert (len(kept), list(kept.skipped)) == (11, ["ant/000.JPEG"])


def test_an_archive_cut_short_between_members(folder: Path, tmp_path: Path) -> None:
    samples = content(folder, "train")
    path = write_tar(tmp_path / "train.tar", samples)
    write_tar(tmp_path / "val.tar", content(folder, "val"))
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1].offset
    path.write_bytes(path.read_bytes()[:last])
    data = load(f"tar:{tmp_path}/*.tar", root=tmp_path)
    assert len(data) == 11
    assert "may be cut short: ['train.tar']" in data.remarks[0]


def test_what_cannot_be_a_label(folder: Path, tmp_path: Path) -> None:
    def attempt(members: list[tuple[str, bytes]]) -> None:
        write_tar(tmp_path / "train.tar", members)
        load(f"tar:{tmp_path}/train.tar", root=tmp_path)

    image = jpeg(0)
    with pytest.raises(DataError, match=r"1 of 2 images have no label, the first: \['b.jpg'\]"):
        attempt([("a.jpg", image), ("a.cls", b"0"), ("b.jpg", image)])
    with pytest.raises(DataError, match=r"'a.jpg' has no label: there is no member a.cls"):
        attempt([("a.jpg", image), ("b.jpg", image)])
    with pytest.raises(DataError, match=r"a.json cannot be read"):
        attempt([("a.jpg", image), ("a.json", b"{")])
    with pytest.raises(DataError, match=r"label in a.json must be a number or a name, found \[1\]"):
        attempt([("a.jpg", image), ("a.json", b'{"label": [1]}')])
    with pytest.raises(DataError, match="An archive holds one split"):
        attempt([("train/x/a.jpg", image), ("val/x/a.jpg", image)])
    with pytest.raises(DataError, match="hold no image"):
        attempt([("a.txt", b"")])


def test_patterns(folder: Path, tmp_path: Path) -> None:
    web_shards(folder, tmp_path)
    counted = f"tar:{tmp_path}/photos-{{train-{{0000..0002}},val-{{0000..0001}}}}.tar"
    with pytest.raises(DataError, match="there is no such file"):
        load(counted, root=tmp_path)  # braces do not nest
    counted = f"tar:{tmp_path}/photos-train-{{0000..0002}}.tar"
    assert len(load(counted, root=tmp_path)) == 9
    with pytest.raises(DataError, match=r"photos-train-0003.tar: there is no such file"):
        load(f"tar:{tmp_path}/photos-train-{{0000..0003}}.tar", root=tmp_path)
    with pytest.raises(DataError, match="none of train"):
        load(f"tar:{tmp_path}/photos-val-*.tar", root=tmp_path)
    with pytest.raises(UsageError, match="credentials do not belong"):
        load("tar:https://me:secret@localhost/train.tar", root=tmp_path)
    with pytest.raises(UsageError, match="does not list its files"):
        load("tar:http://localhost/train-*.tar", root=tmp_path)
    with pytest.raises(UsageError, match="digits has no columns"):
        with_columns("digits", "image", None)


def test_columns_of_a_table(tmp_path: Path) -> None:
    images = [jpeg(i) for i in range(4)]
    columns = {"left": images, "right": images[::-1], "fine": ["x", "y", "x", "y"],
               "label": [0, 1, None, 2], "id": [7, 8, 9, 10]}  # fmt: skip
    for split in ("train", "test"):
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    name = f"parquet:{tmp_path}/*.parquet"
    with pytest.raises(
        DataError, match=r"\['left', 'right'\].*not clear: name it with --image-column"
    ):
        load(name, root=tmp_path)
    with pytest.raises(DataError, match="none is 'middle'"):
        load(with_columns(name, "middle", None), root=tmp_path)
    with pytest.raises(DataError, match="no column 'coarse' of integers or texts"):
        load(with_columns(name, "left", "coarse"), root=tmp_path)
    data = load(with_columns(name, "right", None), root=tmp_path)
    assert data.keys == ["7", "8", "9", "10"]
    assert (data.labels.tolist(), data.classes) == ([0, 1, -1, 2], 3)
    assert torch.equal(
        data.decode(3), load(with_columns(name, "left", "fine"), root=tmp_path).decode(0)
    )
    fine = load(with_columns(name, "left", "fine"), root=tmp_path)
    assert (fine.labels.tolist(), fine.class_names) == ([0, 1, 0, 1], ["x", "y"])


def test_damaged_tables(tmp_path: Path) -> None:
    def write(images: list[Any]) -> Path:
        table = pa.table({"image": pa.array(images, pa.binary()), "label": [0, 1, 0]})
        pq.write_table(table, tmp_path / "train.parquet")
        return tmp_path / "train.parquet"

    name = f"parquet:{tmp_path}/train.parquet"
    path = write([jpeg(0), None, b""])
    data = load_dataset(name, "train", tmp_path)
    rows = {key: row for row, key in enumerate(data.keys)}
    train = load_dataset(name, "test", tmp_path)
    everything = {**{k: (data, r) for k, r in rows.items()}, train.keys[0]: (train, 0)}
    for key, message in (("train/1", "holds no bytes of an image"), ("train/2", "empty")):
        dataset, row = everything[key]
        with pytest.raises(DataError, match=f"image '{key}' of parquet:train.parquet .*{message}"):
            dataset.decode(row)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="is no Parquet file that Arrow reads"):
        load(name, root=tmp_path)


class RangeHandler(SimpleHTTPRequestHandler):
    """Serves a folder, ranges too."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        tag = '"' + hashlib.sha256(data).hexdigest()[:16] + '"'
        if self.headers.get("If-Match", tag) != tag:
            self.send_response(412)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range")
        first, _, last = (asked or "=0-").partition("=")[2].partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", tag)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        if asked:
            self.send_header(
                "Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            )
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the files of a folder are, named with braces."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    names = sorted(path.name for path in folder.iterdir())
    try:
        yield f"http://127.0.0.1:{server.server_port}/{{{','.join(names)}}}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("pack", PACKERS)
def test_by_ranges_from_a_server(folder: Path, tmp_path: Path, pack: Packer) -> None:
    (tmp_path / "served").mkdir()
    local = load(pack(folder, tmp_path / "served"), root=tmp_path)
    with served(tmp_path / "served") as place:
        data = load(f"{'parquet' if pack is table else 'tar'}:{place}", root=tmp_path)
        assert (data.keys, data.remote) == (local.keys, True)
        ours, theirs = (
            ViewPlan(d, make_augmentation("resized-crop-flip:size=16", d), 0) for d in (data, local)
        )
        assert torch.equal(ours.images(range(12), 1), theirs.images(range(12), 1))
        for path in (tmp_path / "served").iterdir():
            path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(DataError, match="was changed while it was in use"):
            data.subset([11]).decode(0)


@pytest.mark.slow  # processes that are spawned import torch
def test_workers_read_from_a_server(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    packed(folder, tmp_path / "served")
    with served(tmp_path / "served") as place:
        data = load_dataset(f"tar:{place}", root=tmp_path, skip_bad=True, workers=1)
        plan = ViewPlan(data, make_augmentation("resized-crop-flip:size=16", data), 0)
        batches = [(np.arange(6), 0), (np.arange(6, 12), 1)]
        for one, other in zip(plan.stream(batches), plan.stream(batches, workers=1), strict=True):
            assert torch.equal(one.images, other.images)


def test_an_index_reads_what_tarfile_reads(tmp_path: Path) -> None:
    """Long names (GNU and pax) and other alphabets."""
    names = [f"ähre/{'x' * 150}.jpg", "bee/1.jpg", f"{'y' * 90}/{'z' * 120}.jpg"]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "train.tar"
        with tarfile.open(path, "w", format=form) as archive:
            for i, name in enumerate(names):
                member = tarfile.TarInfo(name)
                data = jpeg(i)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        (file,) = tar_shards.find_shards(str(path), "x").splits["train"]
        index, _ = tar_shards._index(file, tuple(file.stamp()), "")
        assert index["name"].to_pylist() == names
        with tarfile.open(path) as archive:
            assert index["offset"].to_pylist() == [m.offset_data for m in archive.getmembers()]
