"""Methods that are added to one another: a weighted sum of records."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fields import on_logits
from torch import Tensor

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.rkd import rkd
from kdcache.methods.logits.ban import ban
from kdcache.methods.logits.ce import ce
from kdcache.methods.logits.dist import dist
from kdcache.methods.logits.dkd import dkd
from kdcache.methods.logits.kd import hard_kd, kd
from kdcache.methods.objective import Objective
from kdcache.methods.step import Step
from kdcache_stores.errors import UnknownName, UsageError

Y = torch.arange(5) % 4


def rows(seed: int, width: int = 4) -> Tensor:
    return torch.tensor(3 * np.random.default_rng(seed).standard_normal((5, width)))


def test_rkd_and_standardized_kd() -> None:
    """--method rkd --add kd --standardize."""
    v, z, s, t = rows(0), rows(1), rows(2, 6), rows(3, 8)
    objective = Objective(method="rkd", add=("kd",), standardize="unbiased")
    assert objective.teacher_fields == ("pooled", "logits")
    loss, parts = objective({"logits": v, "pooled": s}, [{"logits": z, "pooled": t}], Y)
    term = kd(v, z, temperature=2, standardize="unbiased")
    torch.testing.assert_close(parts["kd"], rkd(s, t))
    torch.testing.assert_close(parts["kd_kd"], term)
    torch.testing.assert_close(loss, ce(v, Y) + rkd(s, t) + 9 * term)
    torch.testing.assert_close(parts["kd_share"], (rkd(s, t) + 9 * term) / loss)


def test_weights_and_options_of_each() -> None:
    v, z = rows(0), rows(1)
    config = ObjectiveConfig.from_flags(
        {"method": "kd", "add": ("dkd:0.5", "dist"), "dkd_beta": 3, "dist_gamma": 1, "alpha": 0.2,
         "temperature": 3}
    )  # fmt: skip
    step = Step(epoch=100)
    loss, parts = on_logits(Objective(config), v, [z], Y, step)
    expected = (
        0.2 * ce(v, Y) + 0.8 * kd(v, z, temperature=3) + 0.5 * dkd(v, z, Y, beta=3, temperature=3)
        + dist(v, z, gamma=1, temperature=3)
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    assert {"dkd_kd", "dkd_kd_weighted", "dkd_tckd", "dist_kd_weighted"} < parts.keys()


def test_the_configuration_goes_through_plain_values() -> None:
    config = ObjectiveConfig.from_flags({"method": "rkd", "add": ("kd", "dkd:2"), "dkd_beta": 2})
    assert ObjectiveConfig.from_dict(config.to_dict()) == config
    resolved = config.resolved()
    assert resolved.add == ("kd:0.9", "dkd:2")
    assert ObjectiveConfig.from_dict(resolved.to_dict()) == resolved == resolved.resolved()
    assert resolved.options["dkd_warmup"] == 20
    assert Objective(config).state_dict().keys() == set()
    assert set(Objective(method="kd", add=("ctkd",)).state_dict()) == {"added.ctkd.theta"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add": ("ce",)}, "ce has no term to add"),
        ({"add": ("kd",)}, "kd is there twice"),
        ({"add": ("dkd:x",)}, "NAME or NAME:WEIGHT"),
        ({"add": ("dkd:-1",)}, "NAME or NAME:WEIGHT"),
        ({"add": ("mlkd",)}, "mlkd reads pairs of views"),
        ({"add": ("dkd",), "options": {"gamma": 1}}, "gamma is an option of dist"),
        ({"method": "rkd", "add": ("dist",), "standardize": "unbiased"}, "no standardized form"),
        ({"method": "rkd", "temperature": 3.0}, "temperature is an option of"),
    ],
)
def test_what_makes_no_sum_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ObjectiveConfig(**({"method": "kd"} | changes))  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="did you mean 'dkd'"):
        ObjectiveConfig(add=("dkdd",))


# -- hard labels and born-again networks: kinds of kd ------------------------------------------------
def test_hard_labels_are_the_teacher_s_largest_class() -> None:
    v, z = rows(0), rows(1)
    loss, parts = on_logits(Objective(method="kd", options={"target": "hard"}), v, [z], Y)
    largest = torch.tensor(z.numpy().argmax(1))
    torch.testing.assert_close(loss, 0.5 * ce(v, Y) + 0.5 * ce(v, largest))
    torch.testing.assert_close(parts["kd"], hard_kd(v, z).mean())
    assert torch.autograd.gradcheck(lambda v: hard_kd(v, z), (v.requires_grad_(),))
    two = [z, rows(2)]
    mean = torch.tensor((two[0].numpy() + two[1].numpy()).argmax(1))
    _, parts = on_logits(Objective(method="kd", options={"target": "hard"}), v, two, Y)
    torch.testing.assert_close(parts["kd"], ce(v, mean).detach())


@pytest.mark.parametrize(
    "changes", [{"temperature": 4.0}, {"standardize": "unbiased"}, {"reverse": True},
                {"ablation": "target-removed"}]
)  # fmt: skip
def test_hard_labels_have_neither_temperature_nor_form(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="knows no temperature"):
        Objective(method="kd", options={"target": "hard"}, **changes)


def test_born_again_networks_learn_from_both_in_equal_parts() -> None:
    v, z = rows(0), rows(1)
    loss, _ = on_logits(Objective(method="ban"), v, [z], Y)
    p = np.exp(z.numpy()) / np.exp(z.numpy()).sum(1, keepdims=True)
    logs = v.numpy() - np.log(np.exp(v.numpy()).sum(1, keepdims=True))
    divergence = (p * (np.log(p) - logs)).sum(1).mean()
    assert loss.item() == pytest.approx(divergence + ce(v, Y).item())
    assert ban(v, z).item() == pytest.approx(divergence)
