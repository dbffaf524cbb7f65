"""A bucket, an empty cache and small stores."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.sharing.servers import s3_server
from tests.stores.conftest import dump


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("KDCACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_PROFILE", "KDCACHE_CACHE_SIZE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDVISIBLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "TOPSECRETKEY")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    name = f"team-{uuid4().hex}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_address}/{name}", method="PUT")).close()
    return f"s3://{name}"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Four views of 50 samples in shards of 20 rows."""
    return dump(tmp_path / "local" / "toy.zarr", views=4)
