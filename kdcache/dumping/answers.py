"""Are a teacher's answers logits, and each image's own? Asked before anything is dumped.

Probabilities, a teacher in train mode and one that draws random numbers all train students without
an error, and badly.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kdcache.teachers import Teacher
from kdcache_stores.errors import DataError, MismatchError
from kdcache_stores.importing import PROBABILITIES, kind_of_rows

#: Views that a teacher is asked about.
ASKED = 32
#: Share of the spread between images by which rounding may change a row in another batch.
ROUNDING = {"float32": 0.05, "bf16": 0.25, "fp16": 0.25}


def check_answers(teacher: Teacher, views: Tensor, allow: bool = False) -> list[str]:
    """What should be said of a teacher's answers, or a refusal of answers that cannot be cached.

    Args:
        teacher: as it will be dumped.
        views: uint8 (B, C, H, W), a few of those to be dumped.
        allow: refuse only what is not finite.

    Returns:
        Sentences for whoever runs the dump; empty as a rule.

    Raises:
        DataError: a logit is not finite.
        MismatchError: the rows are probabilities, or change with the batch that an image is in.
    """
    name = f"teacher {teacher.architecture}"
    views = views.to(teacher.device)
    rows = teacher(views).cpu().numpy()
    if not np.isfinite(rows).all():
        raise DataError(
            f"{name} gives logits that are not finite for {int((~np.isfinite(rows)).any(1).sum())} "
            f"of {len(rows)} views. Try --precision float32, and check its weights."
        )
    said = []
    kind = kind_of_rows(rows)
    if kind == PROBABILITIES:
        said.append(
            f"{name} gives probabilities, not logits: every row sums to 1, and a softmax of that is "
            "nearly uniform at any temperature. Leave out its last softmax, or take the log of what it "
            "gives (log-probabilities serve as logits)"
        )
    again = teacher(views[: max(1, min(3, len(views) // 2))]).cpu().numpy()
    changed = float(np.abs(again - rows[: len(again)]).max())
    spread = float(rows.std(0).max())
    if changed > ROUNDING[teacher.precision] * spread + 1e-4 * float(np.abs(rows).max()):
        said.append(
            f"{name} answers the same image by up to {changed:.3g} differently in another batch (images "
            f"differ by {spread:.3g}): it draws random numbers, or looks at the whole batch as batch "
            "norm does in train mode. A store would keep one answer of many: make it deterministic"
        )
    if said and not allow:
        raise MismatchError(f"{said[0]}. --allow-untrained dumps it all the same")
    if kind is not None and kind != PROBABILITIES:
        said.append(f"{name} gives {kind}")
    return said
