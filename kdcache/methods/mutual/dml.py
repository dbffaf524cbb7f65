"""DML: students that are trained side by side, each from the labels and from what the others say."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdcache.methods.features.target_fields import field_of
from kdcache.methods.logits.ce import Mix
from kdcache.methods.logits.kd import kd
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.scaling import Reduction
from kdcache.methods.step import Step


def dml(student: Tensor, peer: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """KL(softmax(peer) ‖ softmax(student)), at temperature 1; of several peers the mean is taken.

    Args:
        student: (B, K) logits, any floating dtype.
        peer: (B, K) logits of another student, without a gradient.
        reduction: "mean", or "none" for one value per sample.

    Returns:
        A 0-d tensor, or (B,) with reduction "none", in nats.

    Source: Zhang et al., Deep Mutual Learning, CVPR 2018, eq. 3, 5 and 7.
    """
    return kd(student, peer, temperature=1.0, reduction=reduction)


class DML(Loss):
    """`dml`; its targets are the logits of the other students."""

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
        return {"kd": dml(student["logits"], field_of(target, "logits"), reduction="none")}
