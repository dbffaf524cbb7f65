"""The whole loss of a step."""

from __future__ import annotations

import pytest
import torch

from kdcache.objectives import Noise, Objective, ObjectiveConfig, Step, ce, kd
from kdcache_stores.errors import DataError, UsageError

B, K = 8, 10


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v, z = 3 * torch.randn(2, B, K, generator=generator)
    return v, z, torch.randint(K, (B,), generator=generator)


def a_step(**options: int) -> Step:
    return Step(keys=torch.arange(B) << 33, views=torch.zeros(B, dtype=torch.int64), **options)


def test_kd_by_default_is_the_published_one() -> None:
    v, z, y = batch()
    loss, parts = Objective(method="kd")(v, [z], y)
    torch.testing.assert_close(loss, 0.1 * ce(v, y) + 0.9 * kd(v, z, temperature=4.0))
    torch.testing.assert_close(parts["ce"], ce(v, y))
    torch.testing.assert_close(parts["kd"], kd(v, z))
    torch.testing.assert_close(parts["ce_weighted"] + parts["kd_weighted"], loss)
    torch.testing.assert_close(parts["kd_share"], parts["kd_weighted"] / loss)
    loss, _ = Objective(method="kd", standardize="unbiased")(v, [z], y)
    standardized = kd(v, z, temperature=2.0, standardize="unbiased")
    torch.testing.assert_close(loss, 0.1 * ce(v, y) + 9 * standardized)


def test_ce_needs_no_teacher() -> None:
    v, _, y = batch()
    loss, parts = Objective(method="ce")(v, [], y)
    torch.testing.assert_close(loss, ce(v, y))
    assert set(parts) == {"ce", "ce_weighted"}


def test_parts_are_detached_scalars() -> None:
    v, z, y = batch()
    _, parts = Objective()(v.requires_grad_(), [z], y)
    assert all(part.ndim == 0 and not part.requires_grad for part in parts.values())


def test_copies_average_the_loss() -> None:
    v, z, y = batch()
    noise = Noise(scale=0.7, copies=3)
    _, parts = Objective(noise=noise)(v, [z], y, a_step())
    single = [kd(v, noise(z, a_step(), copy=copy)) for copy in range(3)]
    torch.testing.assert_close(parts["kd"], torch.stack(single).mean())


def test_configuration_goes_through_plain_values() -> None:
    config = ObjectiveConfig(noise=Noise.parse("laplace:0.2,relative"), weights=(1, 3), alpha=0.3)
    assert ObjectiveConfig.from_dict(config.to_dict()) == config
    resolved = Objective(config).config
    assert (resolved.ce_weight, resolved.kd_weight, resolved.temperature) == (0.3, 0.7, 4.0)
    assert ObjectiveConfig.from_dict(resolved.to_dict()) == resolved == resolved.resolved()


def test_what_does_not_fit_is_refused() -> None:
    v, z, y = batch()
    with pytest.raises(UsageError, match="at least one teacher"):
        Objective()(v, [], y)
    with pytest.raises(DataError, match="teacher 1"):
        Objective()(v, [z, z[:, 1:]], y)
    y[0] = -1
    with pytest.raises(DataError, match="1 of 8 unlabelled"):
        Objective(method="ce")(v, [], y)
    Objective()(v, [z], y)
