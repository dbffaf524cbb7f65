"""Class maps: files, checks, and the order that explains predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.models.classes import best_class_map, load_class_map, save_class_map
from kdcache_stores.errors import DataError

NAMES = ["ant", "bee", "cow"]


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.json", '{"7": "ant", "0": "bee", "3": "cow"}'),
        ("m.json", '{"7": 0, "0": 1, "3": 2}'),
        ("m.json", '{"kuh": 2, "ameise": 0, "biene": 1}'),
        ("m.csv", "teacher,dataset\n7,ant\n0,bee\n3,cow\n"),
        ("m.csv", "3, cow\n\nbiene, 1\n7,ant\n"),
    ],
)
def test_names_and_indices(tmp_path: Path, name: str, text: str) -> None:
    teacher = ["biene", "x", "y", "kuh", "u", "v", "w", "ameise"]
    assert load_class_map(written(tmp_path, name, text), 3, NAMES, 8, teacher) == (7, 0, 3)


def test_a_name_wins_over_an_index(tmp_path: Path) -> None:
    path = written(tmp_path, "m.json", '{"0": "1", "1": "0"}')
    assert load_class_map(path, 2, ["1", "0"]) == (0, 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", '{"0": "ant", "1": "bee"}', "1 of 3 dataset classes have no teacher class: cow"),
        ("m.json", '{"0": "ant", "1": "ant", "2": "cow"}', "dataset class 'ant' is given twice"),
        ("m.json", '{"0": "ant", "0": "bee", "2": "cow"}', "teacher class '0' is given twice"),
        ("m.json", '{"0": "ant", "1": "wasp", "2": "cow"}', "'wasp' is neither an index nor a"),
        ("m.json", '{"0": "ant", "5": "bee", "2": "cow"}', "5 is out of range: there are 5"),
        ("m.json", '{"0": 3, "1": 1, "2": 2}', "dataset class 3 is out of range: there are 3"),
        ("m.json", '{"crane": 0, "1": 1, "2": 2}', r"'crane' is the name of \[3, 4\]: give the"),
        ("m.json", "[1, 2]", "expected an object"),
        ("m.json", "{", "not readable"),
        ("m.csv", "0,ant,x\n", "expected 2 cells, found 3 in row 1"),
        ("m.txt", "0,ant\n", r"ending in \.json or \.csv"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    teacher = ["a", "b", "c", "crane", "crane"]
    with pytest.raises(DataError, match=message):
        load_class_map(written(tmp_path, name, text), 3, NAMES, teacher_names=teacher)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.json: not readable"):
        load_class_map(tmp_path / "absent.json", 3)


@given(st.permutations(range(7)))
def test_survives_a_file(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    path = tmp_path_factory.mktemp("maps") / "m.json"
    save_class_map(path, order)
    assert load_class_map(path, 7) == tuple(order)


@given(st.permutations(range(6)), st.integers(0, 2**31))
def test_finds_a_permutation_in_noise(order: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), 40)
    predictions = np.asarray(order)[labels]
    noisy = rng.random(240) < 0.3
    predictions[noisy] = rng.integers(0, 6, noisy.sum())
    assert best_class_map(labels, predictions, 6) == tuple(order)


@pytest.mark.parametrize(
    ("name", "text"), [("m.json", '{"0": "1", "1": "0"}'), ("m.csv", "0,1\n1,0\n")]
)
def test_a_byte_order_mark_is_no_part_of_a_class_map(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert load_class_map(tmp_path / name, 2, None) == (1, 0)
