"""A reader of stores that knows FORMAT.md and nothing else: json, NumPy, PyArrow, Blosc, crc32c."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
from numcodecs import blosc

Array = np.ndarray


def hash_json(kind: str, value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"kdcache {kind}\n{text}".encode()).hexdigest()


class FormatReader:
    """Every object is checked when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = (path / "manifest.parquet").read_bytes()
        seal = f"{hashlib.sha256(data).hexdigest()}  manifest.parquet\n"
        assert (path / "manifest.sha256").read_text() == seal
        table = pq.read_table(path / "manifest.parquet").to_pylist()
        self.entries = {row["key"]: row for row in table}
        assert list(self.entries) == sorted(self.entries)
        self.header = json.loads(self.get("zarr.json"))["attributes"]["kdcache"]
        assert self.header["format"] in ([1, 0], [1, 1])
        self.fields = {
            name: {"shape": item["shape"], "encoding": item["encoding"]}
            for name, item in self.header["fields"].items()
        }
        samples = pq.read_table(path / "samples.parquet").to_pydict()
        self.keys, self.labels = samples["key"], np.array(samples["label"], "<i8")

    def get(self, key: str) -> bytes:
        data = (self.path / key).read_bytes()
        entry = self.entries[key]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        return data

    def array(self, name: str) -> Array:
        about = json.loads(self.get(f"{name}/zarr.json"))
        shape = about["shape"]
        outer = about["chunk_grid"]["configuration"]["chunk_shape"]
        codec = about["codecs"][0]["configuration"]
        fill = np.nan if about["fill_value"] == "NaN" else about["fill_value"]
        out = np.full(shape, fill, about["data_type"])
        tail = "/0" * (len(shape) - 2)
        for view in range(shape[0]):
            for shard in range(-(-shape[1] // outer[1])):
                data = self.get(f"{name}/c/{view}/{shard}{tail}")
                for number, rows in enumerate(self.chunks(data, codec, outer[1], out)):
                    start = shard * outer[1] + number * len(rows)
                    out[view, start : start + len(rows)] = rows[: max(0, shape[1] - start)]
        return out

    def chunks(
        self, data: bytes, codec: dict[str, Any], shard_rows: int, out: Array
    ) -> list[Array]:
        chunk = codec["chunk_shape"][1:]
        count = shard_rows // chunk[0]
        index = np.frombuffer(without_crc(data[-16 * count - 4 :]), "<u8").reshape(count, 2)
        names = [item["name"] for item in codec["codecs"]]
        result = []
        for offset, size in index.tolist():
            raw = without_crc(data[offset : offset + size])
            if "blosc" in names:
                raw = blosc.decompress(raw)
            values = np.frombuffer(raw, out.dtype.newbyteorder("<"))
            if "transpose" in names:
                result.append(values.reshape(*chunk[1:], chunk[0]).T)
            else:
                result.append(values.reshape(chunk))
        return result

    def rows(self, field: str) -> Array:
        """All views, float64 (V, N, *shape)."""
        encoding, shape = self.fields[field]["encoding"], tuple(self.fields[field]["shape"])
        about = json.loads(self.get(f"{field}/zarr.json"))["attributes"]["kdcache"]
        assert about == self.fields[field]
        names = {
            "quantized": ("values", "mean", "std"),
            "topk": ("values", "ids", "mean", "std"),
            "compact": ("values", "mean", "std", "top", "base", "basis"),
            "channels": ("values", "spread"),
        }.get(encoding["name"], ("values",))
        f = {name: self.array(f"{field}/{name}") for name in names}
        values = f["values"].astype("f8")
        ones = (1,) * len(shape)
        if encoding["name"] == "quantized":
            mean, std = (
                f[name].astype("f8").reshape(*values.shape[:2], *ones) for name in names[1:]
            )
            return mean + std * encoding["step"] * (values - round(4 / encoding["step"]))
        if encoding["name"] == "channels":
            spread = f["spread"][0, 0].astype("f8")
            return (
                encoding["step"] * values * (spread[:, None, None] if len(shape) == 3 else spread)
            )
        if encoding["name"] == "topk":
            return np.stack([self.topk(f, v, shape[0]) for v in range(len(values))])
        if encoding["name"] == "compact":
            return np.stack([compact(f, v) for v in range(len(values))])
        return values

    @staticmethod
    def topk(f: dict[str, Array], view: int, classes: int) -> Array:
        values, ids = f["values"][view].astype("f8"), f["ids"][view].astype(int)
        out = np.empty((len(values), classes))
        for row, (entries, kept) in enumerate(zip(values, ids, strict=True)):
            assert len(set(kept)) == len(kept)
            mean, std = float(f["mean"][view, row]), float(f["std"][view, row])
            others = np.setdiff1d(np.arange(classes), kept)
            if m := len(others):
                t = (classes * mean - entries.sum()) / m
                square = (classes * (std**2 + mean**2) - (entries**2).sum()) / m - t**2
                s = np.sqrt(max(square, 0)) if m > 1 else 0.0
                out[row, others] = t + s / np.sqrt(max(m - 1, 1))
                out[row, others[kept.sum() % m]] = t - s * np.sqrt(m - 1)
            out[row, kept] = entries
        return out

    def digests(self) -> tuple[str, str, str, list[str], str]:
        """Fingerprint, plan, teacher, views, content."""
        hashed = self.header["keys"] == "sha256"
        total = hashlib.sha256(b"kdcache samples\n" + len(self.keys).to_bytes(8, "little"))
        for key, label in zip(self.keys, self.labels, strict=True):
            total.update(bytes.fromhex(key) if hashed else hashlib.sha256(key.encode()).digest())
            total.update(label.tobytes())
        plan, teacher = self.header["plan"], self.header["teacher"]
        named = ("augmentation", "seed")
        plan_digest = hash_json(
            "plan", {"fingerprint": total.hexdigest(), **{n: plan[n] for n in named}}
        )
        outputs = ("weights_sha256", "preprocessing", "precision")
        teacher_digest = hash_json("teacher", {name: teacher[name] for name in outputs})
        identity = {
            "format": 1, "plan": plan_digest, "teacher": teacher_digest,
            "samples": self.header["samples"], "fields": self.fields,
        }  # fmt: skip
        views: dict[int, list[list[str]]] = {}
        entries = self.entries.values()
        once = [[e["key"], e["sha256"]] for e in entries if e["kind"] == "once"]
        for entry in entries:
            if entry["kind"] == "shard":
                views.setdefault(entry["view"], list(once)).append([entry["key"], entry["sha256"]])
        listed = [
            hash_json("view", {"store": identity, "view": view, "shards": sorted(shards)})
            for view, shards in sorted(views.items())
        ]
        content = hash_json("store", {"store": identity, "views": listed})
        return total.hexdigest(), plan_digest, teacher_digest, listed, content


def without_crc(data: bytes) -> bytes:
    assert google_crc32c.value(data[:-4]) == int.from_bytes(data[-4:], "little")
    return data[:-4]


def compact(f: dict[str, Array], v: int) -> Array:
    signed = lambda codes: (codes.astype(int) >> 1) ^ -(codes & 1).astype(int)  # noqa: E731
    z = (signed(f["base"][0]) + 2 * signed(f["values"][v])) @ f["basis"][0, 0].astype("f8")
    std = f["std"][v].astype("f8")
    size = np.sqrt((z**2).mean(1))
    scale = np.divide(std, size, out=np.zeros_like(size), where=size > 0)
    rows = f["mean"][v].astype("f8")[:, None] + scale[:, None] * z
    for i in np.flatnonzero(f["top"][v]):
        top, largest = int(f["top"][v][i]) - 1, rows[i].argmax()
        high, low = rows[i].max(), rows[i, top]
        rows[i, top], rows[i, largest] = high + std[i] * 2**-16, low - std[i] * 2**-16
    return rows
