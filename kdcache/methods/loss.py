"""The loss of a method: a module from the fields of student and teacher to named terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.logits.ce import Mix
from kdcache.methods.nets import Nets, Shapes
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

    remembers: ClassVar[bool] = False
    """Whether it keeps something of each sample from one step to a later one."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def reads(cls, config: ObjectiveConfig, student: Shapes, held: Shapes) -> tuple[str, ...]:
        """Stored names of the fields that are read of each teacher; by default those of the record.

        Args:
            config: of the method.
            student: the student's fields, see `Method.student_fields`.
            held: the fields that there are of a teacher.

        Raises:
            UsageError: none of them serves this student.
        """
        return config.record.teacher_fields

    def build(self, nets: Nets) -> None:
        """Make the parts whose shapes follow from the networks; called once, before the first step."""

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
            target: of one teacher, or of several combined (logits alone); float32, no gradient. Empty
                where the method has no teacher.
            labels: (B,) int64, -1 for unlabelled.
            step: where in the training this is.
            mix: partner labels and lam of mixup or cutmix.
            shared: what `shared` gave.

        Returns:
            "kd", the distillation term, (B,) or, if the method compares whole batches, 0-d; and
            what else is worth a line in the metrics, likewise.
        """
        raise NotImplementedError
