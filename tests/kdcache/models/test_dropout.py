"""Fixed dropout masks: one thinned network per seed, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdcache.models.dropout import FixedDropout, fix_dropout
from kdcache.models.zoo import build_model
from kdcache_stores.errors import UsageError


def net(p: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Dropout2d(p), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 36, 64), nn.Dropout(p), nn.Linear(64, 5)).eval()


def images(n: int) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch() -> None:
    sample = fix_dropout(net().double(), seed=3)
    x = images(9).double()
    rows = torch.cat([sample(x[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(sample(x), rows)
    torch.testing.assert_close(sample(x.flip(0)).flip(0), rows)


@torch.no_grad()
def test_samples_differ_by_seed_alone() -> None:
    x, base = images(4), net()
    same = [fix_dropout(base, seed=1)(x) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], fix_dropout(base, seed=2)(x))
    assert not torch.equal(same[0], base(x))


@torch.no_grad()
def test_masks_do_not_depend_on_the_order_of_use_or_on_torch_seed() -> None:
    a, b = (FixedDropout(0.5, False, "k") for _ in range(2))
    small, large = torch.ones(1, 6), torch.ones(1, 4, 4)
    first = a(small), a(large)
    torch.manual_seed(99)
    second = b(large), b(small)
    assert torch.equal(first[0], second[1])
    assert torch.equal(first[1], second[0])


def test_mask_is_scaled_and_drops_at_rate_p() -> None:
    kept = FixedDropout(0.3, False, "k")(torch.ones(1, 100_000))
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7])
    # 5 standard deviations of a binomial share.
    assert float((kept == 0).float().mean()) == pytest.approx(0.3, abs=5 * (0.21 / 1e5) ** 0.5)


def test_dropout2d_drops_whole_channels() -> None:
    out = FixedDropout(0.5, True, "k")(torch.ones(2, 64, 5, 5))
    assert torch.equal(out, out[:1, :, :1, :1].expand_as(out))
    assert 0 < int((out[0, :, 0, 0] == 0).sum()) < 64


@torch.no_grad()
def test_the_mean_over_samples_approaches_the_network_where_it_is_linear() -> None:
    linear = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 2)).eval()
    x = torch.randn(1, 4)
    mean = torch.stack([fix_dropout(linear, s)(x) for s in range(400)]).mean(0)
    torch.testing.assert_close(mean, linear(x), atol=0.15, rtol=0)


def test_weights_are_shared_and_the_module_is_left_alone() -> None:
    base = net()
    sample = fix_dropout(base, seed=0)
    assert all(a is b for a, b in zip(base.parameters(), sample.parameters(), strict=True))
    assert not any(isinstance(m, FixedDropout) for m in base.modules())
    assert sum(isinstance(m, FixedDropout) for m in sample.modules()) == 2


def test_reduced_precision_is_kept() -> None:
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    assert FixedDropout(0.5, False, "k")(x).dtype == torch.bfloat16


@pytest.mark.parametrize("module", [net(p=0.0), build_model("wrn_16_1", 10), nn.Linear(2, 2)])
def test_without_active_dropout_it_is_refused(module: nn.Module) -> None:
    with pytest.raises(UsageError, match="no dropout layer with p > 0"):
        fix_dropout(module, seed=0)


def test_a_wide_resnet_of_the_zoo_has_dropout_to_fix() -> None:
    sample = fix_dropout(build_model("wrn_16_2_dropout", 10), seed=0)
    assert sum(isinstance(m, FixedDropout) for m in sample.modules()) == 6
