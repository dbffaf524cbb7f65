"""Objects in a bucket or on a web server, through obstore: whole, within bounds, or an error.

obstore repeats requests that fail (5xx, refused, reset, timed out) with back-off. What it cannot know is
handled here: a body that breaks off is continued where it stopped if the server takes ranges, and asked
for again if not. Messages of servers and of obstore may hold URLs, key ids and signatures, so errors are
worded here, from nothing of theirs but the status and the code.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from typing import Any

from kdcache_stores.errors import CorruptStore, RemoteError, StoreError
from kdcache_stores.objects.connect import connect, not_after_a_fork
from kdcache_stores.objects.files import check_key
from kdcache_stores.objects.urls import redact, split_url

ATTEMPTS = 6
"""How often a body that brings nothing more is asked for, and a write is repeated."""

_USER_METADATA = "kdcache_sha256"


class Bucket:
    """The objects below one URL. Safe for threads; pickles as its URL.

    Args:
        url: s3://bucket/prefix, gs://..., az://container/prefix, http(s)://... or hf://...
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.where = redact(url)
        self.scheme = split_url(url).scheme
        not_after_a_fork()
        self._store = connect(url)
        self._ranges = True

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url,)

    # ---- reading -------------------------------------------------------------------------------

    def get(self, key: str, limit: int = 2**26) -> bytes:
        """An object's bytes, at most `limit` of them; raises `FileNotFoundError`, `RemoteError`."""
        return b"".join(self.stream(key, limit))

    def stream(self, key: str, limit: int = 2**26) -> Iterator[bytes]:
        """An object's bytes in pieces, without a gap, whatever happens to connections meanwhile.

        Raises `FileNotFoundError`, `RemoteError`, and `CorruptStore` if there are more than `limit`.
        """
        check_key(key)
        done, failures, tag = 0, 0, None
        while True:
            try:
                skip = 0 if self._ranges else done
                result = self._open(key, done - skip, tag)
                meta = result.meta
                tag = meta["e_tag"]
                if meta["size"] > limit:
                    raise CorruptStore(
                        f"{self.where}/{key} has {meta['size']} bytes, at most {limit} are expected"
                    )
                for piece in result.stream(min_chunk_size=2**20):
                    data = memoryview(piece)
                    if skip >= len(data):
                        skip -= len(data)
                        continue
                    data, skip = data[skip:], 0
                    done += len(data)
                    if done > limit:
                        raise CorruptStore(f"{self.where}/{key} has more than {limit} bytes")
                    failures = 0
                    yield bytes(data)
                if done >= meta["size"]:
                    return
            except (StoreError, FileNotFoundError):
                raise
            except Exception as error:
                if type(error).__name__ == "NotSupportedError" and done and self._ranges:
                    self._ranges = False  # such as `python -m http.server`: from the start again
                    continue
                if _is_final(error):
                    raise self._failed("read", key, error) from None
                failures += 1
                if failures >= ATTEMPTS:
                    raise self._failed("read", key, error) from None
                _back_off(failures)

    def _open(self, key: str, start: int, tag: str | None) -> Any:
        import obstore

        options: Any = {}
        if start:
            options["range"] = {"offset": start}
            if tag is not None:
                options["if_match"] = tag
        return self._call(lambda: obstore.get(self._store, key, options=options))

    def range(self, key: str, start: int, length: int, tag: str | None = None) -> bytes:
        """Bytes of an object from `start` on, `length` of them or as many as there are.

        Raises `FileNotFoundError`, `RemoteError`, and `FileExistsError` if another version of it
        than that of the `tag` is there now.
        """
        import obstore

        options: Any = {"range": (start, start + length)}
        if tag is not None:
            options["if_match"] = tag

        def read() -> bytes:
            return bytes(obstore.get(self._store, check_key(key), options=options).bytes())

        result: bytes = self._request("read", key, read)
        return result

    def version(self, key: str) -> tuple[int, str | None]:
        """Size in bytes and tag of this version; raises `FileNotFoundError`, `RemoteError`."""
        meta = self._head(key)
        return meta["size"], meta["e_tag"]

    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None if there is none."""
        try:
            size: int = self._head(key)["size"]
        except FileNotFoundError:
            return None
        return size

    def _head(self, key: str) -> Any:
        import obstore

        check_key(key)

        def head() -> Any:
            try:
                return obstore.head(self._store, key)
            except FileNotFoundError:
                raise
            except Exception as error:
                if _is_refusal(error) or _is_rejection(error):
                    # An answer to HEAD has no body; the answer to GET has one, which names the code.
                    obstore.get(self._store, key)
                raise

        return self._request("read", key, head)

    def noted(self, key: str) -> tuple[int, str | None] | None:
        """Size and, if it was noted when the object was pushed, SHA-256; None if there is no object."""
        import obstore

        def head() -> Any:
            return obstore.get(self._store, check_key(key), options={"head": True})

        try:
            result = self._request("read", key, head)
        except FileNotFoundError:
            return None
        noted = result.attributes.get(_USER_METADATA)
        return result.meta["size"], str(noted) if noted else None

    def children(self, folder: str = "") -> tuple[list[str], list[str]]:
        """Names of the folders and of the objects in a folder; raises `RemoteError`."""
        import obstore

        def read() -> Any:
            return obstore.list_with_delimiter(self._store, folder or None)

        result = self._request("list", folder, read)
        folders = [str(name).rstrip("/").rpartition("/")[2] for name in result["common_prefixes"]]
        return sorted(folders), sorted(
            meta["path"].rpartition("/")[2] for meta in result["objects"]
        )

    def first_keys(self, count: int) -> list[str]:
        """Some keys below the URL; raises `RemoteError`."""
        import obstore

        def read() -> list[str]:
            for batch in obstore.list(self._store, chunk_size=count):
                return [meta["path"] for meta in batch]
            return []

        result: list[str] = self._request("list", "", read)
        return result[:count]

    # ---- writing -------------------------------------------------------------------------------

    def put(self, key: str, data: bytes, *, replace: bool = False) -> None:
        """Publish an object in one step; raises `FileExistsError` if it is there and not `replace`."""
        self._put(key, data, "overwrite" if replace else "create")

    def tagged(self, key: str) -> tuple[bytes, str | None]:
        """An object's bytes and the tag of this version of it, for `put_if`."""

        def read() -> tuple[bytes, str | None]:
            result = self._open(check_key(key), 0, None)
            return bytes(result.bytes()), result.meta["e_tag"]

        result: tuple[bytes, str | None] = self._request("read", key, read)
        return result

    def put_if(self, key: str, data: bytes, tag: str | None) -> bool:
        """Replace the version of an object that has this tag; False if another one is there now."""
        try:
            self._put(key, data, {"e_tag": tag} if tag is not None else "create")
        except FileExistsError:
            return False
        return True

    def _put(self, key: str, data: bytes, mode: Any) -> None:
        import hashlib

        import obstore

        attributes: dict[str, str] = {_USER_METADATA: hashlib.sha256(data).hexdigest()}

        def write() -> None:
            obstore.put(
                self._store,
                check_key(key),
                data,
                mode=mode,
                use_multipart=False,
                attributes=attributes,
            )

        self._request("write", key, write)

    def remove(self, key: str) -> None:
        """Remove an object; a missing one is fine."""
        import obstore

        try:
            self._request("remove", key, lambda: obstore.delete(self._store, check_key(key)))
        except FileNotFoundError:
            return

    # ---- requests ------------------------------------------------------------------------------

    def _call(self, request: Any) -> Any:
        not_after_a_fork()
        return request()

    def _request(self, what: str, key: str, request: Any) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._call(request)
            except (StoreError, FileNotFoundError):
                raise
            except Exception as error:
                name = type(error).__name__
                if name in ("AlreadyExistsError", "PreconditionError"):
                    raise FileExistsError(f"{self.where}/{key}") from None
                if _is_final(error) or attempt == ATTEMPTS:
                    raise self._failed(what, key, error) from None
            _back_off(attempt)
        raise AssertionError("unreachable")

    def _failed(self, what: str, key: str, error: Exception) -> Exception:
        place = f"{self.where}/{key}" if key else self.where
        reason = _reason(error)
        if _is_refusal(error):
            return RemoteError(
                f"no permission to {what} {place} ({reason}): the credentials are missing, expired "
                "or not allowed to; they come from where the service's own tools look for them"
            )
        if _is_absent(error):
            return RemoteError(
                f"cannot {what} {place}: there is no such bucket. Make it, or correct the address"
            )
        if _is_rejection(error):
            return RemoteError(
                f"cannot {what} {place} ({reason}): the server rejects this request, and would again. "
                "Correct the address, the endpoint or the region"
            )
        return RemoteError(
            f"cannot {what} {place} ({reason}); it was tried again with growing pauses. Everything "
            "that is done is kept: run the same again"
        )


def _is_refusal(error: Exception) -> bool:
    codes = "ExpiredToken|InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied|InvalidToken"
    return type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError") or (
        re.search(rf"<Code>({codes})</Code>|code: 40[13] ", str(error)) is not None
    )


def _is_absent(error: Exception) -> bool:
    """Whether the bucket is what is not there."""
    return re.search(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>", str(error)) is not None


def _is_rejection(error: Exception) -> bool:
    """Whether the same request will always get the same answer: not found, or not understood."""
    return type(error).__name__ in ("NotSupportedError", "InvalidPathError") or (
        re.search(r"status code: 4(?!08|09|29)\d\d", str(error)) is not None
    )


def _is_final(error: Exception) -> bool:
    """Whether asking again is useless: refused, not understood, or repeated often enough already."""
    repeated = re.search(r"after [1-9]\d* retries", str(error)) is not None
    return repeated or _is_refusal(error) or _is_rejection(error)


def _reason(error: Exception) -> str:
    """Status, code and kind of a failure: all that is safe to show."""
    text = str(error)
    result = [
        match[1]
        for pattern in (
            r"status code: (\d{3}(?: [A-Z][A-Za-z]*)*)",
            r"<Code>(\w{1,60})</Code>",
            r"kind: (Connect|Timeout|Interrupted|Request|Decode)\b",
        )
        if (match := re.search(pattern, text))
    ]
    return ", ".join(result) or type(error).__name__


def _back_off(attempt: int) -> None:
    time.sleep(min(8.0, 0.05 * 2**attempt) * random.uniform(0.5, 1.0))
