"""The measurements run and say what they must; how fast it is, is not asserted."""

from __future__ import annotations

import sys

import pytest

from kdcache.bench.dump_bench import bench_dump, bench_memory


def test_bench_dump() -> None:
    found = bench_dump(("resnet8", "resnet14"), samples=64, views=2, classes=10, shape=(1, 8, 8),
                       batch_size=32, rounds=2)  # fmt: skip
    for case, models in (("one", 1), ("all", 2)):
        assert len(found[case]["models"]) == models
        assert found[case]["dump_rows_per_second"] > 0
        assert found[case]["ratio"] * found[case]["time_over_forwards"] == pytest.approx(1)
        assert len(found[case]["ratios"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
def test_memory_is_flat_in_the_views() -> None:
    few, many = bench_memory((2048,), (8, 40), classes=1000)
    shard = 2048 * 1000 * 4
    # The allocator's own ups and downs are a few shards; keeping the 32 more would be all of them.
    assert many["peak_bytes"] - few["peak_bytes"] < 32 * shard / 4
