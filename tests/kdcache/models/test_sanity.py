"""Refusing a teacher that cannot be the right one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcache.dumping.outputs import check_outputs
from kdcache.preprocessing import Preprocessing
from kdcache.teachers.sanity import Check, clean_check, require_trained
from kdcache.teachers.teacher import Teacher
from kdcache_stores.errors import DataError, MismatchError

CLASSES = 16


def reader(order: list[int] | None = None) -> Teacher:
    """A teacher that reads the class off the brightest of 16 pixels; `order` permutes them."""
    rows: list[nn.Module] = [nn.Flatten()]
    if order is not None:
        layer = nn.Linear(CLASSES, CLASSES, bias=False)
        layer.weight.data = torch.eye(CLASSES)[torch.tensor(order)]
        rows.append(layer)
    return Teacher("reader", nn.Sequential(*rows), Preprocessing((0,), (1,)), CLASSES, "0" * 64)


def data(n: int, accuracy: float, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Images whose brightest pixel names the label with the given probability, else any class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    shown = np.where(rng.random(n) < accuracy, labels, rng.integers(0, CLASSES, n))
    images = np.zeros((n, CLASSES), np.uint8)
    images[np.arange(n), shown] = 255
    return torch.from_numpy(images).view(n, 1, 4, 4), labels


def check_teacher(
    teacher: Teacher, images: Tensor, labels: np.ndarray, where: str = "clean images"
) -> float:
    check = clean_check(teacher, images, labels)
    require_trained(teacher, check, where)
    return check.top1


def test_a_good_teacher_passes() -> None:
    images, labels = data(400, 0.7)
    top1 = check_teacher(reader(), images, labels)
    assert top1 == clean_check(reader(), images, labels).top1 == pytest.approx(0.72, abs=0.06)


def test_a_weak_but_trained_teacher_passes() -> None:
    assert check_teacher(reader(), *data(1000, 0.15)) == pytest.approx(0.2, abs=0.05)


@given(st.integers(0, 2**31))
def test_guessing_is_refused_whatever_the_seed(seed: int) -> None:
    with pytest.raises(MismatchError, match=r"cannot be told from guessing|in another order"):
        check_teacher(reader(), *data(400, 0.0, seed))


def test_guessing_is_refused_as_such() -> None:
    images, labels = data(400, 0.0)
    with pytest.raises(
        MismatchError, match=r"on 400 images cannot be told from guessing.*weights and"
    ):
        check_teacher(reader(), images, labels, where="400 images")


def test_always_naming_the_commonest_class_is_guessing() -> None:
    labels = np.repeat([0, 1, 2], [300, 50, 50])
    assert Check(labels, np.zeros(400, np.int64), 3).near_chance()
    assert not Check(labels, labels, 3).near_chance()


def test_another_order_of_classes_is_named() -> None:
    order = [3, 0, 1, 2, *range(4, CLASSES)][::-1]
    images, labels = data(600, 0.8)
    with pytest.raises(MismatchError, match=r"class 0 is its \d+.*--class-map FILE"):
        check_teacher(reader(order), images, labels)
    found = clean_check(reader(order), images, labels).class_order()
    assert found is not None
    inverse = np.argsort(order)
    assert found == tuple(inverse)
    mapped = Teacher(
        "mapped",
        reader(order).module,
        Preprocessing((0,), (1,)),
        CLASSES,
        "0" * 64,
        class_map=found,
    )
    assert check_teacher(mapped, images, labels) == clean_check(reader(), images, labels).top1


@pytest.mark.parametrize("accuracy", [0.1, 0.3, 1.0])
def test_no_other_order_is_seen_in_a_teacher_that_has_the_right_one(accuracy: float) -> None:
    for seed in range(5):
        assert clean_check(reader(), *data(600, accuracy, seed)).class_order() is None


def test_one_swapped_pair_is_left_to_the_user() -> None:
    order = [1, 0, *range(2, CLASSES)]
    assert check_teacher(reader(order), *data(400, 1.0)) == pytest.approx(0.875, abs=0.05)


def test_unlabelled_images_are_left_out() -> None:
    images, labels = data(100, 1.0)
    labels[::2] = -1
    assert len(clean_check(reader(), images, labels).labels) == 50
    nothing = np.full(100, -1)
    assert len(clean_check(reader(), images, nothing).labels) == 0


def test_labels_beyond_the_classes_are_refused() -> None:
    images, labels = data(10, 1.0)
    labels[0] = CLASSES
    with pytest.raises(MismatchError, match="label 16 of the dataset is not among the 16 classes"):
        clean_check(reader(), images, labels)


def test_too_few_images_tell_nothing() -> None:
    right = np.zeros(2, np.int64)
    assert not Check(right, right, 3).near_chance()
    assert Check(np.arange(12) % 3, np.zeros(12, np.int64), 3).near_chance()


class Answers(nn.Module):
    """The brightest-pixel teacher with something done to its logits."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(9 * images.flatten(1) - 3)


def answering(change: Callable[[Tensor], Tensor]) -> Teacher:
    return Teacher("changed", Answers(change), Preprocessing((0,), (1,)), CLASSES, "0" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z.softmax(1), "gives probabilities, not logits"),
        (lambda z: z.softmax(1).half(), "gives probabilities, not logits"),
        (lambda z: nn.functional.one_hot(z.argmax(1), CLASSES).float(), "gives probabilities"),
        (lambda z: z - z.mean(0), "in another batch"),
        (lambda z: (z - z.mean(0)) / z.std(0).add(1), "in another batch"),
        (lambda z: z + torch.randn_like(z), "in another batch"),
        (lambda z: nn.functional.dropout(z, 0.5, training=True), "in another batch"),
    ],
)
def test_answers_that_cannot_be_cached(change: Callable[[Tensor], Tensor], message: str) -> None:
    images, _ = data(32, 0.7)
    with pytest.raises(MismatchError, match=f"{message}.*--allow-untrained"):
        check_outputs(answering(change), images)
    assert message in check_outputs(answering(change), images, allow=True)[0]


def test_answers_that_are_told_or_nothing_to_tell() -> None:
    images, _ = data(32, 0.7)
    assert check_outputs(answering(lambda z: z), images) == []
    assert check_outputs(answering(lambda z: z * 0), images) == []
    assert check_outputs(answering(lambda z: z), images[:1]) == []
    assert "log-probabilities" in check_outputs(answering(lambda z: z.log_softmax(1)), images)[0]
    assert "between 0 and 1" in check_outputs(answering(torch.sigmoid), images)[0]
    with pytest.raises(DataError, match="not finite for 32 of 32 views"):
        check_outputs(answering(lambda z: z / 0), images, allow=True)
