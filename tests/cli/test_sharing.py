"""Commands on remote stores: students trained through URLs and from parts, and no secret anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdcache_stores import MismatchError
from tests.conftest import Result, Trained
from tests.sharing.conftest import _own_cache, bucket, s3_address  # noqa: F401
from tests.sharing.servers import FAULTS, StaticServer

Run = Callable[..., Result]


def student(store: object, out: Path, *more: object) -> list[object]:
    return ["train-student", "--store", store, "--dataset", "digits", "--student", "resnet8",
            "--out", out, "--train-samples", 60, "--epochs", 3, "--batch-size", 20, "--device", "cpu",
            "--method", "kd", "--json", *more]  # fmt: skip


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_loss"] for line in lines]


def test_a_student_through_a_failing_server_is_the_local_one_bit_by_bit(
    trained: Trained, tmp_path: Path, kdcache: Run
) -> None:
    assert kdcache(*student(trained.store, tmp_path / "local")).code == 0
    with StaticServer(trained.store.parent, password="me:hunter2", faults=FAULTS) as server:
        url = server.url.replace("http://", "http://me:hunter2@") + "/teacher.zarr"
        done = kdcache(*student(url, tmp_path / "remote", "--cache-size", "1MB"))
        assert done.code == 0, done.err
        wrong = kdcache("inspect", url.replace("hunter2", "wrongpass"))
        assert wrong.code == 1
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    models = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("local", "remote")]
    assert models[0] == models[1]
    texts = [done.out, done.err, wrong.out, wrong.err]
    texts += [f.read_bytes().decode("latin1") for f in (tmp_path / "remote").iterdir()]
    assert not any("hunter2" in text or "wrongpass" in text for text in texts)


def test_push_pull_a_part_and_train_from_it(
    trained: Trained,
    tmp_path: Path,
    kdcache: Run,
    bucket: str,  # noqa: F811
) -> None:
    pushed = kdcache("push", trained.store, f"{bucket}/teacher.zarr", "--json")
    assert pushed.code == 0, pushed.err
    pulled = kdcache(
        "pull", f"{bucket}/teacher.zarr", tmp_path / "part", "--views", "2:4", "--json"
    )
    assert pulled.code == 0, pulled.err
    assert kdcache("verify", tmp_path / "part", "--expect", pulled.json["digest"], "-q").code == 0
    done = kdcache(*student(tmp_path / "part", tmp_path / "run"))
    assert done.code == 0, done.err
    assert done.json["stores"] == [pulled.json["digest"]]
    again = kdcache(*student(f"{bucket}/teacher.zarr", tmp_path / "s3", "--cache-size", "0"))
    assert again.code == 0, again.err
    listed = kdcache("ls", bucket, "--json").json
    assert [(item["name"], item["views"]) for item in listed] == [("teacher.zarr", 4)]
    assert "teacher.zarr" in kdcache("ls", bucket).out
    same = kdcache("diff", tmp_path / "part", f"{bucket}/teacher.zarr", "--json")
    assert (same.code, same.json["equal_views"], same.json["only_b"]) == (1, [2, 3], [0, 1])
    assert kdcache("diff", trained.store, f"{bucket}/teacher.zarr", "-q").code == 0


def test_a_part_trains_on_the_views_that_it_holds(
    trained: Trained, tmp_path: Path, kdcache: Run
) -> None:
    """Views 2 and 3 as a part give the same losses as a whole store whose views 0 and 1 are skipped."""
    from kdcache import CachedViews, load_dataset

    assert kdcache("pull", trained.store, tmp_path / "part", "--views", "2:4", "-q").code == 0
    data = load_dataset("digits")
    with (
        CachedViews(data, [tmp_path / "part"], 500) as part,
        CachedViews(data, [trained.store], 500) as whole,
        CachedViews(data, [trained.store, tmp_path / "part"], 500, ()) as both,
    ):
        assert (part.views, part.first, both.views, both.first) == (2, 2, 2, 2)
        for one, other in zip(part.epoch(0), whole.epoch(2), strict=False):
            assert set(one.views.tolist()) == set(other.views.tolist()) == {2}
            logits = one.teachers[0]["logits"]
            places = {int(row): i for i, row in enumerate(one.rows)}
            for i, row in enumerate(other.rows.tolist()):
                if row in places:
                    assert (one.images[places[row]] == other.images[i]).all()
                    assert torch.equal(logits[places[row]], other.teachers[0]["logits"][i])
    with pytest.raises(MismatchError, match="both hold logits of one teacher"):
        CachedViews(data, [trained.store, tmp_path / "part"], 500)


def test_cache_shows_and_clears(trained: Trained, kdcache: Run) -> None:
    with StaticServer(trained.store.parent) as server:
        assert kdcache("diff", f"{server.url}/teacher.zarr", trained.store, "-q").code == 0
    shown = kdcache("cache", "--json").json
    assert shown["objects"] > 0
    assert kdcache("cache", "--clear", "--json").json["nbytes"] == shown["nbytes"]
    assert kdcache("cache", "--json").json["objects"] == 0


def test_verify_reads_the_server_and_not_the_cache(
    trained: Trained, tmp_path: Path, kdcache: Run
) -> None:
    shutil.copytree(trained.store, tmp_path / "team" / "copy.zarr")
    with StaticServer(tmp_path / "team") as server:
        url = f"{server.url}/copy.zarr"
        assert kdcache("verify", url, "-q").code == 0
        assert kdcache(*student(url, tmp_path / "run")).code == 0
        shard = tmp_path / "team/copy.zarr/logits/values/c/1/0/0"
        shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
        assert kdcache("verify", url, "-q").code == 1


def test_card(trained: Trained, tmp_path: Path, kdcache: Run) -> None:
    shutil.copytree(trained.store, tmp_path / "copy.zarr")
    done = kdcache("card", tmp_path / "copy.zarr", "--license", "mit", "--json")
    assert done.json == [
        str(tmp_path / "copy.zarr" / name) for name in ("README.md", "croissant.json")
    ]
    assert kdcache("verify", tmp_path / "copy.zarr", "-q").code == 0


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["push", "OUT/nope", "OUT/there"], 1, "nope: there is no such folder"),
        (["pull", "OUT/nope", "OUT/there"], 1, "nope: there is no such folder"),
        (["pull", "OUT/nope", "OUT/there", "--views", "3:1"], 2, "A below B"),
        (["ls", "OUT/nope"], 1, "no folder"),
        (["inspect", "gopher://u:SECRET@host/x"], 2, "no such kind of URL"),
        (["push", "s3://a/b", "OUT/there"], 2, "pull it first"),
        (["card", "OUT", "--license", "no licence!"], 2, "identifier of a licence"),
        (["train-student", "--cache-size", "much"], 2, "no size"),
    ],
)
def test_bad_input(args: list[str], code: int, words: str, tmp_path: Path, kdcache: Run) -> None:
    done = kdcache(*[arg.replace("OUT", str(tmp_path)) for arg in args])
    assert done.code == code, done.err
    assert words in done.err.replace("\n", " ")
    assert "SECRET" not in done.err
    assert "Traceback" not in done.err
