"""CTKD: the learned temperature and its reversed gradient."""

from __future__ import annotations

import math

import pytest
import torch
from fields import on_logits

from kdcache.methods.logits.ce import ce
from kdcache.methods.logits.ctkd import ctkd, learned_temperature, reversal
from kdcache.methods.logits.kd import kd
from kdcache.methods.objective import Objective
from kdcache.methods.step import Step
from kdcache_stores.errors import UsageError

B, K = 8, 10
GENERATOR = torch.Generator().manual_seed(0)
V, Z = 3 * torch.randn(2, B, K, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(K, (B,), generator=GENERATOR)


def test_published_start_and_ramp() -> None:
    assert learned_temperature(torch.tensor(1.0)).item() == pytest.approx(15.62, abs=0.005)
    assert reversal(9) == -1 == reversal(200) == reversal(0, ramp=0)
    assert reversal(0) == pytest.approx(-(1 - math.cos(math.pi / 10)) / 2)
    assert reversal(4) == pytest.approx(-0.5)
    assert [reversal(e) for e in range(10)] == sorted(
        (reversal(e) for e in range(10)), reverse=True
    )
    theta = torch.tensor(0.3)
    values = {learned_temperature(theta, strength=s).item() for s in (-1.0, -0.3, 1.0)}
    assert len(values) == 1


@pytest.mark.parametrize("options", [{}, {"standardize": "unbiased"}, {"reverse": True}])
def test_gradient_of_theta_is_the_finite_difference_times_the_strength(options: dict) -> None:
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    student = V.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, theta: ctkd(v, Z, theta, strength=1.0, **options), (student, theta)
    )
    plain = torch.autograd.grad(ctkd(V, Z, theta, strength=1.0, **options), theta)[0]
    for strength in (-1.0, -0.25, 0.0):
        gradient = torch.autograd.grad(ctkd(V, Z, theta, strength=strength, **options), theta)[0]
        torch.testing.assert_close(gradient, strength * plain)


def test_objective_is_kd_at_the_learned_temperature() -> None:
    objective = Objective(method="ctkd")
    assert [name for name, _ in objective.named_parameters()] == ["loss.theta"]
    loss, parts = on_logits(objective, V, [Z], Y, Step(epoch=3))
    temperature = 1 + 20 * torch.sigmoid(torch.tensor(1.0)).item()
    torch.testing.assert_close(loss, 0.1 * ce(V, Y) + 0.9 * kd(V, Z, temperature=temperature))
    assert parts["temperature"].item() == pytest.approx(temperature)
    assert not parts["temperature"].requires_grad
    standardized = Objective(method="ctkd", standardize="unbiased")
    assert standardized.config.options["start"] == 2
    assert standardized.config.kd_weight == 9
    assert not list(Objective(method="kd").parameters())


def test_objective_ramps_the_reversal_by_epoch() -> None:
    objective = Objective(method="ctkd", options={"ramp": 4})
    gradients = []
    for epoch in (0, 1, 3, 30):
        loss, _ = on_logits(objective, V, [Z], Y, Step(epoch=epoch, epochs=100))
        gradients.append(torch.autograd.grad(loss, [*objective.parameters()])[0])
    expected = torch.tensor([reversal(0, 4), reversal(1, 4), -1.0, -1.0])
    torch.testing.assert_close(torch.stack(gradients) / -gradients[-1], expected)


def test_descent_raises_the_loss_in_theta() -> None:
    objective = Objective(method="ctkd", alpha=0)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss, _ = on_logits(objective, V, [Z], Y, Step(epoch=20))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]


def test_certain_teachers_do_not_spoil_the_temperature() -> None:
    # The gradient through a target that underflowed to 0 is where F.kl_div without logs gives NaN.
    certain = torch.full((B, K), -1000.0)
    certain[:, 0] = 1000
    objective = Objective(method="ctkd", options={"start": 1, "end": 0.1})
    loss, _ = on_logits(objective, V.float(), [certain], Y, Step(epoch=20))
    loss.backward()
    (theta,) = objective.parameters()
    assert theta.grad is not None
    assert theta.grad.isfinite()


def test_no_fixed_temperature() -> None:
    with pytest.raises(UsageError, match="temperature is an option of kd, dkd"):
        Objective(method="ctkd", temperature=4)
