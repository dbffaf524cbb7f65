"""Images in the rows of Parquet files, read where they lie: `parquet:PATTERN`."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.data.dataset import Dataset, Rows, index_keys
from kdcache.data.encoded.encoded_images import EncodedDataset
from kdcache.data.encoded.labels import Labels, number_labels
from kdcache.data.encoded.shard_files import Indexed, base_name, choose_split, find_shards, indexed
from kdcache_stores.errors import DataError
from kdcache_stores.format.tables import open_table
from kdcache_stores.objects.ranges import RangeFile, opened

#: Columns that hold the images, the labels and the samples' names, where none is asked for.
IMAGE_COLUMNS = ("image", "img", "jpg", "picture")
LABEL_COLUMNS = ("label", "labels", "cls", "class")
KEY_COLUMNS = ("key", "__key__", "id", "image_id", "file_name", "filename")
#: Bytes of images in memory, so that rows read one after the other are read from disk together.
HELD = 2**28
#: A group of rows of more bytes than this is slow to read from in random order.
LARGE_GROUP = 2**25
_COLUMNS = {"key": "string?", "label": "string?", "group": "int32"}


class ParquetDataset(EncodedDataset):
    """Rows of Parquet files. They are stored and read by groups of rows; some groups stay in memory.

    Args:
        shards: the files.
        column: the column of the images.
        place: int32 (N, 3): file, group and row in the group of each image.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        shards: Sequence[Indexed],
        column: str,
        place: NDArray[np.int32],
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
        self.shards = [(s.file, s.stamp) for s in shards]
        self.column, self.place = column, place
        self.remote = any(file.remote for file, _ in self.shards)
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_groups": OrderedDict()}

    def read(self, row: int, limit: int | None = None) -> bytes:
        """The bytes of a row's image; see `EncodedDataset`."""
        shard, group, at = self.place[row].tolist()
        value = self._group(shard, group)[at].as_py()
        if value is None:
            raise DataError(
                "the row holds no bytes of an image, but at most the path of a file: write the table "
                "with the images embedded"
            )
        data: bytes = value
        return data if limit is None else data[:limit]

    def _group(self, shard: int, group: int) -> Any:
        """The images of a group of rows: an Arrow array of bytes."""
        images = self._groups.pop((shard, group), None)
        if images is None:
            images = self._read_group(shard, group)
        self._groups[shard, group] = images
        while len(self._groups) > 1 and sum(g.nbytes for g in self._groups.values()) > HELD:
            self._groups.popitem(last=False)
        return images

    def _read_group(self, shard: int, group: int) -> Any:
        import pyarrow as pa

        file, stamp = self.shards[shard]
        try:
            with opened(file, stamp) as content:
                table = open_table(content).read_row_group(
                    group, columns=[self.column], use_threads=False
                )
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file.where}, group {group} of its rows: {error}") from error
        images = table.column(0).combine_chunks()
        return images.field("bytes") if pa.types.is_struct(images.type) else images

    def _select(self, rows: Rows) -> None:
        self.place, self._groups = self.place[rows], OrderedDict()


def parquet_images(
    pattern: str, split: str, root: Path, image_column: str = "", label_column: str = ""
) -> Dataset:
    """A split of the images in Parquet files: bytes in a column, as Hugging Face's tables hold them.

    The images are binary, or structs of `bytes` and `path`; labels integers (with the names of the
    classes in Hugging Face's metadata, if they are there) or texts, null where unlabelled. A key is the
    image's `path` if each row has another, else the value of a column of `KEY_COLUMNS` if each row has
    another, else "train/00042". Rows lie as in the files.

    Args:
        pattern: see `files_of`; `find_shards` says how splits are told apart.
        split: "train", "test" or "unlabeled".
        root: indices are kept in its folder `indices`.
        image_column: "": the only one of images, or the first of `IMAGE_COLUMNS`.
        label_column: "": the first of `LABEL_COLUMNS`.

    Raises:
        DataError: a file is absent or damaged, or which column is meant is not clear.
    """
    name = base_name("parquet", pattern)
    shards = find_shards(pattern, name)
    settings = {"image": image_column, "label": label_column}

    def index(files: list[RangeFile]) -> list[Indexed]:
        def build(file: RangeFile, stamp: tuple[int | str, ...]) -> tuple[Any, dict[str, Any]]:
            return _index(file, stamp, image_column, label_column)

        return indexed(files, _COLUMNS, settings, root / "indices", build)

    def make(wanted: str) -> Dataset:
        held = index(shards.splits[wanted])
        train = held if wanted == "train" else index(shards.splits["train"])
        return _split(name, wanted, held, train)

    return choose_split(shards, split, name, make)


def _split(name: str, split: str, held: list[Indexed], train: list[Indexed]) -> ParquetDataset:
    import pyarrow as pa

    what = f"{name} ({split})"
    for entry in ("image", "names"):
        values = {json.dumps(s.remarks[entry]): s.file.where for s in (*train, *held)}
        if len(values) > 1:
            raise DataError(
                f"{what}: its files differ in {'the names of classes' if entry == 'names' else 'columns'}"
                f": {list(values.values())[:2]}"
            )
    table = pa.concat_tables([s.table for s in held])
    if len(table) == 0:
        raise DataError(f"{what}: {len(held)} files hold no rows")
    shard = np.repeat(np.arange(len(held), dtype=np.int32), [len(s.table) for s in held])
    group = table["group"].to_numpy()
    new = np.flatnonzero((np.diff(shard, prepend=-1) != 0) | (np.diff(group, prepend=-1) != 0))
    within = np.arange(len(table)) - np.repeat(new, np.diff(np.append(new, len(table))))
    keys: list[str] = table["key"].to_pylist()
    if None in keys or len(set(keys)) < len(keys):
        keys = index_keys(split, range(len(table)), len(table))
    texts = table["label"].to_pylist()
    trained = (
        texts if split == "train" else [t for s in train for t in s.table["label"].to_pylist()]
    )
    names = held[0].remarks["names"]
    labels = number_labels(texts, trained, keys, split, what, names, partly=True)
    dataset = ParquetDataset(
        name,
        split,
        shards=held,
        column=held[0].remarks["image"],
        place=np.stack([shard, group, within], 1).astype(np.int32),
        keys=keys,
        labels=labels,
    )
    dataset.remarks = [remark for remark in held[0].remarks["chosen"] if remark]
    largest = max(s.remarks["largest"] for s in held)
    if largest > LARGE_GROUP:
        dataset.remarks.append(
            f"{what}: groups of rows have up to {largest / 1e6:.0f} MB, and each is read whole: slow in "
            "random order, as a training has it. Write the files with row_group_size=100, or as tar"
        )
    return dataset


def _index(
    file: RangeFile, stamp: tuple[int | str, ...], image_column: str, label_column: str
) -> tuple[Any, dict[str, Any]]:
    """Key, label and group of every row, and which columns they are from."""
    import pyarrow as pa

    try:
        with opened(file, stamp) as content:
            parquet = open_table(content)
            schema, metadata = parquet.schema_arrow, parquet.metadata
            image, chosen = _image_column(schema, image_column, file.where)
            label = _label_column(schema, label_column, file.where)
            is_struct = pa.types.is_struct(schema.field(image).type)
            keys = [c for c in KEY_COLUMNS if c in schema.names and c not in (image, label)]
            with_path = is_struct and schema.field(image).type.get_field_index("path") >= 0
            columns = [f"{image}.path"] * with_path + [c for c in (label, *keys) if c]
            table = parquet.read(columns=columns, use_threads=False)
            rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
            largest = max((_group_bytes(metadata, g, image) for g in range(len(rows))), default=0)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.where} is no Parquet file that Arrow reads: {error}") from error
    count = sum(rows)
    candidates = [table[image].combine_chunks().field("path")] if with_path else []
    candidates += [table[c].combine_chunks() for c in keys]
    key = next(
        (k.cast(pa.string()) for k in candidates if _is_key(k)), pa.nulls(count, pa.string())
    )
    index = pa.table(
        {
            "key": key,
            "label": table[label].cast(pa.string()) if label else pa.nulls(count, pa.string()),
            "group": pa.array(np.repeat(np.arange(len(rows), dtype=np.int32), rows)),
        }
    )
    return index, {
        "image": image,
        "names": _class_names(schema, label),
        "chosen": [chosen],
        "largest": largest,
    }


def _is_key(values: Any) -> bool:
    import pyarrow as pa

    kind = values.type
    usable = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)
    return usable and values.null_count == 0 and len(values.unique()) == len(values)


def _group_bytes(metadata: Any, group: int, image: str) -> int:
    group_metadata = metadata.row_group(group)
    columns = (group_metadata.column(i) for i in range(group_metadata.num_columns))
    sizes = [c.total_uncompressed_size for c in columns if c.path_in_schema.startswith(image)]
    return int(max(sizes))


def _image_column(schema: Any, asked: str, where: str) -> tuple[str, str]:
    """The column of the images, and what there is to say about the choice."""
    import pyarrow as pa

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_images(kind.field("bytes").type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    columns = [field.name for field in schema if holds_images(field.type)]
    usual = [c for c in IMAGE_COLUMNS if c in columns]
    image = asked or next(iter(usual or (columns if len(columns) == 1 else [])), "")
    if image not in columns:
        raise DataError(
            f"{where} has the columns of bytes {columns} among {schema.names}, and "
            f"{f'none is {asked!r}' if asked else 'which one holds the images is not clear'}: name it "
            "with --image-column (image_column=...)"
        )
    several = f"of the columns of bytes {columns}, {image!r} is used (--image-column names another)"
    return image, several if len(columns) > 1 and not asked else ""


def _label_column(schema: Any, asked: str, where: str) -> str:
    import pyarrow as pa

    label = asked or next((c for c in LABEL_COLUMNS if c in schema.names), "")
    if not label and not asked:
        return ""
    kind = schema.field(label).type if label in schema.names else pa.null()
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        raise DataError(
            f"{where} has no column {label!r} of integers or texts for the labels; it has "
            f"{dict(zip(schema.names, map(str, schema.types), strict=True))}. Name it with "
            "--label-column (label_column=...)"
        )
    return label


def _class_names(schema: Any, label: str) -> list[str] | None:
    """Names of the classes, where Hugging Face's metadata say them."""
    content = (schema.metadata or {}).get(b"huggingface")
    if content is None or not label:
        return None
    try:
        feature = json.loads(content)["info"]["features"].get(label, {})
        names = feature.get("names")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return [str(name) for name in names] if names else None
