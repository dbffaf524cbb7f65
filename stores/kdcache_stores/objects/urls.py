"""Where a store may lie: a path, or a URL. Nothing secret in a URL is ever shown."""

from __future__ import annotations

import os
import re
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from kdcache_stores.errors import UsageError

CLOUD = ("s3", "gs", "az")
SCHEMES = ("file", "http", "https", *CLOUD, "hf")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether this is a URL rather than a path."""
    return isinstance(path, str) and _SCHEME.match(path) is not None


def require_local(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path, where it is one of this machine.

    Raises `UsageError` for a URL, also one that a `Path` made of it, such as `s3:/bucket/store`, and for
    what no path can be.
    """
    if "\0" in os.fspath(path):
        raise UsageError(f"{os.fspath(path)!r:.200}: no path holds a null character")
    if _URL.match(os.fspath(path)):
        raise UsageError(
            f"expected a path on this machine, found {redact(os.fspath(path))}: write there first, then "
            "copy it (a store by `kdcache push`)"
        )
    return path


def redact(url: str) -> str:
    """A path or URL as messages, logs and configs may show it: no user, password, query, fragment."""
    if not is_url(url):
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


def split_url(url: str) -> SplitResult:
    """The parts of a URL; raises `UsageError` for a scheme that is not supported, or a query."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UsageError(f"{redact(url)}: no such kind of URL; there is {known}")
    if parts.query or parts.fragment:
        raise UsageError(
            f"{redact(url)}: a URL of a store has neither ? nor #, because it names a folder. Give "
            "credentials where the service's own tools look for them (environment, ~/.aws, ~/.netrc)"
        )
    if parts.scheme != "file" and not parts.netloc.rpartition("@")[2]:
        raise UsageError(f"{redact(url)}: there is no host or bucket after {parts.scheme}://")
    return parts


def local_path(path: str | os.PathLike[str]) -> str | None:
    """The folder that a path or a file:// URL names; None for any other URL."""
    if not is_url(path):
        return os.fspath(path)
    parts = split_url(str(path))
    if parts.scheme != "file":
        return None
    if parts.netloc not in ("", "localhost"):
        raise UsageError(f"{redact(str(path))}: file:// is followed by an absolute path")
    return unquote(parts.path)


def no_store(where: str, root: str) -> str:
    """What to say of a path or URL without the object that every store has."""
    if is_url(where) or os.path.isdir(where):
        return f"{where} holds no kdcache store: there is no {root}"
    if os.path.exists(where):
        return f"{where} is a file, and a store is a folder"
    return f"{where}: there is no such folder, so no store"


def join(url: str, name: str) -> str:
    """The path or URL of something inside a folder."""
    return os.path.join(url, name) if not is_url(url) else f"{url.rstrip('/')}/{name}"


def split_name(url: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The folder around a store, and the store's name in it; None at the top of a bucket."""
    local = local_path(url)
    if local is not None:
        parent, name = os.path.split(os.path.abspath(local))
        return (parent, name) if name else None
    parts = urlsplit(str(url).rstrip("/"))
    parent, _, name = parts.path.rpartition("/")
    return (urlunsplit(parts._replace(path=parent)), unquote(name)) if name else None
