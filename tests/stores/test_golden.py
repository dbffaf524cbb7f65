"""The golden stores read as they were written, by kdcache and by other Zarr readers."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import zarr

from kdcache_stores import Store, open_store, verify
from kdcache_stores.encodings.encoding_names import make_encoding
from kdcache_stores.encodings.protocol import FittedEncoding
from tests.data.make_golden import STORES, head, make, samples, values

from .format_reader import FormatReader

DATA = Path(__file__).parents[1] / "data"
DIGESTS = {
    "train": "f6d647462d8d86f0cd121b95c7b50afa96f1471de4bd185c502f09d7a9ad490e",
    "test": "e3a4b74be3917861cabf1c595512e76c1061027c7fe98b976f8e5770221a0bad",
    "unlabelled": "59e7639a55cd835b4d4bafaa6a9830444d0d1a82a7d5bf45be0f5b9050023835",
    "weak-strong": "5094b3e43a436bdd4a9418f62ecb2149cbd389ed89af9d5504661908839a60ed",
    "feature-map": "5a510d29309d2ba548702318d43e03e1e8c7cb47d4fed2f9f2e6c6fec363e459",
    "compact": "0246a1c9e95f1fb71c78dcfa7c8687f3b43279dbf1ddb975a7a11fb63937b113",
    "features": "31732fd8c624da0415f010d945414728559cf88900f73aeb2c722f7b8d339d7e",
    "sequences": "21403a2d7eea013a70e5cb4f924f7bb6c57601d5b2980f557891afe6847ec1fd",
}


def golden(name: str) -> Store:
    return open_store(DATA / f"golden-{name}", expect=DIGESTS[name])


def decoded(name: str, field: str, view: int) -> np.ndarray:
    shape, encoding = STORES[name]["fields"][field]
    live = values(view, len(STORES[name]["keys"]), shape)
    out = np.empty_like(live)
    item = make_encoding(encoding)
    shared: dict[str, np.ndarray] = {}
    if isinstance(item, FittedEncoding):
        first, second = (values(view, len(live), shape) for view in (0, 1))
        shared = item.fit(np.stack([first, second]))
        shared |= item.base(first, shared)
    item.decode({**item.encode(live, samples(name).labels, shared), **shared}, out)
    return out


@pytest.mark.parametrize("name", STORES)
def test_golden_stores_read_as_written(name: str) -> None:
    store = golden(name)
    assert verify(store).ok
    assert store.plan.fingerprint == samples(name).fingerprint
    assert np.array_equal(store.labels, samples(name).labels)
    assert store.n_views == STORES[name]["views"]
    for field in STORES[name]["fields"]:
        for view in range(store.n_views):
            rows, expected = store.read(view, field=field), decoded(name, field, view)
            # A matrix product may differ in its last bits with the machine.
            fitted = isinstance(store.fields[field].encoding, FittedEncoding)
            np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-4 if fitted else 0)
            assert np.array_equal(rows.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("name", STORES)
def test_the_generator_makes_the_same_stores(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "store")
    again = open_store(tmp_path / "store")
    assert again.view_digests == golden(name).view_digests
    assert again.digest == DIGESTS[name]


@pytest.mark.parametrize("name", STORES)
def test_other_readers_see_equal_numbers(name: str) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    path = DATA / f"golden-{name}"
    store = golden(name)
    for field in STORES[name]["fields"]:
        for layout in store.layouts[field]:
            spec = layout.spec
            ours = zarr.open_array(path / field / spec.name, mode="r")[...]
            theirs = tensorstore.open(
                {
                    "driver": "zarr3",
                    "kvstore": {"driver": "file", "path": f"{path / field / spec.name}/"},
                },
                read=True,
            ).result()
            assert np.array_equal(theirs.read().result(), ours)
            assert ours.shape[:2] == (layout.views, layout.samples)
            if spec.per == "row":
                assert ours.shape[:2] == (store.n_views, len(store))
            if spec.name == "values" and spec.dtype.startswith("float") and len(spec.shape) == 1:
                width = min(spec.shape[0], 7)
                if spec.shape == store.fields[field].shape:
                    assert np.array_equal(ours[0, :, :width], store.read(0)[:, :width])


@pytest.mark.parametrize("name", STORES)
def test_a_reader_needs_nothing_but_the_description(name: str) -> None:
    """An independent reader decodes every encoding to the same rows and agrees on every digest."""
    theirs, store = FormatReader(DATA / f"golden-{name}"), golden(name)
    for field in STORES[name]["fields"]:
        rows = theirs.rows(field)
        for view in range(store.n_views):
            np.testing.assert_allclose(store.read(view, field=field), rows[view], rtol=0, atol=2e-5)
    assert theirs.digests() == (
        store.plan.fingerprint, store.plan.digest, store.teacher.digest,
        store.view_digests, store.digest,
    )  # fmt: skip
    if "head" in STORES[name]:
        weight, bias = theirs.array("head/weight")[0, 0], theirs.array("head/bias")[0, 0, 0]
        assert store.head is not None
        assert np.array_equal(store.head[0], weight)
        assert np.array_equal(store.head[1], bias)


def test_formats_are_as_old_as_they_can_be() -> None:
    minor = {name: golden(name).header.minor for name in STORES}
    assert minor == {name: int(name == "features") for name in STORES}


def test_a_head_is_kept_beside_the_fields() -> None:
    store = golden("features")
    assert store.head is not None
    for kept, live in zip(store.head, head(), strict=True):
        assert kept.dtype == np.float32
        assert np.array_equal(kept, live)
    assert "head" not in store.fields
    assert golden("compact").head is None


def test_sha256sum_checks_the_seal() -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    command = ["sha256sum", "-c", "manifest.sha256"]
    done = subprocess.run(command, cwd=DATA / "golden-train", capture_output=True, check=False)
    assert done.returncode == 0


def test_a_pair_of_views_is_two_views() -> None:
    store = golden("weak-strong")
    branches = store.plan.augmentation["branches"]
    assert [branches[view % len(branches)] for view in range(4)] == ["weak", "strong"] * 2


def test_sequences_are_runs_of_rows() -> None:
    store = golden("sequences")
    lengths: dict[str, int] = {}
    for key in store.keys:
        lengths[key.split("#")[0]] = lengths.get(key.split("#")[0], 0) + 1
    assert lengths == {"text-0": 5, "text-1": 2, "text-2": 4}
    second = store.read(0, slice(5, 7))
    live = values(0, 11, (300,))[5:7]
    assert second.shape == (2, 300)
    assert np.array_equal(second.argmax(1), live.argmax(1))
    assert second[0, 8] == live[0, 8]  # the label's own logit, whatever its rank


def test_hashed_keys_are_digests_of_the_real_ones() -> None:
    store = golden("unlabelled")
    assert store.keys_hashed
    keys = [hashlib.sha256(key.encode()).hexdigest() for key in STORES["unlabelled"]["keys"]]
    assert store.keys == keys
