"""Are a teacher's outputs logits, and each image's own? Checked before anything is dumped.

Probabilities, a teacher in train mode and one that draws random numbers all train students without
an error, and badly.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from kdcache.teachers.teacher import Teacher
from kdcache_stores.errors import DataError, MismatchError
from kdcache_stores.write.importing import PROBABILITIES, kind_of_rows

#: Views that a teacher is checked on.
CHECKED = 32
#: Of them, how many are forwarded once more, in another batch.
AGAIN = 3
#: Share of the spread between images by which rounding may change a row in another batch.
ROUNDING = {"float32": 0.05, "bf16": 0.25, "fp16": 0.25}


def check_outputs(
    teacher: Teacher,
    views: Tensor,
    allow: bool = False,
    outputs: Mapping[str, np.ndarray] | None = None,
) -> list[str]:
    """Remarks on a teacher's outputs, or a refusal of outputs that cannot be cached.

    Args:
        teacher: as it will be dumped.
        views: uint8 (B, C, H, W), a few of those to be dumped.
        allow: refuse only what is not finite.
        outputs: what it gave for these views and more that follow them, the logits among it, where
            that is known: fields by name, float32 (N, *shape).

    Returns:
        Sentences for whoever runs the dump; empty as a rule.

    Raises:
        DataError: a value of some field is not finite.
        MismatchError: the rows are probabilities, or change with the batch that an image is in.
    """
    name = f"teacher {teacher.architecture}"
    views = views.to(teacher.device)
    outputs = _outputs(teacher, views) if outputs is None else outputs
    for field, rows in outputs.items():
        if bad := int((~np.isfinite(rows.reshape(len(rows), -1))).any(1).sum()):
            raise DataError(
                f"{name} gives {field} that are not finite for {bad} of {len(rows)} views. Try "
                "--precision float32, and check its weights."
            )
    remarks = []
    kind = kind_of_rows(outputs["logits"])
    if kind == PROBABILITIES:
        remarks.append(
            f"{name} gives probabilities, not logits: every row sums to 1, and a softmax of that is "
            "nearly uniform at any temperature. Leave out its last softmax, or take the log of what it "
            "gives (log-probabilities serve as logits)"
        )
    again = _outputs(teacher, views[: max(1, min(AGAIN, len(outputs["logits"]) // 2))])
    for field, rows in outputs.items():
        changed = float(np.abs(again[field] - rows[: len(again[field])]).max())
        spread = float(rows.std(0).max())
        if changed > ROUNDING[teacher.precision] * spread + 1e-4 * float(np.abs(rows).max()):
            remarks.append(
                f"{name} gives other {field} for the same image in another batch, by up to "
                f"{changed:.3g} (images differ by {spread:.3g}): it draws random numbers, or looks at "
                "the whole batch as batch norm does in train mode. A store would keep one output of "
                "many: make it deterministic"
            )
    if remarks and not allow:
        raise MismatchError(f"{remarks[0]}. --allow-untrained dumps it all the same")
    if kind is not None and kind != PROBABILITIES:
        remarks.append(f"{name} gives {kind}")
    return remarks


def _outputs(teacher: Teacher, views: Tensor) -> dict[str, np.ndarray]:
    """All fields, the logits among them, on the host."""
    outputs = teacher(views)
    if "logits" not in outputs:
        outputs["logits"] = teacher.logits(views)
    return {name: values.cpu().numpy() for name, values in outputs.items()}
