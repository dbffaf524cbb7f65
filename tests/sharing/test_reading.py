"""Stores read through URLs: web servers with and without ranges, S3, faults, the local cache."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kdcache_stores import (
    CorruptStore,
    FormatError,
    RemoteError,
    Store,
    StoreError,
    StoreNotFound,
    UnfinishedStore,
    UsageError,
    describe,
    open_store,
    verify,
)
from kdcache_stores.format.manifest import sha256
from kdcache_stores.objects import hub
from kdcache_stores.objects.bucket import Bucket
from kdcache_stores.objects.cache import ObjectCache, parse_size
from kdcache_stores.objects.remote import RemoteFiles
from kdcache_stores.objects.urls import redact
from kdcache_stores.share.push import push_store
from tests.sharing.servers import FAULTS, StaticServer
from tests.stores.conftest import dump, make_samples, open_writer, write_pending


def same_logits(a: Store, path: Path) -> bool:
    with open_store(path) as b:
        return all(np.array_equal(a.read(view), b.read(view)) for view in b.view_range)


@pytest.mark.parametrize("ranges", [True, False])
def test_web_server(store: Path, ranges: bool) -> None:
    with StaticServer(store.parent, ranges=ranges) as server:
        with open_store(f"{server.url}/toy.zarr") as remote:
            assert same_logits(remote, store)
            assert remote.digest == open_store(store).digest
            assert verify(remote).ok
            assert remote.keys == open_store(store).keys
            assert describe(remote)["where"] == f"{server.url}/toy.zarr"
        assert {method for method, _, _ in server.requests} == {"GET"}


def test_python_http_server(store: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen(
        command, cwd=store.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        with open_store(f"http://127.0.0.1:{port}/toy.zarr") as remote:
            assert same_logits(remote, store)
            assert verify(remote).ok
    finally:
        process.terminate()
        process.wait()


def test_file_url(store: Path) -> None:
    with open_store(f"file://{store}") as remote:
        assert same_logits(remote, store)


def test_s3(store: Path, bucket: str) -> None:
    push_store(store, f"{bucket}/deep/folder/toy.zarr")
    with open_store(f"{bucket}/deep/folder/toy.zarr") as remote:
        assert same_logits(remote, store)
        again = pickle.loads(pickle.dumps(remote))
        assert np.array_equal(again.read(1), remote.read(1))


# ---- faults --------------------------------------------------------------------------------------


def read_under_faults(store: Path, ranges: bool, faults: tuple[str, ...], budget: int) -> int:
    """Open and read again and again until the server has spent its faults; the rounds it took."""
    rounds = 0
    with StaticServer(
        store.parent, ranges=ranges, faults=faults, rate=0.35, budget=budget, seed=budget
    ) as server:
        while server.injected.total() < budget:
            with open_store(f"{server.url}/toy.zarr", cache_size=0) as remote:
                assert same_logits(remote, store)
            rounds += 1
    return rounds


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault(store: Path, fault: str) -> None:
    assert read_under_faults(store, True, (fault,), 6)


@pytest.mark.parametrize("ranges", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_many_faults_lose_nothing(store: Path, ranges: bool) -> None:
    assert read_under_faults(store, ranges, FAULTS, 40)


@pytest.mark.slow
@pytest.mark.parametrize("ranges", [True, False])
def test_a_thousand_faults_lose_nothing(store: Path, ranges: bool) -> None:
    assert read_under_faults(store, ranges, FAULTS, 1000)


def test_a_dropped_connection_is_resumed_where_it_stopped(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(6 * 2**20)
    (tmp_path / "object").write_bytes(data)
    with StaticServer(tmp_path, faults=("truncated",), rate=1.0, budget=3) as server:
        assert Bucket(server.url).get("object") == data
        starts = [header for _, _, header in server.requests]
    assert starts[0] is None
    assert any(header and header != "bytes=0-" for header in starts[1:])
    with StaticServer(tmp_path, ranges=False, faults=("truncated",), rate=1.0, budget=3) as server:
        assert Bucket(server.url).get("object") == data


def test_an_object_that_changes_while_it_is_resumed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(bytes(4 * 2**20))
    with StaticServer(tmp_path, faults=("truncated",), rate=1.0, budget=1) as server:
        stream = Bucket(server.url).stream("object")
        next(stream)
        (tmp_path / "object").write_bytes(b"\1" * (4 * 2**20))
        with pytest.raises(RemoteError):
            list(stream)


@pytest.mark.parametrize("damage", ["flip", "short", "long", "missing"])
def test_damaged_for_good(store: Path, damage: str) -> None:
    shard = store / "logits" / "values" / "c" / "1" / "0" / "0"
    data = shard.read_bytes()
    shard.unlink()
    if damage == "flip":
        shard.write_bytes(data[:50] + bytes([data[50] ^ 4]) + data[51:])
    elif damage == "short":
        shard.write_bytes(data[:-1])
    elif damage == "long":
        shard.write_bytes(data + bytes(10**6))
    with StaticServer(store.parent) as server, open_store(f"{server.url}/toy.zarr") as remote:
        remote.read(0)
        with pytest.raises(CorruptStore, match="logits/values/c/1/0/0"):
            remote.read(1)
        assert [problem.view for problem in verify(remote).problems] == [1]


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RemoteError, match=r"manifest.sha256 .*Connect.*tried again"):
        open_store(f"http://user:hunter2@127.0.0.1:{port}/toy.zarr")


# ---- bad input -----------------------------------------------------------------------------------


def test_nothing_there(store: Path, bucket: str) -> None:
    found = pytest.raises(StoreNotFound, match="nope holds no kdcache store")
    with StaticServer(store.parent) as server, found:
        open_store(f"{server.url}/nope")
    with pytest.raises(StoreNotFound, match="nope holds no kdcache store"):
        open_store(f"{bucket}/nope")
    with pytest.raises(StoreNotFound):
        open_store("s3://no-such-bucket/nope")


def test_something_else_there(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with StaticServer(tmp_path) as server, pytest.raises(StoreNotFound, match="no kdcache store"):
        open_store(server.url)


def test_newer_format(store: Path) -> None:
    root = store / "zarr.json"
    root.write_text(root.read_text().replace('"format": [\n        1,', '"format": [\n        9,'))
    (store / "manifest.sha256").unlink()
    with StaticServer(store.parent) as server, pytest.raises(FormatError, match="format 9"):
        open_store(f"{server.url}/toy.zarr")


def test_unfinished(tmp_path: Path) -> None:
    with open_writer(tmp_path / "toy.zarr") as writer:
        write_pending(writer, 3)
    with StaticServer(tmp_path) as server, pytest.raises(UnfinishedStore):
        open_store(f"{server.url}/toy.zarr")


def test_no_permission(store: Path, tmp_path: Path) -> None:
    with StaticServer(store.parent, password="me:hunter2") as server:
        address = server.url.removeprefix("http://")
        with pytest.raises(RemoteError, match="no permission") as refused:
            open_store(f"http://me:wrongpass@{address}/toy.zarr")
        assert "wrongpass" not in str(refused.value)
        assert "SERVERSECRET" not in str(refused.value)
        assert refused.value.__cause__ is None
        with open_store(f"http://me:hunter2@{address}/toy.zarr") as remote:
            assert same_logits(remote, store)
            assert "hunter2" not in f"{remote!r} {remote.where} {describe(remote)}"
        netrc = tmp_path / ".netrc"
        netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
        netrc.chmod(0o600)
        with open_store(f"{server.url}/toy.zarr") as remote:
            remote.read(0)


@contextlib.contextmanager
def refusing_server(status: int, body: str) -> Iterator[str]:
    """The address of a server that answers everything so."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Refuse(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(body.encode())

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "AccessDenied"])
def test_credentials_that_s3_refuses(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"<Error><Code>{code}</Code><AWSAccessKeyId>AKIDVISIBLE</AWSAccessKeyId></Error>"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDVISIBLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "TOPSECRETKEY")
    with refusing_server(400 if code == "ExpiredToken" else 403, body) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(RemoteError, match=f"no permission.*{code}.*expired") as refused:
            open_store("s3://team/toy.zarr")
    assert "AKIDVISIBLE" not in str(refused.value)
    assert "TOPSECRET" not in str(refused.value)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (400, "AuthorizationHeaderMalformed", "Correct the address, the endpoint or the region"),
        (400, "InvalidBucketName", "Correct the address"),
        (403, "AllAccessDisabled", "no permission"),
        (410, "Gone", "Correct the address"),
        (404, "NoSuchBucket", ""),
    ],
)
def test_what_a_server_will_always_reject_is_not_to_be_run_again(
    status: int, code: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with refusing_server(status, f"<Error><Code>{code}</Code></Error>") as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        for url in ("s3://team/toy.zarr", f"{address}/toy.zarr"):
            with pytest.raises(StoreError) as refused:
                open_store(url)
            assert words in str(refused.value)
            assert "again:" not in str(refused.value)
            assert "run the same" not in str(refused.value)


@pytest.mark.parametrize(
    ("error", "again"),
    [(400, False), (410, False), (416, False), (429, True), (503, True), (ValueError("a--b"), False),
     (TimeoutError("slow"), True)],
)  # fmt: skip
def test_what_the_hub_will_always_reject_is_not_to_be_run_again(
    error: int | Exception, again: bool
) -> None:
    def request() -> None:
        if isinstance(error, Exception):
            raise error
        failure = Exception("secret")
        failure.response = SimpleNamespace(status_code=error)  # type: ignore[attr-defined]
        raise failure

    with pytest.raises(RemoteError) as refused:
        hub.translated("hf://datasets/a/b", request)
    assert ("run the same again" in str(refused.value)) is again
    assert ("correct the repository, revision or path" in str(refused.value)) is not again
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x", "no such kind of URL"),
        ("http:///x", "no host"),
        ("https://host/x?sig=SECRET", r"neither \? nor #"),
        ("s3://key:SECRET@bucket/x", "credentials do not belong"),
        ("hf://models/a/b", "hf://datasets/"),
        ("file://host/x", "absolute path"),
    ],
)
def test_urls_that_are_refused(url: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        open_store(url)
    assert "SECRET" not in str(refused.value)


def test_redact() -> None:
    assert redact("https://u:p@host:8/a/b/?x=1#y") == "https://host:8/a/b"
    assert redact("/a/path?") == "/a/path?"


def test_profiles_need_boto3_or_are_used(
    store: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_store(store, f"{bucket}/toy.zarr")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (tmp_path / "credentials").write_text(
        "[work]\naws_access_key_id = AKIDWORK\naws_secret_access_key = TOPSECRETKEY\n"
    )
    with open_store(f"{bucket}/toy.zarr") as remote:
        assert remote.n_views == 4
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(StoreError, match="boto3"):
        open_store(f"{bucket}/toy.zarr")


def test_after_a_fork_it_is_refused_rather_than_hanging(store: Path) -> None:
    with StaticServer(store.parent) as server:
        code = (
            "import os, sys, warnings\n"
            "from kdcache_stores import open_store, StoreError\n"
            f"store = open_store('{server.url}/toy.zarr', cache_size=0); store.read(0)\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    try:\n        store.read(1)\n"
            "    except StoreError as error:\n        os._exit(7 if 'spawn' in str(error) else 8)\n"
            "    os._exit(9)\n"
            "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        )
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60, check=False)
    assert done.returncode == 7


# ---- the cache -----------------------------------------------------------------------------------


def gets(server: StaticServer) -> int:
    return sum(path.count("/c/") for _, path, _ in server.requests)


def test_the_second_reader_asks_for_no_shard(store: Path) -> None:
    with StaticServer(store.parent) as server:
        for _ in range(2):
            with open_store(f"{server.url}/toy.zarr") as remote:
                for view in remote.view_range:
                    remote.read(view)
        assert gets(server) == 12


def test_a_damaged_cache_is_noticed(store: Path, tmp_path: Path) -> None:
    with StaticServer(store.parent) as server:
        with open_store(f"{server.url}/toy.zarr") as remote:
            remote.read(0)
        for file in (tmp_path / "cache").rglob("*"):
            if file.is_file() and len(file.name) == 64:
                content = bytearray(file.read_bytes())
                content[len(content) // 2] ^= 1
                file.write_bytes(content)
        with open_store(f"{server.url}/toy.zarr") as remote:
            assert same_logits(remote, store)
        with open_store(f"{server.url}/toy.zarr") as remote:
            assert same_logits(remote, store)
        assert gets(server) == 3 + 12


def test_cache_keeps_to_its_size_and_to_what_was_used_last(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "c", limit=10_000)
    objects = [bytes([i]) * 1000 for i in range(30)]
    for data in objects[:8]:
        cache.put(sha256(data), data)
        time.sleep(0.002)
    assert cache.get(sha256(objects[0]), 1000) == objects[0]
    for data in objects[8:14]:
        time.sleep(0.002)
        cache.put(sha256(data), data)
        assert cache.state().nbytes <= 10_000
    assert cache.has(sha256(objects[0]))
    assert not cache.has(sha256(objects[1]))
    cache.put(sha256(bytes(20_000)), bytes(20_000))
    assert not cache.has(sha256(bytes(20_000)))
    assert cache.clear().objects
    assert cache.state().objects == 0


def test_a_cache_that_cannot_be_written_is_done_without(store: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with StaticServer(store.parent) as server, open_store(f"{server.url}/toy.zarr") as remote:
        assert same_logits(remote, store)


def _read_all(url: str, folder: str, failures: multiprocessing.Queue[str]) -> None:
    os.environ["KDCACHE_CACHE"] = folder
    try:
        with open_store(url, cache_size=6_000) as remote:
            for view in [0, 1, 2, 3] * 3:
                remote.read(view)
    except Exception as error:
        failures.put(repr(error))


def test_concurrent_processes_share_a_cache(store: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    with StaticServer(store.parent) as server:
        arguments = (f"{server.url}/toy.zarr", str(tmp_path / "cache"), failures)
        readers = [context.Process(target=_read_all, args=arguments) for _ in range(3)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert failures.empty()
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    failures.close()
    failures.join_thread()
    assert ObjectCache(tmp_path / "cache", limit=6_000).state().nbytes <= 6_000 + 3 * 1_000


def test_parse_size() -> None:
    assert parse_size("20GB") == 20 * 10**9
    assert parse_size("1.5 kB") == 1500
    assert parse_size("0") == 0
    for text in ("", "GB", "-1", "5 furlongs"):
        with pytest.raises(UsageError, match="size"):
            parse_size(text)


# ---- latency and hostile stores ------------------------------------------------------------------


def test_shards_of_a_view_are_fetched_at_once(tmp_path: Path) -> None:
    dump(tmp_path / "toy.zarr", views=1, samples=make_samples(320))
    with StaticServer(tmp_path, latency=0.05) as server:
        with open_store(f"{server.url}/toy.zarr", cache_size=0) as remote:
            seen = len(server.requests)
            remote.read(0)
            count = len(server.requests) - seen
        assert server.most_at_once >= 8
    assert count == 16


def test_a_reader_that_stops_leaves_nothing_waiting(tmp_path: Path) -> None:
    dump(tmp_path / "toy.zarr", views=2, samples=make_samples(320))
    with StaticServer(tmp_path, latency=0.02) as server:
        objects = RemoteFiles(f"{server.url}/toy.zarr", 0)
        remote = Store(objects)
        objects.prefetch(remote.layouts["logits"][0].key(0, i) for i in range(16))
        remote.close()
        assert not objects._coming
        assert objects._coming_bytes == 0
        assert remote.read(1).shape == (320, 10)


def test_names_that_leave_the_folder(store: Path) -> None:
    with StaticServer(store.parent) as server:
        objects = RemoteFiles(f"{server.url}/toy.zarr")
        for key in ("../toy.zarr/zarr.json", "/etc/passwd", "a//b", "..", "%2e%2e/x"):
            with pytest.raises(FormatError):
                objects.get(key)


def test_an_object_larger_than_promised_is_not_taken_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "manifest.sha256").open("wb") as file:
        file.truncate(10**6)
    with StaticServer(tmp_path) as server, pytest.raises(CorruptStore, match="at most 1024"):
        RemoteFiles(server.url).get("manifest.sha256")
