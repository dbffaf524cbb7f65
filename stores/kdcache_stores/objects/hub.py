"""hf://: datasets on the Hugging Face Hub, read over HTTP and pushed in one commit. Needs huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kdcache_stores.errors import RemoteError, StoreError, StoreNotFound, UsageError
from kdcache_stores.objects.urls import redact


@dataclass(frozen=True)
class HubPlace:
    """A folder of a dataset repository on the Hub."""

    repo: str
    revision: str
    folder: str


def parse(url: str) -> HubPlace:
    """hf://datasets/USER/REPO[@REVISION][/FOLDER]; raises `UsageError`."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise UsageError(f"{redact(url)}: an hf:// URL has no user; log in with `hf auth login`")
    match = re.fullmatch(
        r"datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?",
        f"{parts.netloc}{parts.path}".rstrip("/"),
    )
    if match is None:
        raise UsageError(
            f"{redact(url)}: expected hf://datasets/USER/REPOSITORY/FOLDER, with @REVISION behind the "
            "repository if it is not `main`"
        )
    return HubPlace(match[1], match[2] or "main", match[3] or "")


def resolve(url: str) -> tuple[str, str | None]:
    """The HTTP address under which the Hub serves a folder, and the user's token, if there is one."""
    place, hub = parse(url), _hub()
    base = f"{hub.constants.ENDPOINT}/datasets/{place.repo}/resolve/{place.revision}"
    return f"{base}/{place.folder}".rstrip("/"), hub.get_token()


def commit(url: str, objects: Mapping[str, str], message: str) -> None:
    """Publish objects (key -> local file) in one commit, so that readers see all of them or none.

    The Hub stores each content once, so a growth sends only what is new. Raises `RemoteError`.
    """
    place, hub = parse(url), _hub()
    prefix = f"{place.folder}/" if place.folder else ""
    operations = [
        hub.CommitOperationAdd(path_in_repo=prefix + key, path_or_fileobj=path)
        for key, path in objects.items()
    ]
    api = hub.HfApi()
    translated(url, lambda: api.create_repo(place.repo, repo_type="dataset", exist_ok=True))
    translated(
        url,
        lambda: api.create_commit(
            place.repo,
            operations,
            commit_message=message,
            repo_type="dataset",
            revision=place.revision,
        ),
    )


def children(url: str, folder: str = "") -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder; raises `RemoteError`."""
    place, hub = parse(url), _hub()
    path = "/".join(part for part in (place.folder, folder) if part)

    def read() -> list[Any]:
        tree = hub.HfApi().list_repo_tree(
            place.repo, path or None, repo_type="dataset", revision=place.revision
        )
        return list(tree)

    try:
        listed = translated(url, read)
    except FileNotFoundError:
        return [], []
    folders = [item.path for item in listed if type(item).__name__ == "RepoFolder"]
    files = [item.path for item in listed if type(item).__name__ != "RepoFolder"]
    names = [sorted(path.rpartition("/")[2] for path in paths) for paths in (folders, files)]
    return names[0], names[1]


def translated(url: str, request: Any) -> Any:
    """The request's answer, or an error without the Hub's text, which may quote headers."""
    try:
        return request()
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 404:
            raise StoreNotFound(
                f"{redact(url)}: the Hub has no such repository, revision or folder, or it is private: "
                "correct the address, or log in with `hf auth login`"
            ) from None
        reason = f"{type(error).__name__}{f', {status}' if status else ''}"
        if status in (401, 403):
            raise RemoteError(
                f"no permission for {redact(url)} ({reason}): log in with `hf auth login`, or set HF_TOKEN"
            ) from None
        # huggingface_hub's own checks of names raise ValueError.
        lasting = status is not None and 400 <= status < 500 and status not in (408, 409, 429)
        again = not lasting and not isinstance(error, ValueError)
        remedy = "run the same again" if again else "correct the repository, revision or path"
        raise RemoteError(f"the Hub refuses {redact(url)} ({reason}): {remedy}") from None


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise StoreError(
            "hf:// needs huggingface_hub: pip install 'kdcache[hf]', or use the https:// address"
        ) from None
    return huggingface_hub
