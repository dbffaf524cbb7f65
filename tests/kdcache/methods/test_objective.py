"""The whole loss of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fields import on_logits

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.logits.ce import ce
from kdcache.methods.logits.kd import kd
from kdcache.methods.noise import Noise
from kdcache.methods.objective import Objective
from kdcache.methods.step import Step
from kdcache.methods.table import METHODS
from kdcache_stores.errors import DataError, UnknownName, UsageError

B, K = 8, 10


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v, z = 3 * torch.randn(2, B, K, generator=generator)
    return v, z, torch.randint(K, (B,), generator=generator)


def a_step(**options: int) -> Step:
    return Step(keys=torch.arange(B) << 33, views=torch.zeros(B, dtype=torch.int64), **options)


def test_kd_by_default_is_the_published_one() -> None:
    v, z, y = batch()
    loss, parts = on_logits(Objective(method="kd"), v, [z], y)
    torch.testing.assert_close(loss, 0.1 * ce(v, y) + 0.9 * kd(v, z, temperature=4.0))
    torch.testing.assert_close(parts["ce"], ce(v, y))
    torch.testing.assert_close(parts["kd"], kd(v, z))
    torch.testing.assert_close(parts["ce_weighted"] + parts["kd_weighted"], loss)
    torch.testing.assert_close(parts["kd_share"], parts["kd_weighted"] / loss)
    loss, _ = on_logits(Objective(method="kd", standardize="unbiased"), v, [z], y)
    standardized = kd(v, z, temperature=2.0, standardize="unbiased")
    torch.testing.assert_close(loss, 0.1 * ce(v, y) + 9 * standardized)


def test_ce_needs_no_teacher() -> None:
    v, _, y = batch()
    loss, parts = on_logits(Objective(method="ce"), v, [], y)
    torch.testing.assert_close(loss, ce(v, y))
    assert set(parts) == {"ce", "ce_weighted"}


def test_parts_are_detached_scalars() -> None:
    v, z, y = batch()
    _, parts = on_logits(Objective(), v.requires_grad_(), [z], y)
    assert all(part.ndim == 0 and not part.requires_grad for part in parts.values())


def test_copies_average_the_loss() -> None:
    v, z, y = batch()
    noise = Noise(scale=0.7, copies=3)
    _, parts = on_logits(Objective(noise=noise), v, [z], y, a_step())
    single = [kd(v, noise(z, a_step(), copy=copy)) for copy in range(3)]
    torch.testing.assert_close(parts["kd"], torch.stack(single).mean())


def test_configuration_goes_through_plain_values() -> None:
    config = ObjectiveConfig(noise=Noise.parse("laplace:0.2,relative"), weights=(1, 3), alpha=0.3)
    assert ObjectiveConfig.from_dict(config.to_dict()) == config
    resolved = Objective(config).config
    assert (resolved.ce_weight, resolved.kd_weight, resolved.temperature) == (0.3, 0.7, 4.0)
    assert ObjectiveConfig.from_dict(resolved.to_dict()) == resolved == resolved.resolved()


def test_plain_values_hold_only_what_the_method_reads() -> None:
    values = Objective(method="kd", alpha=0.5).config.to_dict()
    assert values == {
        "method": "kd",
        "ce_weight": 0.5,
        "kd_weight": 0.5,
        "temperature": 4.0,
        "standardize": False,
        "combine": "mean-logits",
        "ablation": "full",
        "reverse": False,
        "label_smoothing": 0.0,
        "options": {"target": "soft"},
    }
    for method in METHODS:
        config = Objective(method=method).config
        assert ObjectiveConfig.from_dict(config.to_dict()) == config
    assert Objective(method="ctkd").config.to_dict()["options"] == {
        "start": 1,
        "end": 20,
        "ramp": 10,
    }
    with pytest.raises(UnknownName, match="did you mean 'kd_weight'"):
        ObjectiveConfig.from_dict({"kd_wieght": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "kdd"}, "unknown method"),
        ({"standardize": True}, "'unbiased' or 'biased'"),
        ({"ce_weight": -1}, "ce_weight of at least 0"),
        ({"kd_weight": float("nan")}, "kd_weight of at least 0"),
        ({"temperature": 0}, "temperature above 0"),
        ({"alpha": 1.5}, "alpha from 0 to 1"),
        ({"alpha": 0.5, "ce_weight": 1}, "shorthand"),
        ({"options": {"warmup": 6}}, "warmup is an option of dkd and reviewkd, found method kd"),
        ({"method": "dkd", "options": {"ramp": 5}}, "ramp is an option of ctkd, found method dkd"),
        ({"method": "dkd", "options": {"bta": 5}}, "option of dkd 'bta'; did you mean 'beta'"),
        ({"method": "dkd", "options": {"beta": -1}}, "dkd_beta of at least 0"),
        ({"method": "dkd", "options": {"beta": "8"}}, "a finite number as dkd_beta"),
        ({"method": "dkd", "options": {"beta": True}}, "a finite number as dkd_beta"),
        ({"method": "dkd", "options": {"warmup": 1.5}}, "a whole number as dkd_warmup"),
        ({"method": "ctkd", "options": {"end": 0}}, "ctkd_end above 0"),
        ({"method": "mlkd", "options": {"variant": "ascoded"}}, "did you mean 'as-coded'"),
        ({"method": "ce", "temperature": 4}, "leave out temperature"),
        ({"method": "ce", "noise": Noise()}, "leave out noise"),
        (
            {"method": "mlkd", "reverse": True},
            "reverse is an option of kd and ctkd, found method mlkd",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ObjectiveConfig(**options)


def test_share_of_nothing_is_nothing() -> None:
    v, _, y = batch()
    loss, parts = on_logits(Objective(), v, [v], torch.full_like(y, -1))
    assert loss == parts["kd_share"] == 0
    _, parts = on_logits(Objective(), v, [v * float("nan")], y)
    assert parts["kd_share"].isnan()


def test_teachers_are_taught_nothing() -> None:
    v, z, y = batch()
    loss, _ = on_logits(Objective(), v.requires_grad_(), [z.requires_grad_()], y)
    loss.backward()
    assert v.grad is not None
    assert z.grad is None


def test_born_again_networks_are_a_setting_of_kd() -> None:
    # CE with the labels and CE with the last generation's probabilities, T = 1, equal weights: the
    # entropy of the target is all that KL and CE differ by.
    v, z, y = batch()
    loss, _ = on_logits(Objective(temperature=1, ce_weight=1, kd_weight=1), v, [z], y)
    p = z.softmax(-1)
    soft = -(p * v.log_softmax(-1)).sum(-1).mean()
    entropy = -(p * z.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss, ce(v, y) + soft - entropy)


def test_what_does_not_fit_is_refused() -> None:
    v, z, y = batch()
    with pytest.raises(UsageError, match="at least one teacher"):
        on_logits(Objective(), v, [], y)
    with pytest.raises(DataError, match="teacher 1"):
        on_logits(Objective(), v, [z, z[:, 1:]], y)
    with pytest.raises(DataError, match="at least 2 classes"):
        on_logits(Objective(), v[:, :1], [z[:, :1]], torch.zeros_like(y))
    with pytest.raises(UsageError, match="found both"):
        Objective(ObjectiveConfig(), method="kd")
    y[0] = -1
    with pytest.raises(DataError, match="1 of 8 unlabelled"):
        on_logits(Objective(method="ce"), v, [], y)
    on_logits(Objective(), v, [z], y)
