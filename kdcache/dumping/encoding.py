"""How a dump is encoded where nobody says."""

from __future__ import annotations

import os
from collections.abc import Iterable

from kdcache_stores import UsageError, begun_encoding

#: From so many views on, codes of a sample's views share enough to be worth a basis and a base.
MANY_VIEWS = 8


def default_encoding(paths: Iterable[str | os.PathLike[str]], views: int) -> str:
    """The encoding of a dump of so many views into these stores.

    A store that is there keeps its own, however many views it grows to. A new one is `compact:2.5e-5`
    from `MANY_VIEWS` views on (a sixth of the bytes of `float16` at 16 views of 100 classes), else
    `float16`.

    Raises:
        UsageError: the stores differ in their encodings.
    """
    there = {begun for path in paths if (begun := begun_encoding(path)) is not None}
    if len(there) > 1:
        raise UsageError(
            f"the stores are encoded as {', '.join(sorted(there))}: dump into one of them at a time"
        )
    return there.pop() if there else "compact:2.5e-5" if views >= MANY_VIEWS else "float16"
