"""An objective on logits alone, which most tests are about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kdcache.methods.objective import Objective


def on_logits(
    objective: Objective, student: Tensor, teachers: Sequence[Tensor], *args: Any, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts; what follows is as of `Objective.forward`."""
    outputs = [{"logits": teacher} for teacher in teachers]
    loss, parts = objective({"logits": student}, outputs, *args, **options)
    return loss, parts
