"""croissant.json: a store described for catalogues of data sets (MLCommons Croissant 1.0)."""

from __future__ import annotations

import re

from kdcache_stores.format.canonical_json import Json
from kdcache_stores.read.describing import describe, fields_text
from kdcache_stores.read.reader import Store

_CONTEXT: Json = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def croissant(store: Store, license: str, where: str) -> dict[str, Json]:
    """The Croissant 1.0 description: the Parquet files as records, the Zarr arrays as a set of files."""
    info = describe(store)
    plan, teacher = info["plan"], info["teacher"]
    base = where.rstrip("/") + "/" if "://" in where else ""
    tables = [
        _file_object(base, entry.key, entry.size, entry.sha256)
        for entry in store.source.entries.values()
        if entry.kind in ("samples", "probes")
    ]
    arrays = {
        "@type": "cr:FileObject",
        "@id": "store",
        "name": "store",
        "description": "The folder of the store: one Zarr v3 group.",
        "contentUrl": base or "./",
        "encodingFormat": "application/vnd+zarr",
        "sha256": store.source.manifest_sha256,
    }
    fields = [
        _column("row", "sc:Integer", "Row of the arrays."),
        _column("key", "sc:Text", "Key of the sample in its dataset."),
        _column("label", "sc:Integer", "Label, -1 if there is none."),
    ]
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": re.sub(
            r"[^A-Za-z0-9_-]+",
            "-",
            f"{teacher['architecture']}-{plan['dataset']}-{'-'.join(store.fields)}",
        ),
        "description": f"{fields_text(store)} of {teacher['architecture']} for {info['views']} augmented "
        f"views of {info['samples']} samples of {plan['dataset']} ({plan['split']}).",
        "license": license,
        "url": where,
        "version": "1.0.0",
        "datePublished": str(info["provenance"].get("time", ""))[:10] or "1970-01-01",
        "citeAs": f"kdcache store {store.digest}",
        "distribution": [arrays, *tables],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "samples",
                "name": "samples",
                "description": "Key and label of each row of the arrays.",
                "field": fields,
            }
        ],
    }


def _file_object(base: str, key: str, size: int, sha256: str) -> dict[str, Json]:
    return {
        "@type": "cr:FileObject",
        "@id": key,
        "name": key,
        "contentUrl": base + key,
        "contentSize": f"{size} B",
        "encodingFormat": "application/x-parquet",
        "sha256": sha256,
    }


def _column(name: str, kind: str, description: str) -> dict[str, Json]:
    return {
        "@type": "cr:Field",
        "@id": f"samples/{name}",
        "name": f"samples/{name}",
        "description": description,
        "dataType": kind,
        "source": {"fileObject": {"@id": "samples.parquet"}, "extract": {"column": name}},
    }
