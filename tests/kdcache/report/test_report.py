"""The report: every figure in every form, right values, and a page whatever is missing."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache._version import __version__
from kdcache.data.loading import load_dataset
from kdcache.report.building import report
from kdcache.report.collect import find_runs, grouped, read_run
from kdcache.report.logits import (
    TestLogits,
    class_means,
    find_teacher,
    run_stores,
    teacher_beside,
)
from kdcache.report.page import Heading, render
from kdcache.report.sample_panels import COUNT, varied_samples
from kdcache.report.sections.class_accuracy import per_class_figure
from kdcache.report.sections.settings_table import seeds
from kdcache.report.sections.training_section import results
from kdcache.report.standardization import heatmaps, standardization_section, toy_divergences
from kdcache.report.survey import survey
from kdcache.views.plan import ViewPlan
from kdcache_stores import (
    FieldSpec,
    Plan,
    Samples,
    StoredTeacher,
    StoreWriter,
    UsageError,
    open_store,
)
from tests.conftest import Result, Trained


def pictures(page: str) -> list[str]:
    return re.findall(r'<svg role="img" aria-label="([^"]+)"', page)


def test_every_figure_is_in_the_page_and_beside_it(written: Path) -> None:
    page = (written / "index.html").read_text(encoding="utf-8")
    names = re.findall(r'<figure id="([^"]+)">', page)
    expected = {
        *("accuracy-last", "curve-accuracy", "curve-loss", "curve-nll", "logit-scale"),
        "class-accuracy",
        *(f"heatmap-{i}-{kind}" for i in (0, 1) for kind in ("raw", "standardized")),
        *(f"teacher-{kind}" for kind in ("top1", "mean", "std", "entropy", "classes", "variation")),
    }
    assert set(names) == expected
    assert len(names) == len(pictures(page)) == page.count("<svg ")
    for name in names:
        with Image.open(written / f"{name}.png") as picture:
            assert min(picture.size) > 200
        rows = list(csv.reader((written / f"{name}.csv").read_text().splitlines()))
        assert len(rows) > 1
        assert {len(row) for row in rows} == {len(rows[0])}
    assert (written / "runs.csv").exists()
    assert (written / "teacher-samples.png").exists()


def test_the_page_needs_no_network_and_is_whole(written: Path) -> None:
    page = (written / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) >= 2 * COUNT
    assert all(re.search(r'alt="[^"]+"', image) for image in images)
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower().split()


def test_ink_follows_the_page(written: Path) -> None:
    page = (written / "index.html").read_text(encoding="utf-8")
    drawings = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    for drawing in drawings:
        assert "currentColor" in drawing
        assert "#1b1f24" not in drawing
        assert "fill: #000" not in drawing


def test_the_table_holds_the_runs(written: Path, students: Path) -> None:
    rows = list(csv.DictReader((written / "runs.csv").read_text().splitlines()))
    assert {row["run"] for row in rows} == {"ce-0", "ce-1", "kd-0", "kd-1", "teacher"}
    for row in rows:
        assert float(row["temperature"]) > 0
        assert float(row["calibrated_nll"]) <= float(row["last_nll"]) + 1e-6
        if row["run"] != "teacher":
            summary = read_run(students / row["run"]).summary
            assert summary is not None
            assert float(row["last_top1"]) == summary["last_top1"]
    page = (written / "index.html").read_text(encoding="utf-8")
    table = page[page.index("Results, best first") : page.index("</table>")]
    assert ">baseline<" in table
    assert ">teacher<" in table
    assert len(re.findall(r"[+-]\d+\.\d\d ± \d+\.\d\d", table)) == 1


def test_the_teacher_is_found_by_its_weights(trained: Trained, students: Path) -> None:
    runs = [read_run(path) for path in find_runs([students, trained.teacher])]
    with ExitStack() as opened:
        stores = run_stores(runs, opened)  # the students' configs name the store
        teacher = find_teacher(runs, stores)
        assert find_teacher(runs[:-1], stores) is None
    assert teacher is not None
    assert teacher.path == trained.teacher


def test_the_teacher_is_found_beside_the_store_that_it_filled(
    trained: Trained, students: Path, tmp_path: Path
) -> None:
    runs = [
        read_run(students / "kd-0")
    ]  # its config names the store, which lies beside the teacher
    with ExitStack() as opened:
        stores = run_stores(runs, opened)
        teacher = teacher_beside(runs, stores)
        assert teacher is not None
        assert teacher.path == trained.teacher.resolve()
        given = [*runs, read_run(trained.teacher)]
        assert teacher_beside(given, stores) is None  # it is no other run
        damaged = tmp_path / "damaged"
        damaged.mkdir()
        (damaged / "config.toml").write_text("no TOML")
        other = replace(runs[0], path=tmp_path / "kd")
        other.path.mkdir()
        beside = teacher_beside(
            [other], stores
        )  # a damaged run there is not what the report is about
        assert beside is not None
        assert beside.path == teacher.path


def test_the_toy_case_is_shown_on_request() -> None:
    network = TestLogits("kd", torch.eye(3), torch.arange(3))
    shown = standardization_section(network, {"kd": [network]}, toy=True)
    usual = standardization_section(network, {"kd": [network]})
    assert {f.name for f in shown.figures} - {f.name for f in usual.figures} == {"toy-case"}
    assert len(shown.tables) == len(usual.tables) + 1


def test_the_page_says_when_and_how_it_was_made(written: Path) -> None:
    page = (written / "index.html").read_text(encoding="utf-8")
    header = page[: page.index("</header>")]
    made = rf"<br>\d{{4}}-\d\d-\d\d \d\d:\d\d UTC, kdcache {re.escape(__version__)}<"
    assert re.search(made, header)
    assert "<br>kdcache report &lt;this&gt;</p>" in render(
        Heading("title", "intro", ["kdcache report <this>"]), [], []
    )


def test_the_settings_of_each_group_are_told(written: Path) -> None:
    page = (written / "index.html").read_text(encoding="utf-8")
    table = page[page.index(">Settings<") :]
    rows = [
        re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row)
        for row in re.findall(r"<tr>.*?</tr>", table)
    ]
    assert rows[0][:4] == ["method", "T", "weight of CE", "of the teacher&#x27;s term"]
    by_method = {row[0]: row[1:] for row in rows[1:3]}
    assert by_method["kd"] == [
        "4", "0.1", "0.9", "2", "16", "0.05", "sgd step", "48", "4", "0-1"
    ]  # fmt: skip
    assert by_method["ce"][-1] == "0-1"
    assert seeds([7, 0, 1, 2, 5]) == "0-2, 5, 7"


def test_the_gap_closed_is_a_part_of_the_teachers_lead(students: Path) -> None:
    groups = grouped([read_run(path) for path in find_runs([students])])
    means = {group.label: np.mean(list(group.values("last_top1").values())) for group in groups}
    table, _, _ = results(groups, None, {}, 0.99)
    place = table.columns.index("gap closed, %")
    closed = {row[0]: row[place] for row in table.rows}
    part = (means["kd"] - means["ce"]) / (0.99 - means["ce"])
    assert closed == {"kd": f"{100 * part:.0f}", "ce": ""}
    table, _, _ = results(groups, None, {}, 0.0)  # a teacher that does not lead
    assert {row[0]: row[place] for row in table.rows} == {"kd": "–", "ce": ""}
    table, _, _ = results(groups, None, {})
    assert "gap closed, %" not in table.columns


def test_classes_are_named_and_those_furthest_behind_the_teacher_come_first() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2, -1])
    right = torch.eye(3)[labels.clamp(min=0)]
    wrong = right.clone()
    wrong[2] = torch.tensor([1.0, 0, 0])  # half of class 1
    teacher = TestLogits("teacher", right, labels)
    student = [TestLogits("kd", wrong, labels), TestLogits("kd", right, labels)]
    drawn = per_class_figure({"kd": student}, teacher, ["ant", "bee", "<cat>"])
    assert drawn is not None
    rows = list(csv.DictReader(io.StringIO(drawn.csv)))
    assert [(r["name"], r["kd"], r["teacher"]) for r in rows] == [
        ("bee", "0.75", "1.0"), ("ant", "1.0", "1.0"), ("<cat>", "1.0", "1.0"),
    ]  # fmt: skip
    assert "bee (kd 75.0 %)" in drawn.alt
    assert per_class_figure({}, None, None) is None
    unlabelled = TestLogits("kd", right, torch.full((7,), -1))
    assert per_class_figure({"kd": [unlabelled]}, None, None) is None


def test_toy_case_is_the_published_one() -> None:
    divergences = toy_divergences()
    assert divergences["student 1"]["raw"] == pytest.approx(0.1749, abs=5e-5)
    assert divergences["student 2"]["raw"] == pytest.approx(0.3457, abs=5e-5)
    assert divergences["student 1"]["standardized"] == pytest.approx(0.09951, abs=5e-6)
    assert divergences["student 2"]["standardized"] == pytest.approx(0, abs=1e-6)


def test_heatmaps_average_the_samples_of_a_class() -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(np.arange(40) % 4)
    a, b = (torch.from_numpy(rng.normal(size=(40, 4))).float() for _ in range(2))
    means = np.stack([a[labels == k].double().mean(0).numpy() for k in range(4)])
    np.testing.assert_allclose(class_means(a, labels), means, atol=1e-12)
    figures, table = heatmaps(TestLogits("t", a, labels), [TestLogits("s", b, labels)])
    other = np.stack([b[labels == k].double().mean(0).numpy() for k in range(4)])
    gap = np.abs(means - other)
    np.fill_diagonal(gap, 0)
    drawn = list(csv.DictReader(io.StringIO(figures[0].csv)))
    values = np.array([float(row["difference"]) for row in drawn]).reshape(4, 4)
    np.testing.assert_allclose(values, gap, atol=1e-12)
    assert table.rows[0][1:3] == [f"{gap.mean():.3f}", f"{gap.max():.3f}"]
    # Z-scores do not see the scale: ten times the teacher is the teacher.
    _, table = heatmaps(TestLogits("t", a, labels), [TestLogits("s", 10 * a + 3, labels)])
    assert table.rows[0][3:] == ["0.000", "0.000"]


def test_survey_is_what_numpy_says(trained: Trained) -> None:
    with open_store(trained.store) as store:
        statistics = survey(store)
        every = np.stack([store.read(view) for view in range(4)]).astype(np.float64)
        labels = store.labels
    hits = every.argmax(axis=2) == labels
    assert list(statistics.top1.values()) == pytest.approx(hits.mean(axis=1).tolist())
    np.testing.assert_allclose(
        statistics.variation, np.sqrt(every.var(axis=0).mean(axis=1)), rtol=1e-4
    )
    chance = np.exp(every) / np.exp(every).sum(axis=2, keepdims=True)
    entropy = -(chance * np.log(chance)).sum(axis=2)
    for name, wanted in (
        ("mean", every.mean(axis=2)),
        ("std", every.std(axis=2)),
        ("entropy", entropy),
    ):
        got = np.sort(statistics.statistics[name])
        np.testing.assert_allclose(got, np.sort(wanted.ravel()), rtol=1e-3, atol=1e-5)
    for k in range(10):
        assert statistics.class_hits[k] == hits[:, labels == k].sum()
        assert statistics.class_rows[k] == 4 * (labels == k).sum()


def test_survey_of_a_large_store_is_a_sample(trained: Trained) -> None:
    with open_store(trained.store) as store:
        statistics = survey(store, budget=1437 * 10 * 2, few_views=2)
    assert statistics.views == [0, 3]
    assert len(statistics.variation) == 1437


def test_samples_show_what_the_teacher_saw(trained: Trained) -> None:
    dataset = load_dataset("digits", "train")
    with open_store(trained.store) as store:
        statistics = survey(store)
        strips, table, _ = varied_samples(store, statistics, dataset)
        assert len(strips) == COUNT
        order = np.argsort(-statistics.variation, kind="stable")
        plan = ViewPlan.from_store(store.plan, dataset)
        rows = list(csv.DictReader(io.StringIO(table)))
        assert list(dict.fromkeys(int(r["row"]) for r in rows)) == order[:COUNT].tolist()
        for strip, row in zip(strips[:3], order[:3], strict=True):
            views = [r for r in rows if int(r["row"]) == row]
            assert len(strip.tiles) == 1 + len(views)
            shown = [np.array(Image.open(io.BytesIO(tile.png))) for tile in strip.tiles]
            np.testing.assert_array_equal(shown[0], dataset.decode(row)[0].numpy())
            for tile, line in zip(shown[1:], views, strict=True):
                view = int(line["view"])
                np.testing.assert_array_equal(tile, plan.images([row], view)[0, 0].numpy())
                assert int(line["prediction"]) == store.read(view, [int(row)]).argmax()
                assert line["augmentation"]


def test_only_runs(students: Path, tmp_path: Path) -> None:
    hidden = tmp_path / "runs"
    shutil.copytree(students, hidden)
    for file in hidden.glob("*/config.toml"):
        file.write_text(re.sub(r"store_paths = \[.*?\]", 'store_paths = ["gone"]', file.read_text(),
                               flags=re.DOTALL))  # fmt: skip
    done = report([hidden], [], tmp_path / "out")
    assert len(done.left_out) == 1
    assert "--teacher" in done.left_out[0]
    page = done.page.read_text(encoding="utf-8")
    assert "Left out" in page
    assert 'id="logit-scale"' in page
    assert "heatmap" not in page


def test_warnings_of_runs_are_told(students: Path, tmp_path: Path) -> None:
    shutil.copytree(students, tmp_path / "runs")
    file = tmp_path / "runs" / "kd-0" / "summary.json"
    warning = {"rule": "some-rule", "message": "T = 20 > 5.", "remedy": "use 4."}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"warnings": [warning]}))
    report([tmp_path / "runs"], [], tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.index("T = 20") < page.index("Results, best first")
    # Its teacher is not named, and lies beside the store that the runs name.
    assert 'id="heatmap-0-raw"' in page
    assert ">gap closed, %<" in page
    assert re.search(r"teacher&#x27;s top-1 on the test split is \d+\.\d\d %", page)
    assert page.count("T = 20 &gt; 5. Remedy: use 4.") == 1


def test_a_teacher_can_be_named(trained: Trained, students: Path, tmp_path: Path) -> None:
    done = report([students / "kd-0"], [], tmp_path, teacher=str(trained.teacher))
    assert done.left_out == []
    assert (tmp_path / "heatmap-0-raw.png").exists()


def test_runs_without_their_dataset_or_weights(students: Path, tmp_path: Path) -> None:
    run = tmp_path / "kd"
    shutil.copytree(students / "kd-0", run)
    (run / "summary.json").unlink()
    (run / "model.safetensors").unlink()
    done = report([run], [], tmp_path / "out")
    assert any("did not finish" in reason for reason in done.left_out)
    assert "is not finished: 2 of 2 epochs" in done.page.read_text(encoding="utf-8")
    done = report([run], [], tmp_path / "out", dataset=f"arrays:{tmp_path / 'gone.npz'}")
    assert any("gone.npz" in reason for reason in done.left_out)
    assert 'id="curve-accuracy"' in done.page.read_text(encoding="utf-8")


def test_only_a_store(trained: Trained, tmp_path: Path) -> None:
    done = report([], [trained.store], tmp_path)
    assert done.left_out == []  # the plan names a dataset that is there
    assert "pays off after 4 student epochs" in done.page.read_text(encoding="utf-8")


def test_a_store_without_labels_or_images(tmp_path: Path) -> None:
    samples = Samples([f"row {i}" for i in range(30)], np.full(30, -1))
    plan = Plan("elsewhere", "train", 5, samples.fingerprint, {"name": "mystery"}, seed=0)
    teacher = StoredTeacher("net", "0" * 64, {}, "float32", 5)
    with StoreWriter(tmp_path / "s.zarr", plan=plan, teacher=teacher, samples=samples, views=2,
                     fields={"logits": FieldSpec((5,))}) as writer:  # fmt: skip
        rng = np.random.default_rng(0)
        for shard in writer.pending():
            writer.write(shard, {"logits": rng.normal(size=(shard.rows, 5)).astype(np.float32)})
        writer.seal()
    done = report([], [tmp_path / "s.zarr"], tmp_path / "out")
    assert len(done.left_out) == 1
    assert "elsewhere" in done.left_out[0]
    page = done.page.read_text(encoding="utf-8")
    assert "no labels" in page
    assert 's-entropy"' in page
    assert 's-top1"' not in page


def test_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to report"):
        report([], [], tmp_path)


@pytest.mark.slow
def test_command_writes_the_same_report(
    trained: Trained, students: Path, written: Path, tmp_path: Path, kdcache: Callable[..., Result]
) -> None:
    done = kdcache("report", students, trained.teacher, "--store", trained.store, "--out", tmp_path,
                   "--device", "cpu", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["page"] == str(tmp_path / "index.html")
    assert all(Path(file).exists() for file in done.json["files"])
    for name in ("curve-accuracy.csv", "teacher-samples.csv"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()
    page, other = ((folder / "index.html").read_text("utf-8") for folder in (tmp_path, written))
    made = re.compile(r"<br>.*?</p>")  # when, and by which command
    assert f"kdcache report {students}" in page
    assert made.sub("", page, count=1) == made.sub("", other, count=1)


def test_command_refuses_what_it_cannot_report(
    tmp_path: Path, kdcache: Callable[..., Result]
) -> None:
    assert kdcache("report", tmp_path / "none", "--out", tmp_path).code == 1
    assert kdcache("report", "--out", tmp_path).code == 2


def test_inspect_says_what_the_store_saves(
    trained: Trained, kdcache: Callable[..., Result]
) -> None:
    done = kdcache("inspect", trained.store)
    text = " ".join(done.out.split())
    assert "5,748 of the teacher spent once" in text
    assert "pays off after 4 student epochs" in text
