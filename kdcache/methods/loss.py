"""The loss of a method: a module from the fields of student and teacher to named terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.logits.ce import Mix
from kdcache.methods.scaling import SoftmaxTarget
from kdcache.methods.step import Step

Fields = Mapping[str, Tensor]
TargetFields = Mapping[str, Tensor | SoftmaxTarget]
Terms = dict[str, Tensor]


class Loss(nn.Module):
    """The distillation term of a method; cross-entropy, weights, noise and ensembles are not its own.

    Its parameters, if it has any, are trained with the student's.

    Args:
        config: of the method, every default filled in.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config

    def shared(self, student: Fields, step: Step) -> dict[str, Any]:
        """What one step computes once for all its targets; `forward` takes it as keywords."""
        return {}

    def forward(
        self,
        student: Fields,
        target: TargetFields,
        labels: Tensor,
        step: Step,
        mix: Mix | None,
        **shared: Any,
    ) -> Terms:
        """The terms against one target.

        Args:
            student: the method's fields, float32: logits (B, K), or (B, 2, K) for pairs.
            target: of one teacher, or of several combined (logits alone); float32, no gradient.
            labels: (B,) int64, -1 for unlabelled.
            step: where in the training this is.
            mix: partner labels and lam of mixup or cutmix.
            shared: what `shared` gave.

        Returns:
            "kd", the distillation term, (B,) or, if the method compares whole batches, 0-d; and
            what else is worth a line in the metrics, likewise.
        """
        raise NotImplementedError
