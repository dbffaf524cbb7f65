"""A store under any order of writing, crashing, damaging and reading, beside a plain model."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kdcache_stores import (
    KDCacheError,
    MismatchError,
    Store,
    StoreWriter,
    UnfinishedStore,
    open_store,
    verify,
)

from .conftest import make_logits, make_samples, make_teacher, open_writer, write_pending
from .faults import FailingDisk
from .hostile import scramble

N, SHARD_ROWS = 8, 4


class StoreMachine(RuleBasedStateMachine):
    """The model: how many views are sealed, and whether any byte was damaged since."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "store"
        self.views = 1
        self.sealed = 0
        self.damaged = False
        self.objects: list[str] = []
        self.reader: Store | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def writer(self, **changes: Any) -> StoreWriter:
        arguments = {"samples": make_samples(N), "shard_rows": SHARD_ROWS, **changes}
        return open_writer(self.path, self.views, "quantized", **arguments)

    @initialize(views=st.integers(1, 2))
    def begin(self, views: int) -> None:
        self.views = views

    @rule(count=st.integers(0, 3))
    @precondition(lambda self: not self.damaged)
    def write_some(self, count: int) -> None:
        with self.writer() as writer:
            before = writer.done
            write_pending(writer, count)
            assert writer.done == min(before + count, len(writer.shards))

    @rule()
    @precondition(lambda self: not self.damaged)
    def finish(self) -> None:
        with self.writer() as writer:
            write_pending(writer)
            writer.seal()
            assert writer.sealed
        self.sealed = self.views

    @rule()
    @precondition(lambda self: not self.damaged)
    def seal_too_early(self) -> None:
        with self.writer() as writer:
            if writer.pending():
                with pytest.raises(UnfinishedStore):
                    writer.seal()

    @rule(n=st.integers(0, 120))
    @precondition(lambda self: not self.damaged)
    def crash(self, n: int) -> None:
        try:
            with self.writer(disk=FailingDisk(n)) as writer:
                write_pending(writer)
                writer.seal()
        except (KDCacheError, OSError):
            pass
        try:  # where it stopped is the disk's secret; what it left must be the old or the new
            views = open_store(self.path).n_views
        except KDCacheError:
            views = 0
        assert views in (self.sealed, self.views)
        self.sealed = views

    @rule()
    @precondition(lambda self: self.sealed == self.views and self.views < 4)
    def grow(self) -> None:
        self.views += 1

    @rule()
    @precondition(lambda self: self.sealed > 0 and not self.damaged)
    def reopen(self) -> None:
        self.reader = open_store(self.path)

    @rule(key=st.sampled_from(["teacher", "config", "encoding"]))
    @precondition(lambda self: (self.path / "zarr.json").exists() and not self.damaged)
    def change_the_configuration(self, key: str) -> None:
        changes: dict[str, Any] = {
            "teacher": {"teacher": make_teacher(precision="bfloat16")},
            "config": {"config": {"batch_size": 99}},
            "encoding": {"hash_keys": True},
        }[key]
        with pytest.raises(MismatchError):
            self.writer(**changes)

    @rule(data=st.data())
    @precondition(lambda self: self.sealed > 0)
    def damage(self, data: st.DataObject) -> None:
        if not self.damaged:
            entries = open_store(self.path).source.entries
            self.objects = [*sorted(entries), "manifest.parquet", "manifest.sha256"]
        files = [self.path / key for key in self.objects if (self.path / key).exists()]
        victim = data.draw(st.sampled_from(files))
        how = data.draw(st.sampled_from(["flip", "truncate", "delete", "swap", "scramble"]))
        before = victim.read_bytes()
        if not before and how != "delete":
            return
        if how == "flip":
            at = data.draw(st.integers(0, len(before) * 8 - 1))
            changed = bytearray(before)
            changed[at // 8] ^= 1 << at % 8
            victim.write_bytes(changed)
        elif how == "truncate":
            victim.write_bytes(before[: data.draw(st.integers(0, len(before) - 1))])
        elif how == "delete":
            victim.unlink()
            self.damaged = True
        elif how == "swap":
            other = data.draw(st.sampled_from(files))
            if other.exists() and other.parts[-4:-3] == victim.parts[-4:-3]:
                content = other.read_bytes()
                other.write_bytes(before)
                victim.write_bytes(content)
        else:
            victim.write_bytes(scramble(before, data.draw(st.randoms(use_true_random=False))))
        if victim.exists() and victim.read_bytes() != before:
            self.damaged = True
        if self.damaged:
            with contextlib.suppress(KDCacheError):
                assert not verify(open_store(self.path)).ok

    @rule()
    @precondition(lambda self: self.damaged)
    def repair(self) -> None:
        try:
            with self.writer(repair=True) as writer:
                write_pending(writer)
                writer.seal()
        except KDCacheError:  # the root is gone: nothing says what the store was
            shutil.rmtree(self.path)
            self.sealed = 0
            self.reader = None
        else:
            self.sealed = self.views
            assert verify(open_store(self.path)).ok
        self.damaged = False

    @invariant()
    def reads_equal_the_model_or_raise(self) -> None:
        for store in (self.fresh(), self.reader):
            if store is None:
                continue
            for view in range(store.n_views):
                try:
                    values = store.read(view)
                except KDCacheError:
                    assert self.damaged
                    continue
                live = make_logits(view, N)
                step = live.std(axis=1, keepdims=True) * 0.05
                assert (np.abs(values - live) <= step * 0.51).all()

    def fresh(self) -> Store | None:
        try:
            store = open_store(self.path)
        except KDCacheError:
            assert self.damaged or self.sealed == 0
            return None
        assert store.n_views == self.sealed or self.damaged
        return store


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            phases=(Phase.explicit, Phase.generate),  # shrinking a crash costs minutes
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    run(12, 12)


@pytest.mark.slow
def test_machine_for_long() -> None:
    run(400, 30)
