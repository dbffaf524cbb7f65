"""Images in tar archives, read where they lie: `tar:PATTERN`, WebDataset shards or packed folders."""

from __future__ import annotations

import json
import os
import posixpath
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets.folder import IMG_EXTENSIONS

from kdcache.data.dataset import Dataset, Rows
from kdcache.data.encoded.encoded_images import EncodedDataset
from kdcache.data.encoded.labels import Labels, number_labels
from kdcache.data.encoded.shard_files import (
    Indexed,
    base_name,
    choose_split,
    find_shards,
    indexed,
)
from kdcache.data.folder import SPLITS
from kdcache_stores.errors import DataError
from kdcache_stores.objects.files import Stamp
from kdcache_stores.objects.ranges import RangeFile, opened

#: Fields of a .json member that are its sample's label, the first that is there.
LABEL_FIELDS = ("label", "cls", "class", "target")
_COLUMNS = {
    "name": "string",
    "offset": "int64",
    "size": "int64",
    "label": "string?",
    "sample": "string?",
}
_LARGEST_TEXT = 2**20
_SPLIT_WORDS = {word for words in SPLITS.values() for word in words}
#: Requests on their way at once, for the images of a batch.
_AT_ONCE = 16


class TarDataset(EncodedDataset):
    """Members of tar archives; a key is a member's name.

    Args:
        shards: the archives.
        shard: int32 (N,), the archive of each image.
        offset: int64 (N,), its first byte there.
        nbytes: int64 (N,).
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        shards: Sequence[Indexed],
        shard: NDArray[np.int32],
        offset: NDArray[np.int64],
        nbytes: NDArray[np.int64],
        keys: Sequence[str],
        labels: Labels,
    ) -> None:
        super().__init__(
            name,
            split,
            keys=keys,
            labels=labels.numbers,
            classes=labels.classes,
            class_names=labels.names,
        )
        self.shards: list[tuple[RangeFile, Stamp]] = [(s.file, s.stamp) for s in shards]
        self.shard, self.offset, self.nbytes = shard, offset, nbytes
        self.remote = any(file.remote for file, _ in self.shards)
        self._ahead: dict[int, bytes] = {}

    def read(self, row: int, limit: int | None = None) -> bytes:
        """The bytes of a row's member; see `EncodedDataset`."""
        if row in self._ahead and limit is None:
            return self._ahead.pop(row)
        file, stamp = self.shards[self.shard[row]]
        start, size = int(self.offset[row]), int(self.nbytes[row])
        data: bytes = file.read(start, size if limit is None else min(size, limit), stamp)
        return data

    def ahead(self, rows: Rows) -> None:
        """Fetch members that lie behind a network side by side."""
        if self.remote:
            self._ahead.clear()
            wanted = sorted(set(rows.tolist()))
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                self._ahead = dict(zip(wanted, threads.map(self.read, wanted), strict=True))

    def _select(self, rows: Rows) -> None:
        self.shard, self.offset = self.shard[rows], self.offset[rows]
        self.nbytes, self._ahead = self.nbytes[rows], {}


def tar_images(
    pattern: str, split: str, root: Path, image_column: str = "", label_column: str = ""
) -> Dataset:
    """A split of the images in tar archives, which are indexed once and never unpacked.

    A sample's label is its member NAME.cls (text: a number, or the name of a class), a field of its
    member NAME.json, or the name of the folder that its image lies in; the same for all samples. Rows
    lie as in the archives, or, where folders are the classes, as those of the unpacked folder would.
    Keys are the members' names (without a folder that all lie in); where a name is in several
    archives, all keys begin with the archive's. Of a name that is several times in one archive the
    last member counts, as when it is unpacked. Hidden members are not looked at; what else is left
    out, remarks say.

    Args:
        pattern: see `files_of`; `find_shards` says how splits are told apart.
        split: "train", "test" or "unlabeled".
        root: indices are kept in its folder `indices`.
        image_column: extension of the images, such as "left.jpg", where samples have several.
        label_column: field of the .json members; "": the first of `LABEL_FIELDS`.

    Raises:
        DataError: an archive is absent, compressed, cut short or damaged; samples without a label; a
            sample of several images.
    """
    name = base_name("tar", pattern)
    shards = find_shards(pattern, name)

    def index(files: list[RangeFile]) -> list[Indexed]:
        def build(file: RangeFile, stamp: tuple[int | str, ...]) -> tuple[Any, dict[str, Any]]:
            return _index(file, stamp, label_column)

        return indexed(files, _COLUMNS, {"label": label_column}, root / "indices", build)

    def make(wanted: str) -> Dataset:
        held = index(shards.splits[wanted])
        train = held if wanted == "train" else index(shards.splits["train"])
        return _split(name, wanted, held, train, image_column)

    return choose_split(shards, split, name, make)


def _split(
    name: str, split: str, held: list[Indexed], train: list[Indexed], image_column: str
) -> TarDataset:
    import pyarrow as pa

    what = f"{name} ({split})"
    table = pa.concat_tables([s.table for s in held])
    shard = np.repeat(np.arange(len(held), dtype=np.int32), [len(s.table) for s in held])
    members: list[str] = table["name"].to_pylist()
    offset, nbytes = table["offset"].to_numpy(), table["size"].to_numpy()
    texts: list[str | None] = table["label"].to_pylist()
    named = table["sample"].to_pylist() if table["sample"].null_count < len(table) else None
    chosen = _one_image_each(members, shard, named, image_column, what)
    if len(chosen) < len(members):
        members, texts = [members[i] for i in chosen], [texts[i] for i in chosen]
        shard, offset, nbytes = shard[chosen], offset[chosen], nbytes[chosen]
    if not members:
        raise DataError(f"{what}: {len(held)} archives hold no image ({', '.join(IMG_EXTENSIONS)})")
    keys = _without_common_folder(members)
    trained = texts
    if split != "train":
        trained = [text for s in train for text in s.table["label"].to_pylist()]
    if all(text is None for text in trained):
        if split != "unlabeled":
            texts = [_folder(key, what) for key in keys]
        trained = texts
        if split != "train":
            names = [name for s in train for name in s.table["name"].to_pylist()]
            trained = [_folder(key, what) for key in _without_common_folder(names)]
        # By class, then by name: "ant/x" before "ant 2/x", as folders are listed.
        order = sorted(range(len(keys)), key=lambda row: keys[row].replace("/", "\0", 1))
        keys, texts = [keys[row] for row in order], [texts[row] for row in order]
        shard, offset, nbytes = shard[order], offset[order], nbytes[order]
    labels = number_labels(texts, trained, keys, split, what)
    repeated = len(keys) - len(set(keys))
    if repeated:
        stems = [os.path.basename(s.file.where).removesuffix(".tar") for s in held]
        keys = [f"{stems[i]}/{key}" for i, key in zip(shard.tolist(), keys, strict=True)]
    dataset = TarDataset(
        name,
        split,
        shards=held,
        shard=shard,
        offset=offset,
        nbytes=nbytes,
        keys=keys,
        labels=labels,
    )
    dataset.remarks = _remarks(what, held, len(keys))
    if repeated:
        dataset.remarks.append(
            f"{what}: {repeated} names of members are in several archives, so keys begin with the "
            f"archive's name, such as {keys[0]!r}"
        )
    return dataset


def _one_image_each(
    members: list[str],
    shard: NDArray[np.int32],
    samples: list[str | None] | None,
    column: str,
    what: str,
) -> NDArray[np.int64]:
    """Of samples with several images, those with the extension that was asked for.

    Args:
        members: names of the images.
        shard: of each, (N,).
        samples: the name that each shares with its label; None where none has one.
        column: the extension, or "".
        what: the dataset, for errors.
    """
    chosen = list(range(len(members)))
    if column:
        end = "." + column.removeprefix(".")
        chosen = [i for i in chosen if members[i].endswith(end)]
        if not chosen:
            raise DataError(f"{what} has no images called NAME{end}; there is {members[:1]}")
    first: dict[tuple[int, str | None], int] = {}
    for i in chosen if samples else []:
        assert samples is not None
        place = (int(shard[i]), samples[i])
        if samples[i] and (other := first.setdefault(place, i)) != i:
            raise DataError(
                f"{what} has several images of one sample, {members[other]!r} and {members[i]!r}: "
                "name the extension of those to use with --image-column (image_column=...)"
            )
    return np.array(chosen, dtype=np.int64)


def _stem(member: str) -> str:
    return posixpath.splitext(member)[0]


def _without_common_folder(members: list[str]) -> list[str]:
    """Names below the one folder in which all lie, if folders are left below it."""
    first = members[0].split("/", 1)[0] + "/"
    if all(m.startswith(first) and "/" in m[len(first) :] for m in members):
        return [m[len(first) :] for m in members]
    return members


def _folder(key: str, what: str) -> str:
    folder, slash, _ = key.partition("/")
    if not slash:
        raise DataError(
            f"{what}: {key!r} has no label: there is no member {_stem(key)}.cls, no "
            f"{_stem(key)}.json with a field {' or '.join(LABEL_FIELDS)} (--label-column names another), "
            "and it lies in no folder that could be its class"
        )
    if folder.lower() in _SPLIT_WORDS:
        raise DataError(
            f"{what}: {key!r} lies in a folder called like a split. An archive holds one split: pack "
            "each into its own, train.tar and val.tar"
        )
    return sys.intern(folder)


def _remarks(what: str, held: list[Indexed], taken: int) -> list[str]:
    left_out: Counter[str] = Counter()
    lists: dict[str, list[str]] = {"repeated": [], "links": [], "orphans": [], "unended": []}
    for shard in held:
        left_out.update(shard.remarks["left_out"])
        for kind, members in lists.items():
            members += shard.remarks[kind]
    kinds = ", ".join(f"{count} with {suffix}" for suffix, count in sorted(left_out.items()))
    parts = [f"left out are members of other extensions than images have here: {kinds}"] * bool(
        left_out
    )
    texts = {
        "repeated": "members that are several times in an archive, of which the last is taken",
        "links": "left out are links to what their archive does not hold",
        "orphans": "left out are labels without an image",
        "unended": "archives without the mark that ends one, which may be cut short",
    }
    parts += [
        f"{texts[kind]}: {members[:5]}{f' and {len(members) - 5} more' if len(members) > 5 else ''}"
        for kind, members in lists.items()
        if members
    ]
    return ["; ".join([f"{what}: {taken} images are taken", *parts])] if parts else []


def _index(
    file: RangeFile, stamp: tuple[int | str, ...], label_field: str
) -> tuple[Any, dict[str, Any]]:
    """Names, places and labels of the images in an archive, in order, and what was left out."""
    import pyarrow as pa

    scan = _TarScan(file.where, label_field)
    try:
        with (
            opened(file, stamp) as content,
            tarfile.open(fileobj=content, mode="r:", errorlevel=2, encoding="utf-8") as archive,
        ):
            while (member := archive.next()) is not None:
                scan.take(archive, member)
                archive.members.clear()  # type: ignore[attr-defined] # they would be kept: memory for each
            # tarfile takes any block that is no header for the end.
            content.seek(archive.offset)
            last = content.read(tarfile.BLOCKSIZE)
            if last not in (b"", bytes(tarfile.BLOCKSIZE)):
                raise EOFError(f"no header of a member at byte {archive.offset}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"{file.where} cannot be read as a tar archive ({error}): it is damaged, cut short, or "
            "compressed. Compressed archives cannot be read in parts: decompress it once"
        ) from error
    samples = scan.samples()
    table = pa.table(
        {
            "name": pa.array(list(scan.images), pa.string()),
            "offset": pa.array([at for at, _ in scan.images.values()], pa.int64()),
            "size": pa.array([size for _, size in scan.images.values()], pa.int64()),
            "label": pa.array([scan.texts.get(s or "") for s in samples], pa.string()),
            "sample": pa.array(samples, pa.string()),
        }
    )
    return table, {
        "left_out": dict(scan.left_out),
        "repeated": scan.repeated,
        "links": scan.links,
        "orphans": sorted(scan.texts.keys() - set(samples)),
        "unended": [] if last else [os.path.basename(file.where)],
    }


class _TarScan:
    """What an archive holds, member by member."""

    def __init__(self, where: str, label_field: str) -> None:
        self.where, self.label_field = where, label_field
        self.images: dict[str, tuple[int, int]] = {}
        self.pending: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.left_out: Counter[str] = Counter()
        self.repeated: list[str] = []
        self.links: list[str] = []

    def take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Note a member; raises `DataError` for a label that cannot be read."""
        name = posixpath.normpath(member.name).lstrip("/")
        if member.isdir() or any(part.startswith(".") for part in name.split("/")):
            return
        stem, suffix = posixpath.splitext(name)
        is_image = suffix.lower() in IMG_EXTENSIONS
        if member.issym() or member.islnk():
            folder = posixpath.dirname(name) if member.issym() else ""
            if is_image:
                self.pending[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
        elif not member.isreg() or member.issparse():
            self.left_out["a special file's type"] += 1
        elif is_image:
            if name in self.images:
                self.repeated.append(name)
                del self.images[name]
            self.images[name] = (member.offset_data, member.size)
        elif suffix in (".cls", ".json"):
            text = self._text(archive, member, name)
            if text is not None and (suffix == ".cls" or stem not in self.texts):
                self.texts[stem] = text
        else:
            self.left_out[suffix or "no extension"] += 1

    def _text(self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> str | None:
        """The label in a .cls or .json member; None where the latter has none."""
        opened_member = archive.extractfile(member)
        if member.size > _LARGEST_TEXT or opened_member is None:
            raise DataError(f"{self.where}: {name} has {member.size} bytes, too many for a label")
        try:
            text = opened_member.read().decode()
            if name.endswith(".cls"):
                return text.strip()
            content = json.loads(text)
        except ValueError as error:
            raise DataError(f"{self.where}: {name} cannot be read ({error})") from error
        fields = (self.label_field,) if self.label_field else LABEL_FIELDS
        value = next((content[f] for f in fields if f in content), None) if content else None
        if value is not None and not (isinstance(value, int | str) and not isinstance(value, bool)):
            raise DataError(
                f"{self.where}: the label in {name} must be a number or a name, found {value!r:.80}"
            )
        return None if value is None else str(value).strip()

    def samples(self) -> list[str | None]:
        """Of each image the name that it shares with its label, None where it has none."""
        for name, target in self.pending.items():
            if target in self.images:
                self.images[name] = self.images[target]
            else:
                self.links.append(name)
        samples = []
        for name in self.images:
            folder, slash, base = name.rpartition("/")
            names = (_stem(name), f"{folder}{slash}{base.split('.', 1)[0]}")
            samples.append(next((n for n in names if n in self.texts), None))
        return samples
