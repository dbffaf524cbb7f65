"""Stages: what is under way before the first row is told from the first second, with counts and rates."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from kdcache.data.loading import DatasetSource, load_dataset
from kdcache.dumping.job import DumpRequest, prepare_dump
from kdcache.dumping.requests import TeacherRequest
from kdcache.stages import UnderWay, counted, stage, watching
from kdcache_cli import output
from tests.conftest import Trained


def test_a_stage_is_told_at_its_start_and_end_whatever_happens() -> None:
    told: list[UnderWay] = []
    with watching(lambda now: told.append(replace(now))):
        assert list(counted(range(5), "counting", "things", 5)) == [0, 1, 2, 3, 4]
        with pytest.raises(KeyError), stage("failing"):
            raise KeyError
    list(counted(range(3), "unseen", "things"))
    assert [(now.what, now.done, now.over) for now in told] == [
        ("counting", 0, False), ("counting", 5, True), ("failing", 0, False), ("failing", 0, True),
    ]  # fmt: skip
    assert told[1].rate == pytest.approx(5 / told[1].seconds)
    assert told[0].rate == 0


def test_a_folder_and_a_dump_say_what_they_do(tmp_path: Path, trained: Trained) -> None:
    for number in range(4):
        file = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(file)
    told: list[UnderWay] = []
    with watching(lambda now: told.append(now) if now.over else None):
        load_dataset(f"folder:{tmp_path / 'images'}")
        teacher = TeacherRequest(tmp_path / "t.zarr", str(trained.teacher))
        request = DumpRequest(DatasetSource("digits"), [teacher], views=2, encoding="compact")
        with prepare_dump(request):
            pass
    said = {now.what: (now.unit, now.done) for now in told}
    assert said["scanning folder:images (train)"] == ("images", 4)
    assert said["hashing the keys of folder:images (train)"][0] == "keys"
    assert said["forwarding calibration rows"] == ("rows", 512)
    assert any(what.startswith("testing resnet8 on clean test") for what in said)
    assert any(what.startswith("trying resnet8 on a small batch") for what in said)


def test_a_log_has_a_line_for_what_took_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(output, "stderr", Console(file=text, width=200))
    show = output.StageBars(output.progress(False, ""), quiet=False)
    for seconds in (0.5, 36.0):
        show(UnderWay("scanning", "images", seconds=0.0))
        show(UnderWay("scanning", "images", None, 1_281_167, seconds, over=True))
    assert text.getvalue().splitlines() == ["scanning: 36.0 s: 1,281,167 images, 35,588 images/s"]


def test_a_log_has_a_line_now_and_then_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    text, clock = io.StringIO(), iter((0.0, 4.0, 12.0, 13.0, 14.0))
    monkeypatch.setattr(output, "stderr", Console(file=text, width=200))
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    log = output.LogLines(quiet=False)
    for line, after in (("too soon", 10), ("later", 10), ("too soon", 10), ("last", 0)):
        log(line, after)
    assert text.getvalue().splitlines() == ["later", "last"]
