"""An objective on logits alone, which most tests are about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kdcache.methods.objective import Objective
from kdcache.methods.table import METHODS

#: The methods that need nothing but logits.
ON_LOGITS = [
    name for name, m in METHODS.items() if m.teacher_fields == ("logits",) or m.loss is None
]


def on_logits(
    objective: Objective, student: Tensor, teachers: Sequence[Tensor], *args: Any, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts; what follows is as of `Objective.forward`."""
    outputs = [{"logits": teacher} for teacher in teachers]
    loss, parts = objective({"logits": student}, outputs, *args, **options)
    return loss, parts
