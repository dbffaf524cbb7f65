"""A part of a compact store brings the basis and base that its views need."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kdcache_stores import open_store, verify
from kdcache_stores.share.pull import pull_store
from tests.stores.test_compact import dump, teacher_like


def test_a_view_pulled_alone_reads_as_in_the_whole(tmp_path: Path) -> None:
    whole = dump(tmp_path / "whole.zarr", teacher_like(3, 60, 12))
    pull_store(str(tmp_path / "whole.zarr"), tmp_path / "part.zarr", (1, 2))
    with open_store(tmp_path / "part.zarr") as part:
        assert verify(part).ok
        assert part.view_digests == whole.view_digests[1:2]
        assert np.array_equal(part.read(1), whole.read(1))
