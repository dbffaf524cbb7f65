"""From a URL to obstore's store: credentials from the usual places, bounded retries with back-off."""

from __future__ import annotations

import os
from base64 import b64encode
from datetime import timedelta
from typing import Any
from urllib.parse import unquote, urlunsplit

from kdcache_stores.errors import StoreError, UsageError
from kdcache_stores.objects.urls import redact, split_url

_RETRY = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {
        "init_backoff": timedelta(milliseconds=50),
        "max_backoff": timedelta(seconds=8),
        "base": 2,
    },
}
# No limit on a whole request, which would fail large objects on slow lines; one on each pause in a transfer.
_CLIENT = {"timeout": "6h", "read_timeout": "30s", "connect_timeout": "10s"}

_runtime_pid: int | None = None


def connect(url: str) -> Any:
    """The obstore store of a URL, with credentials from the usual places."""
    from obstore.store import HTTPStore, from_url

    parts = split_url(url)
    options: dict[str, Any] = dict(_CLIENT)
    if parts.scheme in ("http", "https", "hf"):
        if parts.scheme == "hf":
            from kdcache_stores.objects.hub import resolve

            base, token = resolve(url)
            headers = {"authorization": f"Bearer {token}"} if token else {}
        else:
            host = parts.netloc.rpartition("@")[2]
            base = urlunsplit((parts.scheme, host, parts.path, "", ""))
            headers = _basic(parts.username, parts.password, parts.hostname or "")
        options |= {"allow_http": base.startswith("http://")}
        if headers:
            options["default_headers"] = headers
        return HTTPStore(base, client_options=options, retry_config=_RETRY)  # type: ignore[arg-type]
    if parts.username or parts.password:
        raise UsageError(
            f"{redact(url)}: credentials do not belong into a {parts.scheme}:// URL; set them where "
            "the service's own tools look for them"
        )
    more: dict[str, Any] = {}
    if parts.scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT")
        if endpoint:
            more["endpoint"] = endpoint
            options["allow_http"] = endpoint.startswith("http://")
        more |= _aws_profile()
    try:
        return from_url(url, client_options=options, retry_config=_RETRY, **more)  # type: ignore[call-overload]
    except Exception as error:
        raise UsageError(f"{redact(url)} is no URL of a bucket ({type(error).__name__})") from None


def _basic(user: str | None, password: str | None, host: str) -> dict[str, str]:
    """The header for a user and password in the URL, or in ~/.netrc."""
    if user is None:
        import netrc

        try:
            login = netrc.netrc().authenticators(host)
        except (OSError, netrc.NetrcParseError):
            return {}
        if login is None:
            return {}
        user, password = login[0], login[2]
    pair = f"{unquote(user)}:{unquote(password or '')}".encode()
    return {"authorization": f"Basic {b64encode(pair).decode()}"}


def _aws_profile() -> dict[str, Any]:
    """Credentials and region of a profile in ~/.aws, which obstore leaves to boto3."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_SKIP_SIGNATURE"):
        return {}
    files = [
        os.environ.get(variable, os.path.expanduser(default))
        for variable, default in (
            ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
            ("AWS_CONFIG_FILE", "~/.aws/config"),
        )
    ]
    if not os.environ.get("AWS_PROFILE") and not any(map(os.path.exists, files)):
        return {}
    try:
        from boto3 import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise StoreError(
            "credentials in ~/.aws are read by boto3: pip install 'kdcache[s3]', or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    session = Session()
    options: dict[str, Any] = {"credential_provider": Boto3CredentialProvider(session)}
    if session.region_name:
        options["region"] = session.region_name
    return options


def not_after_a_fork() -> None:
    """obstore's threads do not live on in a forked process: there every request would hang."""
    global _runtime_pid
    if _runtime_pid is None:
        _runtime_pid = os.getpid()
    if _runtime_pid != os.getpid():
        raise StoreError(
            "a remote store was used before this process was forked, and cannot be used after it: "
            "start worker processes with the method 'spawn' (DataLoader(..., "
            "multiprocessing_context='spawn')), or pull the store first"
        )
