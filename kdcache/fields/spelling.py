"""The names of fields: how people spell them, and how a store keeps them.

`last@4` and `stage:2:pre` are spellings for people, `last_4` and `stage_2_pre` the names in a store.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from kdcache_stores.errors import UsageError

#: What there is, by its spelling; a user's own module may give fields of any other name.
FIELDS = {
    "logits": "What the network predicts from: a number for each class.",
    "pooled": "The vector that the last linear layer sees (RKD, CRD).",
    "last": "The last feature map, of which pooled is the mean (SimKD, CAT-KD).",
    "last@R": "The same, average-pooled to R x R.",
    "attention": "Attention maps of every stage at every size that a student may have (AT): attention@R each.",
    "stage:N": "The map of stage N, as the next stage takes it; stage 0 is the stem (FitNet).",
    "stage:N:pre": "The same before its last ReLU (OFD, ReviewKD).",
}

_SPELLED = re.compile(r"(last|attention|stage)(?:[@:_](\d+))?(?:[:_](pre))?")


class Tap(NamedTuple):
    """A field of a network, by the parts of its name.

    Attributes:
        kind: "logits", "pooled", "cam", "last", "attention" or "stage".
        number: R of `last` and `attention`, N of `stage`; None where the name has none.
        before: of a stage, before its ReLU.
    """

    kind: str
    number: int | None = None
    before: bool = False


def tap_of(name: str) -> Tap | None:
    """The parts of a field's name, in either form; None for a name that is no network's of its own accord.

    >>> tap_of("last@4"), tap_of("stage_2_pre"), tap_of("tokens")
    (Tap(kind='last', number=4, before=False), Tap(kind='stage', number=2, before=True), None)
    """
    if name in ("logits", "pooled", "cam"):
        return Tap(name)
    match = _SPELLED.fullmatch(name)
    if match is None:
        return None
    kind, digits, before = match.groups()
    if before is not None and kind != "stage":
        return None
    return Tap(kind, None if digits is None else int(digits), before is not None)


def stored_name(spelling: str) -> str:
    """The name in a store: "last@4" -> "last_4", "stage:2:pre" -> "stage_2_pre"; others as they are.

    Raises:
        UsageError: a map of 0 x 0, or a stage without its number.
    """
    tap = tap_of(spelling)
    if tap is None or tap.kind not in ("last", "attention", "stage"):
        return spelling
    if tap.kind == "stage" and tap.number is None:
        raise UsageError(f"the field {spelling!r} needs the number of the stage, such as stage:2")
    if tap.kind != "stage" and tap.number == 0:
        raise UsageError(f"the field {spelling!r}: a map has 1 x 1 values at least")
    parts = [tap.kind, *([] if tap.number is None else [str(tap.number)])]
    return "_".join([*parts, *(["pre"] if tap.before else [])])


def spelled(name: str) -> str:
    """How people write a stored name: "last_4" -> "last@4", "stage_2_pre" -> "stage:2:pre"."""
    tap = tap_of(name)
    if tap is None or tap.number is None:
        return name
    if tap.kind == "stage":
        return f"stage:{tap.number}{':pre' if tap.before else ''}"
    return f"{tap.kind}@{tap.number}"


def is_last(name: str) -> bool:
    """Whether a field is the last feature map, whole or averaged."""
    tap = tap_of(name)
    return tap is not None and tap.kind == "last"


def needs_head(name: str) -> bool:
    """Whether the teacher's head is kept beside a field: it makes the logits of it."""
    return name == "pooled" or is_last(name)
