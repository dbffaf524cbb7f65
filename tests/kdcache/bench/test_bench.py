"""The benchmark measures what it says and reports it whole. No test here depends on a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.bench import claims as measured
from kdcache.bench.claims import Claim, Scale
from kdcache.bench.store_bench import bench_encodings, bench_memory, synthetic_logits
from kdcache_stores import ENCODINGS
from tests.conftest import Result, Trained

TINY = Scale(
    "resnet8", "resnet8", 64, 128, 300, 200, 300, 64, 32, rounds=1, train_rounds=1, student_files=16,
    photo_rows=16, saving_images=16, saving_photos=4, factors=(1, 2)
)  # fmt: skip


@pytest.mark.slow
def test_everything_is_measured_and_printed(
    tmp_path: Path, kdcache: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "QUICK", TINY)
    done = kdcache("bench", "--quick", "--out", tmp_path / "new" / "bench.json")
    assert done.code == 0, done.err
    document: dict[str, Any] = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [claim["rounds"] for claim in document["claims"]] == [1] * 14
    for claim in document["claims"]:
        assert 0 < claim["p25"] <= claim["median"] <= claim["p75"]
        assert claim["what"] in done.out
    training = document["claims"][0]["details"]
    assert len(training["cached"]["seconds"]) == 1
    assert training["images_per_epoch"] == 64
    assert {"torch", "numpy", "kdcache", "python"} <= document["versions"].keys()
    assert document["machine"]["cores"] >= 1
    assert document["encodings"]["logits"] == "synthetic"
    assert [row["factor"] for row in document["memory"]] == [1, 2]


def test_one_section_alone(kdcache: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "QUICK", TINY)
    done = kdcache("bench", "--quick", "--only", "students", "--json")
    assert done.code == 0, done.err
    document = done.json
    assert list(document["seconds"]) == ["students"]
    assert [claim["what"] for claim in document["claims"]] == ["epoch: four students / one"]
    details = document["claims"][0]["details"]
    assert (len(details["one"]["seconds"]), details["settings"]["files"]) == (1, 16)
    assert details["stream_cpu_seconds"] > 0
    assert not document["memory"] + document["encodings"]["table"]
    refused = kdcache("bench", "--only", "student")
    assert refused.code == 2
    assert "did you mean 'students'" in " ".join(refused.err.split())


def test_what_a_cached_teacher_saves(
    kdcache: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.bench.saving_bench import Pair

    pairs = (Pair("resnet14", "resnet8"), Pair("resnet8", "resnet8", 32))
    monkeypatch.setattr(measured, "QUICK", TINY)
    monkeypatch.setattr(measured, "PAIRS", pairs)
    done = kdcache("bench", "--quick", "--only", "saving", "--json")
    assert done.code == 0, done.err
    claims = done.json["claims"]
    assert [claim["what"] for claim in claims] == [f"saving: {t} -> {s}" for t, s, _ in pairs]
    for claim, images in zip(claims, (16, 4), strict=True):
        pair, epochs = claim["details"], claim["details"]["epochs"]
        assert epochs["images_per_epoch"] == images
        (step,), (forward,) = epochs["step"]["seconds"], epochs["forward"]["seconds"]
        assert pair["bound"] == [(step + forward) / step]
        (online,), (cached,) = epochs["online"]["seconds"], epochs["cached"]["seconds"]
        assert claim["median"] == online / cached
        assert pair["dump_seconds"] > 0
        saved = online - cached
        assert pair["crossing"] == (pair["dump_seconds"] / saved if saved > 0 else None)
    # Multiply-adds of resnet14 and resnet8 at 32 pixels, 100 classes; alike at the same size.
    assert claims[0]["details"]["macs"] == 26_663_168 / 12_507_392
    assert claims[1]["details"]["macs"] == 1


def test_the_bound_of_an_epoch_is_measured_beside_it(trained: Trained) -> None:
    from kdcache.bench.training_bench import bench_train
    from kdcache.methods.config import ObjectiveConfig
    from kdcache.training.optim import Optimization
    from kdcache.training.settings import Training

    training = Training(
        "digits", "resnet8", ObjectiveConfig(method="kd"), Optimization(epochs=3, batch_size=64),
        stores=(str(trained.store),), train_samples=256,
    )  # fmt: skip
    result = bench_train(training, str(trained.teacher), rounds=2)
    for name in ("ce", "cached", "online", "step", "forward"):
        assert len(result[name]["seconds"]) == 2
    online, step, forward = (result[name]["cpu_seconds"] for name in ("online", "step", "forward"))
    ratios = sorted(a / (b + c) for a, b, c in zip(online, step, forward, strict=True))
    found = result["online_over_parts"]
    assert ratios[0] <= found["p25"] <= found["median"] <= found["p75"] <= ratios[1]
    assert result["cached_over_step"]["median"] > 0


def test_claims_are_medians_with_quartiles() -> None:
    claim = Claim.of("x", "what x is", [1.0, 2.0, 3.0, 4.0, 100.0], {})
    assert (claim.p25, claim.median, claim.p75, claim.rounds) == (2.0, 3.0, 4.0, 5)


def test_every_encoding_is_in_the_table() -> None:
    table = {row["encoding"]: row for row in bench_encodings(samples=300, views=2)}
    assert set(table) == (set(ENCODINGS) - {"topk"}) | {"topk:10", "topk:50"}
    assert table["float32"]["kl_t1_mean"] == 0
    assert table["float32"]["bytes_per_row"] >= 400
    assert 200 <= table["float16"]["bytes_per_row"] < table["float32"]["bytes_per_row"]
    assert 0 < table["float16"]["kl_t1_mean"] < 1e-4
    assert table["topk:10"]["kl_t1_mean"] > table["topk:50"]["kl_t1_mean"]


def test_encodings_can_be_measured_on_a_store(trained: Trained) -> None:
    [row] = [e for e in bench_encodings(200, 2, str(trained.store)) if e["encoding"] == "float32"]
    assert 40 <= row["bytes_per_row"] < 60  # ten classes


def test_synthetic_logits_have_a_teachers_shape() -> None:
    [first, second], labels = synthetic_logits(400, 2)
    assert first.shape == (400, 100)
    assert 2 < first.std(axis=1).mean() < 4
    assert (first.argmax(axis=1) == labels).mean() > 0.8
    assert 0 < np.abs(first - second).mean() < first.std()


def test_memory_counts_the_growth_of_the_store() -> None:
    small, large = bench_memory(samples=300, views=2, factors=(1, 3))
    assert 2.5 < large["store_bytes"] / small["store_bytes"] < 3.5
    assert min(row[name] for row in (small, large) for name in ("write_bytes", "read_bytes")) >= 0


def test_gpu_flag_needs_a_gpu(kdcache: Callable[..., Result]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the flag would run for minutes")
    done = kdcache("bench", "--gpu")
    assert done.code == 2
    assert "--device cuda" in done.err
