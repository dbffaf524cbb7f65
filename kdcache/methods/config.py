"""What is minimised, in plain values: the part of a run's configuration about the loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdcache.methods.ablations import ABLATIONS
from kdcache.methods.ensembles import MEANS
from kdcache.methods.noise import Noise
from kdcache.methods.record import Method, Option
from kdcache.methods.scaling import Standardize
from kdcache.methods.table import METHODS, names_of
from kdcache_stores.errors import UnknownName, UsageError

COMBINATIONS = (*MEANS, "mean-losses", "random")
WEIGHTINGS = ("entropy", "confidence")
CHOSEN = ("temperature", "teacher_temperature", "student_temperature", "ablation", "reverse")
"""Options that a method takes only if its record says so."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Method, weights, temperatures and everything else that `Objective` needs.

    None stands for the published value of the method; `resolved` fills it in. The loss is
    ce_weight·CE + kd_weight·D, with D the method's distillation term, T² included.

    Args:
        method: a name of `METHODS`.
        options: of this method alone, by name, such as {"beta": 2.0} for dkd; what is left out has
            the published value.
        ce_weight: of CE with the labels.
        kd_weight: of the distillation term; for DKD it multiplies both alpha and beta.
        alpha: shorthand for ce_weight = alpha and kd_weight = 1 - alpha.
        temperature: T, or τ when standardized; MLKD's first temperature.
        teacher_temperature, student_temperature: instead of T on one side; the factor T² is then
            the product of both.
        standardize: False, or "unbiased" (the published code) or "biased" (the paper).
        noise: on the teachers' logits, or None.
        combine: how several teachers become one target, see `Ensemble`.
        weights: of the teachers, "entropy", "confidence", or None for equal ones.
        ablation: what of the teacher's targets is kept, see `ablate`.
        reverse: KL(student ‖ teacher) instead of the forward KL.
        label_smoothing: of CE.
        add: further methods, "NAME" or "NAME:WEIGHT", whose distillation terms are added, with their
            published weights where none is given. Each takes of the temperatures, the standardization
            and the ablation what its record has; their own options are named with the method.

    Raises:
        UnknownName: for an unknown method, option of it, combination or the like.
        UsageError: for values or combinations of options that make no sense, and for options of
            another method.
    """

    method: str = "kd"
    ce_weight: float | None = None
    kd_weight: float | None = None
    alpha: float | None = None
    temperature: float | None = None
    teacher_temperature: float | None = None
    student_temperature: float | None = None
    standardize: Standardize = False
    noise: Noise | None = None
    combine: str = "mean-logits"
    weights: tuple[float, ...] | Literal["entropy", "confidence"] | None = None
    ablation: str = "full"
    reverse: bool = False
    label_smoothing: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    add: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("method", self.method, METHODS),
            ("combination", self.combine, COMBINATIONS),
            ("ablation", self.ablation, ABLATIONS),
        ):
            if name not in known:
                raise UnknownName(kind, name, known)
        if self.standardize not in (False, "unbiased", "biased"):
            raise UsageError(
                f"expected standardize False, 'unbiased' or 'biased', found {self.standardize!r}"
            )
        if isinstance(self.weights, str):
            if self.weights not in WEIGHTINGS:
                raise UnknownName("weighting of teachers", self.weights, WEIGHTINGS)
        elif self.weights is not None:
            object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        object.__setattr__(self, "add", tuple(self.add))
        self._check_added()
        object.__setattr__(self, "options", self._checked_options())
        self._check_numbers()
        self._check_method()
        self._check_combinations()

    @property
    def record(self) -> Method:
        """The record of the method."""
        return METHODS[self.method]

    @property
    def records(self) -> tuple[Method, ...]:
        """The records of the method and of those that are added."""
        return (self.record, *(METHODS[text.partition(":")[0]] for text in self.add))

    @property
    def needs_teacher(self) -> bool:
        """Whether any of them distils a teacher."""
        return any(method.needs_teacher for method in self.records)

    @property
    def teacher_fields(self) -> tuple[str, ...]:
        """What they read of each teacher, as their records name it."""
        return tuple(dict.fromkeys(f for method in self.records for f in method.teacher_fields))

    @property
    def student_fields(self) -> tuple[str, ...]:
        """What they read of the student, as their records name it."""
        parts = self.parts()
        return tuple(dict.fromkeys(f for p in parts for f in p.record.student_reads(p.options)))

    @property
    def batch_statistics(self) -> bool:
        """Whether the teacher's batch norms shall use the mean and variance of each batch."""
        asked = [(part.record.batch_statistics, part.options) for part in self.parts()]
        return any(choice and options[choice[0]] == choice[1] for choice, options in asked)

    def parts(self) -> list[ObjectiveConfig]:
        """Each method by itself, every default filled in: this one, then those that are added.

        The weight of its term is the `kd_weight` of each; of `ce_weight` the first one counts.
        """
        return [self._part(self.record, None, own=True), *self.parts_added()]

    def parts_added(self) -> list[ObjectiveConfig]:
        """Those of `parts` that are added."""
        pairs = [
            (text.partition(":")[2], m) for text, m in zip(self.add, self.records[1:], strict=True)
        ]
        return [self._part(m, float(weight) if weight else None, own=False) for weight, m in pairs]

    def _part(self, method: Method, weight: float | None, own: bool) -> ObjectiveConfig:
        named = {o: o.name if own else method.flag(o) for o in method.options}
        changes: dict[str, Any] = {
            "method": method.name,
            "add": (),
            "options": {
                o.name: self.options[name] for o, name in named.items() if name in self.options
            },
        }
        changes |= {name: _default(name) for name in CHOSEN if name not in method.takes}
        if method.standardized is None:
            changes["standardize"] = False
        if "logits" not in method.teacher_fields:
            changes["noise"] = None
        if not method.needs_teacher:
            changes["weights"] = None
        if not own:
            changes |= {"ce_weight": None, "kd_weight": weight, "alpha": None}
        return dataclasses.replace(self, **changes).resolved()

    def _check_added(self) -> None:
        names = [self.method]
        for text in self.add:
            name, given, weight = text.partition(":")
            if name not in METHODS:
                raise UnknownName("method to add", name, METHODS)
            if METHODS[name].loss is None:
                raise UsageError(f"{name} has no term to add: --ce-weight weighs cross-entropy")
            if name in names:
                raise UsageError(f"{name} is there twice: give its weight instead, {name}:WEIGHT")
            names.append(name)
            if given and weight:
                try:
                    number = float(weight)
                except ValueError:
                    number = -1.0
                if not (number >= 0 and math.isfinite(number)):
                    raise UsageError(
                        f"expected a method to add as NAME or NAME:WEIGHT, such as kd:0.9, found {text!r}"
                    )
        alone = [name for name in names if METHODS[name].peers]
        if alone and len(names) > 1:
            raise UsageError(
                f"{alone[0]} learns from the students beside it alone: nothing is added"
            )
        if len({METHODS[name].pairs for name in names}) > 1:
            paired = names_of(METHODS[name] for name in names if METHODS[name].pairs)
            raise UsageError(f"{paired} reads pairs of views, and the other methods single ones")

    def _checked_options(self) -> dict[str, Any]:
        """The options of every method, each of its own type and within its bounds."""
        first, *added = self.records
        of_added = {m.flag(o): (m, o) for m in added for o in m.options}
        mine = {name: value for name, value in self.options.items() if name not in of_added}
        theirs = {
            name: _value(*of_added[name], value)
            for name, value in self.options.items()
            if name in of_added
        }
        return _checked(first, mine) | theirs

    def _check_numbers(self) -> None:
        for name in ("ce_weight", "kd_weight"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UsageError(f"expected {name} of at least 0, found {value}")
        for name in ("temperature", "teacher_temperature", "student_temperature"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"expected {name} above 0, found {value}")
        for name in ("alpha", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"expected {name} from 0 to 1, found {value}")
        if self.weights is not None and not isinstance(self.weights, str):
            sound = all(w >= 0 and math.isfinite(w) for w in self.weights)
            if not sound or not sum(self.weights) > 0:
                raise UsageError(
                    f"expected teacher weights of at least 0 and not all 0, found {self.weights}"
                )

    def _check_method(self) -> None:
        """Refuse what the method's record does not have."""
        method = self.record
        if not self.needs_teacher:
            weights = ("kd_weight", "alpha") if method.loss is None else ()
            for name in (*weights, "temperature", "standardize", "noise", "weights"):
                if getattr(self, name):
                    raise UsageError(
                        f"{method.name} has no teacher: leave out {name}, or name another method"
                    )
        for name in CHOSEN:
            takes = any(name in record.takes for record in self.records)
            if not takes and getattr(self, name) != _default(name):
                takers = names_of(m for m in METHODS.values() if name in m.takes)
                own = ", ".join(option.name for option in method.options)
                raise UsageError(
                    f"{name} is an option of {takers}, found method {method.name}"
                    + (f", whose own options are {own}" if own else "")
                )
        if self.standardize and all(record.standardized is None for record in self.records):
            raise UsageError(
                f"{method.name} has no standardized form: leave out standardize, or take "
                f"{names_of(m for m in METHODS.values() if m.standardized is not None)}"
            )
        whole = [record.name for record in self.records if record.whole_batch]
        if isinstance(self.weights, str) and self.combine == "mean-losses" and whole:
            raise UsageError(
                f"{whole[0]} compares whole batches, so its losses have no weights per sample: "
                "give numbers, or combine 'mean-logits', 'mean-zscores' or 'mean-probs'"
            )

    def _check_combinations(self) -> None:
        if self.alpha is not None and (self.ce_weight is not None or self.kd_weight is not None):
            raise UsageError(
                f"alpha = {self.alpha} is shorthand for ce_weight and kd_weight: give it or them"
            )
        if self.combine == "mean-probs" and self.standardize:
            raise UsageError(
                "a mean of probabilities has no logits left to standardize: use combine "
                "'mean-zscores' or 'mean-losses', or no standardization"
            )
        if self.combine == "mean-zscores" and not self.standardize:
            raise UsageError(
                "a mean of Z-scores is compared with the student's Z-scores: add standardize"
            )
        if self.noise is not None and "logits" not in self.teacher_fields:
            raise UsageError(
                f"noise is on the teacher's logits, and {self.method} reads {', '.join(self.teacher_fields)}"
            )
        if isinstance(self.weights, str) and self.combine == "random":
            raise UsageError(
                f"one teacher at random for the whole batch has no weights per sample, found "
                f"{self.weights!r}: give numbers, or another combination"
            )

    def resolved(self) -> ObjectiveConfig:
        """The same with everything that was left out replaced by the published value."""
        method = self.record
        standardize = bool(self.standardize) and method.standardized is not None
        published = method.defaults(self.options, standardize)
        ce_weight, kd_weight = published.ce_weight, published.kd_weight
        if self.alpha is not None:
            ce_weight, kd_weight = self.alpha, 1 - self.alpha
        defaults = {
            option.name: option.standardized
            if standardize and option.standardized is not None
            else option.default
            for option in method.options
        }

        def given(value: float | None, default: float | None) -> float | None:
            return default if value is None else value

        return dataclasses.replace(
            self,
            alpha=None,
            ce_weight=given(self.ce_weight, ce_weight),
            kd_weight=given(self.kd_weight, kd_weight),
            temperature=given(self.temperature, published.temperature),
            options=defaults | self._added_options() | dict(self.options),
            add=tuple(f"{part.method}:{part.kd_weight:g}" for part in self.parts_added()),
        )

    def _added_options(self) -> dict[str, Any]:
        return {
            method.flag(o): part.options[o.name]
            for method, part in zip(self.records[1:], self.parts_added(), strict=True)
            for o in method.options
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for TOML or JSON, without None and without what the method does not take."""
        values: dict[str, Any] = {}
        left_out = {n for n in CHOSEN if not any(n in record.takes for record in self.records)}
        for name in (item.name for item in dataclasses.fields(self)):
            value = getattr(self, name)
            if isinstance(value, Noise):
                values[name] = str(value)
            elif value is not None and value not in ({}, ()) and name not in left_out:
                values[name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ObjectiveConfig:
        """The inverse of `to_dict`.

        Raises:
            UnknownName: for a name that is no option.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise UnknownName("option of the objective", name, known)
        options = dict(values)
        if isinstance(options.get("noise"), str):
            options["noise"] = Noise.parse(options["noise"])
        for name in ("weights", "add"):
            if isinstance(options.get(name), list):
                options[name] = tuple(options[name])
        return cls(**options)

    @classmethod
    def flags(cls) -> list[str]:
        """The names that `from_flags` takes."""
        shared = [item.name for item in dataclasses.fields(cls) if item.name != "options"]
        own = [method.flag(o) for method in METHODS.values() for o in method.options]
        return shared + own

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> ObjectiveConfig:
        """The objective that a command line or a recipe asks for.

        Args:
            flags: by the names of `from_dict`, but that the options of a method are named with it
                ("dkd_beta"), and that standardize may be True; None where nothing was given.

        Raises:
            UnknownName: for a name that is no option.
            UsageError: for an option of another method.
        """
        values = {name: value for name, value in flags.items() if value is not None}
        name = values.get("method", cls.method)
        if name not in METHODS:
            raise UnknownName("method", name, METHODS)
        added = [text.partition(":")[0] for text in values.get("add", ())]
        own: dict[str, Any] = {}
        for method in METHODS.values():
            for option in method.options:
                flag = method.flag(option)
                if flag not in values:
                    continue
                if method.name not in (name, *added):
                    raise UsageError(f"{flag} is an option of {method.name}, found method {name}")
                own[option.name if method.name == name else flag] = values.pop(flag)
        if values.get("standardize") is True:
            values["standardize"] = "unbiased"
        return cls.from_dict(values | {"options": own})


def _default(name: str) -> Any:
    return ObjectiveConfig.__dataclass_fields__[name].default


def _checked(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method, each of its own type and within its bounds."""
    known = {option.name: option for option in method.options}
    for name in options:
        if name in known:
            continue
        owners = [other for other in METHODS.values() if name in {o.name for o in other.options}]
        if owners:
            raise UsageError(
                f"{name} is an option of {names_of(owners)}, found method {method.name}"
            )
        raise UnknownName(f"option of {method.name}", name, known)
    return {name: _value(method, known[name], value) for name, value in options.items()}


def _value(method: Method, option: Option, value: Any) -> float | int | str:
    kind, flag = type(option.default), method.flag(option)
    if kind is str:
        if value not in option.choices:
            raise UnknownName(flag, str(value), option.choices)
        return str(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or kind(value) != value:
        what = "a whole number" if kind is int else "a finite number"
        raise UsageError(f"expected {what} as {flag}, found {value!r}")
    if option.least is not None and not value >= option.least:
        raise UsageError(f"expected {flag} of at least {option.least}, found {value}")
    if option.above is not None and not value > option.above:
        raise UsageError(f"expected {flag} above {option.above}, found {value}")
    return kind(value)
