"""CAT-KD against its formula in float64 NumPy, and what may be exchanged in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.fields.maps import averaged
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.cat_kd import CATKD, activation_maps, cat_kd, without_bias
from kdcache.methods.nets import Nets
from kdcache.methods.objective import Objective
from kdcache.models.network import Network
from kdcache.models.taps import tapped
from kdcache.models.zoo import build_model
from kdcache_stores.errors import DataError, UsageError


def array(seed: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


def pooled(m: np.ndarray, r: int) -> np.ndarray:
    k = m.shape[2] // r
    return m.reshape(*m.shape[:2], r, k, r, k).mean((3, 5))


def formula(s: np.ndarray, t: np.ndarray, r: int, normalise: bool) -> float:
    s, t = pooled(s, r), pooled(t, r)
    if normalise:
        s, t = (m / np.sqrt((m**2).sum((2, 3), keepdims=True)) for m in (s, t))
    return float(((s - t) ** 2).mean())


@pytest.mark.parametrize("normalise", ["none", "l2"])
@pytest.mark.parametrize("size", [2, 4])
def test_cat_kd_is_its_formula(size: int, normalise: str) -> None:
    s, t = array(0, 3, 5, 8, 8), array(1, 3, 5, 4, 4)
    loss = cat_kd(s, t, size=size, normalise=normalise)
    expected = formula(s.numpy(), t.numpy(), size, normalise == "l2")
    assert loss.mean().item() == pytest.approx(expected)


@pytest.mark.parametrize("normalise", ["none", "l2"])
def test_gradients_by_finite_differences(normalise: str) -> None:
    s, t = array(0, 2, 3, 4, 4).requires_grad_(), array(1, 2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda s: cat_kd(s, t, normalise=normalise), (s,))


def test_averaging_and_the_head_commute() -> None:
    """So the last map averaged to r x r, and the head once, give the activation maps at r x r."""
    last, weight = array(0, 2, 6, 8, 8), array(1, 4, 6)
    whole = averaged(activation_maps(last, weight), 2)
    torch.testing.assert_close(activation_maps(averaged(last, 2), weight), whole)
    torch.testing.assert_close(  # and their mean is what the head makes of the pooled vector
        activation_maps(last, weight).mean((2, 3)), last.mean((2, 3)) @ weight.mT
    )


@torch.no_grad()
def test_a_student_s_logits_are_the_means_of_its_activation_maps() -> None:
    torch.manual_seed(0)
    network = build_model("resnet8", 5, 3, 16)
    assert without_bias(network, Nets({}, {}), {}) is network
    outputs = tapped(network.eval(), ("cam",))(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(outputs["cam"].mean((2, 3)), outputs["logits"], rtol=1e-4, atol=1e-6)
    assert isinstance(network, Network)
    assert network.head.bias is not None
    assert not network.head.bias.requires_grad


def test_objective_makes_the_teacher_s_maps_of_its_last_one_and_its_head() -> None:
    last, weight, bias, cam = (
        array(0, 3, 6, 4, 4),
        array(1, 5, 6),
        array(2, 5),
        array(3, 3, 5, 8, 8),
    )
    config = ObjectiveConfig(method="cat-kd").resolved()
    shapes = {"logits": (5,), "cam": (5, 8, 8)}, {"last": (6, 8, 8), "last_4": (6, 4, 4)}
    read = CATKD.reads(config, *shapes)
    assert read == ("last_4",)
    nets = Nets(shapes[0], {"last_4": (6, 4, 4)}, (weight, bias))
    student = {"logits": array(4, 3, 5), "cam": cam}
    _, parts = Objective(config, nets)(student, [{"last_4": last}], torch.arange(3))
    teacher = np.einsum("kd,bdhw->bkhw", weight.numpy(), last.numpy())
    assert parts["kd"].item() == pytest.approx(formula(cam.numpy(), teacher, 2, False))
    assert parts["kd_weighted"].item() == pytest.approx(15 * parts["kd"].item())


def test_what_does_not_fit_is_refused() -> None:
    config = ObjectiveConfig(method="cat-kd").resolved()
    with pytest.raises(DataError, match="the same classes"):
        cat_kd(array(0, 3, 5, 4, 4), array(1, 3, 6, 4, 4))
    with pytest.raises(UsageError, match="its store keeps none"):
        Objective(config, Nets({"logits": (5,), "cam": (5, 8, 8)}, {"last_4": (6, 4, 4)}))
    with pytest.raises(UsageError, match="give a smaller --cat-kd-size"):
        CATKD.reads(config, {"logits": (5,), "cam": (5, 1, 1)}, {"last": (6, 8, 8)})
    with pytest.raises(UsageError, match=r"cat-kd needs .* last@2"):
        CATKD.reads(config, {"logits": (5,), "cam": (5, 8, 8)}, {"pooled": (6,)})
