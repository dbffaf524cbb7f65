"""The pages that introduce a store: README.md (a Hugging Face dataset card) beside croissant.json."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from kdcache_stores.errors import UsageError
from kdcache_stores.format.canonical_json import canonical_json, pretty_json
from kdcache_stores.format.manifest import CARD, CROISSANT
from kdcache_stores.objects.files import LocalFiles
from kdcache_stores.objects.hub import parse
from kdcache_stores.objects.urls import local_path, redact
from kdcache_stores.read.describing import describe, fields_text
from kdcache_stores.read.reader import Store, open_store
from kdcache_stores.share.croissant import croissant
from kdcache_stores.types import LOGITS

MEASURES = (
    ("KL(live, decoded) at T=1", "kl_t1"),
    ("KL(live, decoded) at T=4", "kl_t4"),
    ("KL of Z-scores at T=2", "kl_z"),
)

_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")


def write_card(
    path: str | os.PathLike[str], license: str = "other", url: str | None = None
) -> list[str]:
    """Write both pages into a store on this disk; returns their paths.

    Args:
        path: a sealed store.
        license: identifier of the licence of the logits, as the Hub and SPDX spell it.
        url: where the store is or will be published, for the snippets and the Croissant file.

    An existing README.md is replaced. Raises as `open_store` does, `UsageError`.
    """
    folder = local_path(path)
    if folder is None:
        raise UsageError(
            f"{redact(str(path))}: a card is written on this disk and pushed with the store"
        )
    if not _LICENSE.fullmatch(license):
        raise UsageError(f"{license!r:.80} is no identifier of a licence, such as cc-by-4.0 or mit")
    with open_store(folder) as store:
        where = redact(url) if url else os.path.basename(store.where)
        files = LocalFiles(folder)
        for key, data in (
            (CARD, readme(store, license, where).encode()),
            (CROISSANT, pretty_json(croissant(store, license, where))),
        ):
            files.put(key, data, replace=True)
        return [os.path.join(folder, key) for key in (CARD, CROISSANT)]


def readme(store: Store, license: str, where: str) -> str:
    """The dataset card."""
    info = _escaped(describe(store))
    where = re.sub(r"[^\w./:@%+=,~-]", "_", where)
    plan, teacher = info["plan"], info["teacher"]
    name = f"{fields_text(store)} of {teacher['architecture']} on {plan['dataset']}"
    front = {
        "license": license.lower(),
        "pretty_name": name,
        "tags": ["kdcache", "knowledge-distillation", *store.fields, "zarr"],
        "task_categories": ["other" if plan.get("item") else "image-classification"],
        "size_categories": [_size_category(info["samples"] * info["views"])],
        "viewer": False,
    }
    # JSON is YAML, so quoting needs no care of our own.
    lines = [f"{key}: {canonical_json(value)}" for key, value in front.items()]
    sections = [
        "---\n" + "\n".join(lines) + "\n---",
        f"# {_text(name)}",
        f"The outputs of one teacher for {info['views']} augmented views of each of {info['samples']:,} "
        f"samples: a store of [kdcache](https://pypi.org/project/kdcache/), for knowledge distillation "
        f"without running the teacher. Plain Zarr v3 and Parquet.",
        "## What it holds\n\n" + _table(("", ""), _facts(store, info)),
        "## Fidelity of the encoding\n\n" + _fidelity(info),
        "## Loading it\n\n" + _snippets(store, where),
        "## Provenance\n\n" + _table(("", ""), _provenance(info)),
    ]
    return "\n\n".join(sections) + "\n"


def _escaped(value: Any) -> Any:
    """A description of which no text is Markdown, HTML or a control: the card's one place to escape."""
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if not isinstance(value, str):
        return value
    text = "".join(char if char.isprintable() else " " for char in value)
    return re.sub(r"[<>\[\]|`\\*]", "_", text)


def _facts(store: Store, info: dict[str, Any]) -> list[tuple[str, str]]:
    plan, teacher = info["plan"], info["teacher"]
    views = f"{store.view_range.start} to {store.view_range.stop - 1}"
    rows = [
        ("dataset", f"{plan['dataset']}, split {plan['split']}, {plan['classes']} classes"),
        (
            "views",
            f"{views} of `{_text(canonical_json(plan['augmentation']))}`, seed {plan['seed']}",
        ),
        ("teacher", f"{teacher['architecture']}, {teacher['precision']}"),
        ("weights (SHA-256)", f"`{teacher['weights_sha256']}`"),
        ("preprocessing", f"`{_text(canonical_json(teacher['preprocessing']))}`"),
        ("size", f"{info['nbytes']:,} bytes"),
        *((f"field `{name}`", _field(item)) for name, item in info["fields"].items()),
        ("plan digest", f"`{plan['digest']}`"),
        ("content digest", f"`{info['digest']}`"),
    ]
    if logits := info["fields"].get(LOGITS):
        top1 = "no labels" if logits["top1"] is None else f"{100 * logits['top1']:.2f}%"
        rows.insert(3, ("teacher's top-1 on these views", top1))
    if item := plan.get("item"):
        rows.insert(1, ("items", f"`{_text(canonical_json(item))}`, no images"))
    if info["head"] is not None:
        rows.append(("last linear layer", "weight and bias, in `head/`"))
    if store.part is not None:
        part = f"views {views} of {store.part.views} of the store `{store.part.of}`"
        rows.append(("part", part))
    return rows


def _field(item: dict[str, Any]) -> str:
    shape = " x ".join(map(str, item["shape"]))
    encoding = _text(canonical_json(item["encoding"]))
    return f"{shape}, encoding `{encoding}`, {item['bytes_per_row']:.1f} bytes a row"


def _fidelity(info: dict[str, Any]) -> str:
    logits = info["fields"].get(LOGITS)
    parts = [_of_logits(logits["fidelity"])] if logits and logits["fidelity"] else []
    parts += [
        f"`{name}`: mean relative squared error {item['error']:.3g}{_through_head(item)}."
        for name, item in info["fields"].items()
        if item["error"] is not None
    ]
    return "\n\n".join(parts) or "Not measured when it was dumped."


def _through_head(item: dict[str, Any]) -> str:
    value = item["head_kl"]
    return "" if value is None else f", KL {value:.3g} nats of the logits that the head makes of it"


def _of_logits(measured: dict[str, float]) -> str:
    rows = [
        (title, f"{measured[f'{key}_mean']:.3g}", f"{measured[f'{key}_worst']:.3g}")
        for title, key in MEASURES
    ]
    agreement = f"{100 * measured['top1_agreement']:.3f}%"
    return (
        f"Measured on {measured['rows']:,.0f} rows of live logits when they were dumped; nats.\n\n"
        + _table(("", "mean", "worst"), rows)
        + f"\n\nTop-1 of live and decoded logits agree on {agreement} of the rows."
    )


def _snippets(store: Store, where: str) -> str:
    first = store.view_range.start
    name = LOGITS if LOGITS in store.fields else min(store.fields)
    field, encoding = store.layouts[name][0], store.fields[name].encoding
    shape = ", ".join(map(str, (len(store), *store.fields[name].shape)))
    raw = (
        f"the {name}"
        if encoding.plain
        else f"codes of the encoding {encoding.name} (see FORMAT.md in kdcache_stores)"
    )
    return f"""With kdcache, decoded and checked:

```python
from kdcache import open_store

store = open_store("{where}", expect="{store.digest}")
{name} = store.read(view={first}, field="{name}")  # float32 ({shape})
keys, labels = store.keys, store.labels
```

With zarr-python, {raw}:

```python
{_zarr(where)}
view = group["{field.path}"][{first}]
```

With TensorStore:

```python
{_tensorstore(where, field.path)}
view = array[{first}].read().result()
```

`samples.parquet` has the key and label of each row."""


def _zarr(where: str) -> str:
    """How zarr-python opens the group; URLs through obstore, which supports all of them."""
    if "://" not in where:
        return f'import zarr\n\ngroup = zarr.open_group("{where}", mode="r")'
    return f"""import zarr
from obstore.store import from_url
from zarr.storage import ObjectStore

group = zarr.open_group(ObjectStore(from_url("{_address(where)}"), read_only=True), mode="r")"""


def _tensorstore(where: str, path: str) -> str:
    """How TensorStore opens an array; what it does not support is pulled first."""
    address, pulled = _address(where), ""
    if address.startswith("az://"):
        address = where.rpartition("/")[2]
        pulled = f"# after: kdcache pull {where} {address}\n"
    kvstore = f'"{address}/{path}/"'
    if "://" not in address:
        kvstore = f'{{"driver": "file", "path": "{address}/{path}/"}}'
    spec = f'{{"driver": "zarr3", "kvstore": {kvstore}}}'
    return f"{pulled}import tensorstore as ts\n\narray = ts.open({spec}, read=True).result()"


def _address(where: str) -> str:
    """The address for tools that do not support hf://."""
    if not where.startswith("hf://"):
        return where
    place = parse(where)
    base = f"https://huggingface.co/datasets/{place.repo}/resolve/{place.revision}"
    return f"{base}/{place.folder}".rstrip("/")


def _provenance(info: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("format", ".".join(map(str, info["format"])))]
    for key, value in sorted(info["provenance"].items()):
        shown = value if isinstance(value, str) else canonical_json(value)
        rows.append((_text(key), f"`{_text(shown)}`"))
    return rows


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: str) -> str:
    """Text of the store in one cell of a table: what could end the cell or the code is replaced."""
    return re.sub(r"\s+", " ", value).replace("|", "\\|").replace("`", "'")


def _size_category(rows: int) -> str:
    bounds = (("1K", 10**3), ("10K", 10**4), ("100K", 10**5), ("1M", 10**6), ("10M", 10**7),
              ("100M", 10**8), ("1B", 10**9))  # fmt: skip
    below = "n<1K"
    for (low, start), (high, stop) in pairwise(bounds):
        if start <= rows < stop:
            below = f"{low}<n<{high}"
    return below if rows < 10**9 else "n>1B"
