"""A description of a store: what it holds, how large and how faithful each field is."""

from __future__ import annotations

from kdcache_stores.encodings.fidelity import combine, combine_means
from kdcache_stores.encodings.protocol import FittedEncoding
from kdcache_stores.format.canonical_json import Json
from kdcache_stores.format.header import Field
from kdcache_stores.format.manifest import NEWER_MEASURES, Entry
from kdcache_stores.read.reader import Store


def fields_text(store: Store) -> str:
    """The names of a store's fields, for a title: "Logits", "Logits and pooled"."""
    text = " and ".join(store.fields)
    return text[0].upper() + text[1:]


def describe(store: Store) -> dict[str, Json]:
    """What a store holds, plain JSON: for people and other programs.

    Of each field: `shape`, `encoding`, `nbytes`, `bytes_per_row`, bytes of its `arrays`, `fitted` (what
    its encoding was fitted to, in figures), and for the logits `labelled`, `top1` and `fidelity` (nats),
    for other fields that are not kept as floats `error` (mean relative squared error) and `head_kl` (mean
    KL of the logits that the head makes of them, if it does); None otherwise.
    """
    stored = [e for e in store.source.entries.values() if e.kind in ("shard", "once")]
    return {
        **store.header.to_dict(),
        "head": list(store.header.head) if store.header.head is not None else None,
        "where": store.where,
        "digest": store.digest,
        "views": store.n_views,
        "first_view": store.first_view,
        "part": vars(store.part) if store.part is not None else None,
        "view_digests": store.view_digests,
        "objects": len(store.source.entries),
        "nbytes": store.nbytes,
        "shard_rows": store.shard_rows,
        "probes": len(store.probes),
        "fields": {
            name: _describe_field(
                store, field, [entry for entry in stored if entry.key.startswith(f"{name}/")]
            )
            for name, field in store.fields.items()
        },
    }


def _describe_field(store: Store, field: Field, entries: list[Entry]) -> dict[str, Json]:
    nbytes = sum(entry.size for entry in entries)
    measured = entries if field.is_logits else []
    labelled = sum(entry.labelled or 0 for entry in measured)
    others = [] if field.is_logits else entries
    return {
        **field.to_dict(),
        "nbytes": nbytes,
        "bytes_per_row": nbytes / (store.n_views * len(store)),
        "arrays": {
            spec.name: sum(e.size for e in entries if e.key.split("/")[1] == spec.name)
            for spec in field.encoding.arrays(field.shape)
        },
        "fitted": _fitted(store, field),
        "labelled": labelled if field.is_logits else None,
        "top1": sum(e.correct or 0 for e in measured) / labelled if labelled else None,
        "fidelity": combine([e.fidelity for e in measured if e.fidelity]) or None,
        **{
            name: combine_means(
                [(e.shard.rows, value) for e in others if (value := getattr(e, name)) is not None]
            )
            for name in NEWER_MEASURES
        },
    }


def _fitted(store: Store, field: Field) -> dict[str, Json] | None:
    """What the encoding of a field was fitted to, in figures, if it is one that is."""
    if not isinstance(field.encoding, FittedEncoding):
        return None
    return {**field.encoding.figures(store.shared_arrays(field.name))}
