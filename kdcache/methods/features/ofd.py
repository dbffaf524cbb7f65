"""OFD: the teacher's stages before their ReLU, with a margin below which nothing is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.fields.maps import averaged
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.features.target_fields import field_of, stages_of
from kdcache.methods.logits.ce import Mix
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.nets import Nets, Shapes
from kdcache.methods.step import Step
from kdcache_stores.errors import UsageError


def margins(scale: Tensor, shift: Tensor) -> Tensor:
    """The expected value of a channel where it is negative, if it is normal with the batch norm's numbers.

    m - s phi(m/s) / Phi(-m/s), and -3 s where hardly anything is negative (Phi(-m/s) up to .001).

    >>> f"{margins(torch.ones(1), torch.zeros(1)).item():.4f}"
    '-0.7979'

    Args:
        scale: (C,) s, the weight of the batch norm before the ReLU; its sign has no part.
        shift: (C,) m, its bias.

    Returns:
        (C,) of the dtype of scale.

    Source: Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019, eq. 2.
    """
    s, m = scale.double().abs(), shift.double()
    normal = torch.distributions.Normal(0.0, 1.0)
    share = normal.cdf(-m / s)
    density = normal.log_prob(m / s).exp()
    usual = m - s * density / share.clamp(min=1e-3)
    return torch.where(share > 1e-3, usual, -3 * s).to(scale.dtype)


def ofd(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Partial squared error of two maps, per sample: the sum over channels and places.

    The target is the teacher's value, but no less than the margin; where it is not positive, a student
    that lies below it is left alone.

    Args:
        student: (B, C, H, W), before a ReLU, by the connector.
        teacher: (B, C, H, W), before its ReLU.
        margin: (C,), negative.

    Returns:
        (B,).
    """
    target = torch.maximum(teacher, margin[:, None, None])
    counted = (student > target) | (target > 0)
    return ((student - target).square() * counted).sum((1, 2, 3))


class OFD(Loss):
    """`ofd` of the stages that both networks have, counted from the last, each half of the next.

    Its connectors, a 1x1 convolution with batch norm for each stage, are trained with the student. The
    margins follow from the teacher's batch norms, which no store keeps: the teacher runs in the loop. The
    published figures are of one whose batch norms use each batch (`statistics` "batch").
    """

    @classmethod
    def reads(cls, config: ObjectiveConfig, student: Shapes, held: Shapes) -> tuple[str, ...]:
        """The last stages before their ReLU, as many as the student has."""
        its, count = stages_of(held, "_pre"), len(stages_of(student, "_pre"))
        if not its:
            raise UsageError(
                "ofd reads every stage of the teacher before its ReLU: run it in the loop"
            )
        return tuple(f"{name}_pre" for name in its[-count:])

    def build(self, nets: Nets) -> None:
        """A connector and margins for each pair."""
        own, its = stages_of(nets.student, "_pre"), stages_of(nets.teacher, "_pre")
        count = min(len(own), len(its))
        self.pairs = [
            (f"{a}_pre", f"{b}_pre") for a, b in zip(own[-count:], its[-count:], strict=True)
        ]
        if any(name not in nets.norms for _, name in self.pairs):
            raise UsageError(
                "ofd needs the batch norms of its teacher, which a store does not keep: run it in the loop "
                "(--online TEACHER), a network of the zoo whose stages end with a batch norm and a ReLU"
            )
        self.connectors = nn.ModuleList()
        for a, b in self.pairs:
            inputs, outputs = nets.student[a][0], nets.teacher[b][0]
            conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            nn.init.normal_(conv.weight, std=(2 / outputs) ** 0.5)
            self.connectors.append(nn.Sequential(conv, nn.BatchNorm2d(outputs)))
            self.register_buffer(f"margin_{b}", margins(*nets.norms[b]), persistent=False)

    def forward(
        self,
        student: Fields,
        target: TargetFields,
        labels: Tensor,
        step: Step,
        mix: Mix | None,
        **shared: Any,
    ) -> Terms:
        """The term "kd", (B,)."""
        terms: Sequence[Tensor] = [
            ofd(own, averaged(field_of(target, b), *own.shape[2:]), self.get_buffer(f"margin_{b}"))
            for (a, b), connect in zip(self.pairs, self.connectors, strict=True)
            for own in [connect(student[a])]
        ]
        weights = [0.5 ** (len(terms) - i - 1) for i in range(len(terms))]
        return {"kd": torch.stack([w * t for w, t in zip(weights, terms, strict=True)]).sum(0)}
