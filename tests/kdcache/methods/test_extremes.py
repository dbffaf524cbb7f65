"""Half precision, autocast, masks, constant rows and two classes: finite everywhere."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from fields import ON_LOGITS, on_logits

from kdcache.methods.logits.kd import kd
from kdcache.methods.noise import Noise
from kdcache.methods.objective import Objective
from kdcache.methods.scaling import standardize
from kdcache.methods.step import Step
from kdcache.methods.table import METHODS

B = 6
OBJECTIVES: list[dict[str, Any]] = [
    *(
        {"method": name, "standardize": standardize}
        for name in ON_LOGITS
        for standardize in (
            (False, "unbiased", "biased") if METHODS[name].standardized else (False,)
        )
    ),
    {"method": "mlkd", "options": {"variant": "as-described"}, "standardize": "unbiased"},
    {"method": "kd", "combine": "mean-probs", "weights": "entropy"},
    {"method": "kd", "combine": "mean-losses", "weights": "confidence"},
    {"method": "kd", "noise": Noise("laplace", relative=True, copies=2)},
    {"method": "kd", "options": {"target": "hard"}},
    {"method": "kd", "add": ("dist", "dkd:2"), "standardize": "unbiased"},
    {"method": "kd", "ablation": "target-only"},
    {"method": "kd", "ablation": "target-removed"},
    {"method": "kd", "ablation": "non-target-permuted"},
    {"method": "kd", "ablation": "non-target-uniform"},
]


def paired(options: dict[str, Any], *logits: torch.Tensor) -> list[torch.Tensor]:
    """The logits, with a second view where the method needs one."""
    if not METHODS[options["method"]].pairs:
        return list(logits)
    return [torch.stack([x, x.flip(0)], 1) for x in logits]


def rows(kind: str, generator: torch.Generator, k: int) -> torch.Tensor:
    z = 3 * torch.randn(B, k, generator=generator)
    if kind == "masked":
        z[torch.arange(B), torch.arange(B) % k] = -1000
    if kind == "certain":
        z[torch.arange(B), torch.arange(B) % k] = 1000
    if kind == "constant":
        z[:] = 1.7
    return z


def value_and_gradient(
    options: dict[str, Any], student: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    objective = Objective(**options)
    student = student.detach().clone().requires_grad_()
    teachers = [teacher, teacher.flip(0)] if objective.needs_teacher else []
    loss, parts = on_logits(
        objective,
        student,
        teachers,
        torch.arange(B) % student.shape[-1],
        Step(keys=torch.arange(B), epoch=15),
    )
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(part.isfinite() for part in parts.values()), parts
    assert student.grad is not None
    gradients = [student.grad, *(p.grad for p in objective.parameters() if p.grad is not None)]
    return loss.detach(), gradients


@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
@pytest.mark.parametrize("k", [2, 10])
@pytest.mark.parametrize("kind", ["plain", "masked", "certain", "constant"])
def test_values_and_gradients_are_finite(options: dict[str, Any], k: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    awkward, plain = paired(options, rows(kind, generator, k), rows("plain", generator, k))
    for student, teacher in ((plain, awkward), (awkward, plain), (awkward, awkward)):
        loss, gradients = value_and_gradient(options, student, teacher)
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
def test_half_precision_and_autocast_change_nothing(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = paired(options, *(rows("plain", generator, 10).half() for _ in range(2)))
    exact, _ = value_and_gradient(options, student.float(), teacher.float())
    half, _ = value_and_gradient(options, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, _ = value_and_gradient(options, student, teacher)
    assert exact == half == under


def test_autocast_is_off_inside() -> None:
    seen = []
    objective = Objective()
    assert objective.loss is not None
    objective.loss.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    logits = torch.randn(B, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        on_logits(objective, logits, [logits.flip(0)], torch.arange(B))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
def test_float64_agrees_with_float32(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = paired(options, *(rows("plain", generator, 10) for _ in range(2)))
    single, _ = value_and_gradient(options, student, teacher)
    double, _ = on_logits(
        Objective(**options),
        student.double(),
        [teacher.double(), teacher.flip(0).double()],
        torch.arange(B) % 10,
        Step(keys=torch.arange(B), epoch=15),
    )
    torch.testing.assert_close(single.double(), double, rtol=2e-5, atol=0)


@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
def test_no_value_is_waited_for(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Meta tensors have no values: a step that read one, and so made a GPU wait, would raise here.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    student, teacher = paired(options, *torch.randn(2, B, 10, device="meta"))
    student.requires_grad_()
    words = torch.zeros(B, 2, dtype=torch.int64, device="meta")
    objective = Objective(**options).to("meta")
    teachers = [teacher, teacher] if objective.needs_teacher else []
    loss, parts = on_logits(objective, student, teachers, words[:, 0], Step(keys=words))
    loss.backward()
    assert {loss.device.type, *(part.device.type for part in parts.values())} == {"meta"}


FLAT = (0.0, 1e-9, 1e-6, 1e-4, 9e-3)
"""Standard deviations of rows that have no spread to speak of."""


def spread(deviation: float, generator: torch.Generator, k: int = 10) -> torch.Tensor:
    z = torch.randn(B, k, generator=generator, dtype=torch.float64)
    return deviation * (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True)


@pytest.mark.parametrize("method", ["kd", "dkd", "mlkd", "ctkd"])
@pytest.mark.parametrize("convention", ["unbiased", "biased"])
@pytest.mark.parametrize("deviation", FLAT)
def test_a_row_without_spread_is_pulled_no_harder_than_by_plain_distillation(
    method: str, convention: str, deviation: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    options = {"method": method, "kd_weight": 1.0, "ce_weight": 0.0}
    if method != "ctkd":
        options["temperature"] = 2.0
    rows = spread(deviation, generator).float(), spread(1, generator).float()
    flat, teacher = paired(options, *rows)
    _, (plain, *_) = value_and_gradient(options, flat, teacher)
    options["standardize"] = convention
    _, (standardized, *_) = value_and_gradient(options, flat, teacher)
    assert 0.2 * plain.norm() < standardized.norm() < 5 * plain.norm()


@pytest.mark.parametrize("convention", ["unbiased", "biased"])
@pytest.mark.parametrize("deviation", [0.011, 0.05, 0.3, 3.0, 40.0])
def test_rows_of_normal_spread_are_standardized_as_published(
    convention: Any, deviation: float
) -> None:
    logits = spread(deviation, torch.Generator().manual_seed(1)).float()
    ours, published = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    std = published.std(-1, correction=int(convention == "unbiased"), keepdim=True)
    expected = (published - published.mean(-1, keepdim=True)) / (std + 1e-7)
    z = standardize(ours, convention)
    weights = torch.randn(B, 10, generator=torch.Generator().manual_seed(2))
    for scores in (z, expected):
        (scores.softmax(-1) * weights).sum().backward()
    assert torch.equal(z, expected)
    assert torch.equal(ours.grad, published.grad)  # type: ignore[arg-type]


def test_standardization_has_no_jump_on_the_way_to_a_constant_row() -> None:
    direction = spread(1, torch.Generator().manual_seed(1))
    steps = torch.linspace(0, 0.02, 2001, dtype=torch.float64)
    z = torch.stack([standardize(3 + step * direction) for step in steps])
    assert (z[1:] - z[:-1]).abs().max() < 0.01 * direction.abs().max()
    assert z[0].abs().max() < 1e-10
    torch.testing.assert_close(z[-1], direction, rtol=1e-4, atol=0)


def test_the_rounding_of_a_constant_teacher_is_no_target() -> None:
    step = torch.nextafter(torch.tensor(7.0), torch.tensor(8.0))
    teacher = torch.full((1, 10), 7.0)
    teacher[0, 3] = step
    assert standardize(teacher).softmax(-1).sub(0.1).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_constant_row_in_half_precision_has_a_gradient_in_it(dtype: torch.dtype) -> None:
    teacher = spread(3, torch.Generator().manual_seed(0)).float()
    student = torch.zeros(B, 10, dtype=dtype, requires_grad=True)
    loss = 2.0**10 * kd(student, teacher, temperature=2, standardize="unbiased")
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    towards = -student.grad.float()
    assert (towards.argmax(-1) == teacher.argmax(-1)).all()
