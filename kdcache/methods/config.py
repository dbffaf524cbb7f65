"""What is minimised, in plain values: the part of a run's configuration about the loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdcache.methods.ablations import ABLATIONS
from kdcache.methods.ensembles import MEANS
from kdcache.methods.multilevel import VARIANTS
from kdcache.methods.noise import Noise
from kdcache.methods.scaling import Standardize
from kdcache_stores.errors import UnknownName, UsageError

METHODS = ("ce", "kd", "dkd", "mlkd", "ctkd")
COMBINATIONS = (*MEANS, "mean-losses", "random")
WEIGHTINGS = ("entropy", "confidence")

# As published: weight of CE, weight of the distillation term, T. Then the standardized form.
_PLAIN = {
    "ce": (1.0, 0.0, None),
    "kd": (0.1, 0.9, 4.0),
    "dkd": (1.0, 1.0, 4.0),
    "mlkd": (0.1, 0.9, 4.0),
    "ctkd": (0.1, 0.9, None),
}
_STANDARDIZED_WEIGHT, _STANDARDIZED_TEMPERATURE = 9.0, 2.0


@dataclass(frozen=True)
class ObjectiveConfig:
    """Method, weights, temperatures and everything else that `Objective` needs.

    None stands for the published value of the method; `resolved` fills it in. The loss is
    ce_weight·CE + kd_weight·D, with D the method's distillation term, T² included.

    Args:
        method: "ce", "kd", "dkd", "mlkd" or "ctkd".
        ce_weight: of CE with the labels: .1, DKD 1, ce 1.
        kd_weight: of the distillation term: .9, DKD 1; 9 when standardized. For DKD it multiplies
            both dkd_alpha and dkd_beta.
        alpha: shorthand for ce_weight = alpha and kd_weight = 1 - alpha.
        temperature: T: 4, and 2 when standardized (τ); MLKD's first temperature; not for CTKD.
        teacher_temperature, student_temperature: instead of T on one side (kd and dkd); the factor
            T² is then the product of both.
        standardize: False, or "unbiased" (the published code) or "biased" (the paper).
        noise: on the teachers' logits, or None.
        combine: how several teachers become one target, see `Ensemble`.
        weights: of the teachers, "entropy", "confidence", or None for equal ones.
        ablation: what of the teacher's answer is kept, see `ablate`; kd and ctkd.
        reverse: KL(student ‖ teacher) instead of the forward KL; kd and ctkd.
        label_smoothing: of CE.
        dkd_alpha, dkd_beta: weights of the target and of the non-target part: 1 and 8.
        dkd_warmup: epochs over which DKD's term grows linearly to its weight: 20; 0 for none.
        mlkd_variant: "as-coded" (the published code) or "as-described" (the paper).
        ctkd_start, ctkd_end: T = start + end·σ(θ): 1 (2 when standardized) and 20.
        ctkd_ramp: epochs over which the reversed gradient of θ grows to its full size: 10.

    Raises:
        UnknownName: for an unknown method, combination or the like.
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
    dkd_alpha: float = 1.0
    dkd_beta: float = 8.0
    dkd_warmup: int = 20
    mlkd_variant: str = "as-coded"
    ctkd_start: float | None = None
    ctkd_end: float = 20.0
    ctkd_ramp: int = 10

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("method", self.method, METHODS),
            ("combination", self.combine, COMBINATIONS),
            ("ablation", self.ablation, ABLATIONS),
            ("MLKD variant", self.mlkd_variant, VARIANTS),
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
        self._check_numbers()
        self._check_combinations()

    def _check_numbers(self) -> None:
        for name in ("ce_weight", "kd_weight", "dkd_alpha", "dkd_beta", "dkd_warmup", "ctkd_ramp"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UsageError(f"expected {name} of at least 0, found {value}")
        for name in (
            *("temperature", "teacher_temperature", "student_temperature"),
            *("ctkd_start", "ctkd_end"),
        ):
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

    def _check_combinations(self) -> None:
        if self.alpha is not None and (self.ce_weight is not None or self.kd_weight is not None):
            raise UsageError(
                f"alpha = {self.alpha} is shorthand for ce_weight and kd_weight: give it or them"
            )
        sides = self.teacher_temperature is not None or self.student_temperature is not None
        if sides and self.method not in ("kd", "dkd"):
            raise UsageError(
                f"{self.method} has no separate temperatures of teacher and student: kd and dkd do"
            )
        if self.method == "ctkd" and self.temperature is not None:
            raise UsageError(
                "ctkd learns its temperature: set ctkd_start and ctkd_end instead of temperature"
            )
        if self.method not in ("kd", "ctkd") and (self.reverse or self.ablation != "full"):
            raise UsageError(
                f"ablations and the reverse KL are of kd and ctkd, found method {self.method}"
                + ("; dkd_alpha = 0 or dkd_beta = 0 ablates DKD" if self.method == "dkd" else "")
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
        coded = self.method == "mlkd" and self.mlkd_variant == "as-coded"
        if self.combine == "mean-zscores" and coded:
            raise UsageError(
                "MLKD as coded compares raw logits of batches and classes, which a mean of "
                "Z-scores has not: combine 'mean-logits' or 'mean-losses', or mlkd_variant "
                "'as-described'"
            )
        if isinstance(self.weights, str):
            if self.combine == "random":
                raise UsageError(
                    f"one teacher at random for the whole batch has no weights per sample, found "
                    f"{self.weights!r}: give numbers, or another combination"
                )
            if self.combine == "mean-losses" and self.method == "mlkd":
                raise UsageError(
                    "MLKD compares whole batches, so its losses have no weights per sample: give "
                    "numbers, or combine 'mean-logits', 'mean-zscores' or 'mean-probs'"
                )
        if self.method == "ce":
            for name in ("kd_weight", "alpha", "temperature", "standardize", "noise", "weights"):
                if getattr(self, name):
                    raise UsageError(f"ce has no teacher: leave out {name}, or name another method")
        for name, default in self._of_other_methods():
            if getattr(self, name) != default:
                raise UsageError(
                    f"{name} is an option of {name.partition('_')[0]}, found method {self.method}"
                )

    def _of_other_methods(self) -> list[tuple[str, Any]]:
        """The options, with their defaults, that only another method reads."""
        own = f"{self.method}_"
        return [
            (option.name, option.default)
            for option in dataclasses.fields(self)
            if option.name.startswith(("dkd_", "mlkd_", "ctkd_"))
            and not option.name.startswith(own)
        ]

    def resolved(self) -> ObjectiveConfig:
        """The same with every None of a weight or temperature replaced by the published value."""
        ce_weight, kd_weight, temperature = _PLAIN[self.method]
        start = 1.0
        if self.standardize:
            kd_weight, start = _STANDARDIZED_WEIGHT, 2.0
            temperature = None if temperature is None else _STANDARDIZED_TEMPERATURE
        if self.alpha is not None:
            ce_weight, kd_weight = self.alpha, 1 - self.alpha

        def given(value: float | None, default: float | None) -> float | None:
            return default if value is None else value

        return dataclasses.replace(
            self,
            alpha=None,
            ce_weight=given(self.ce_weight, ce_weight),
            kd_weight=given(self.kd_weight, kd_weight),
            temperature=given(self.temperature, temperature),
            ctkd_start=given(self.ctkd_start, start if self.method == "ctkd" else None),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for TOML or JSON, without None and without other methods' options."""
        values: dict[str, Any] = {}
        others = dict(self._of_other_methods())
        for name in (field.name for field in dataclasses.fields(self)):
            value = getattr(self, name)
            if isinstance(value, Noise):
                values[name] = str(value)
            elif value is not None and name not in others:
                values[name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ObjectiveConfig:
        """The inverse of `to_dict`.

        Raises:
            UnknownName: for a name that is no option.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise UnknownName("option of the objective", name, known)
        options = dict(values)
        if isinstance(options.get("noise"), str):
            options["noise"] = Noise.parse(options["noise"])
        if isinstance(options.get("weights"), list):
            options["weights"] = tuple(options["weights"])
        return cls(**options)
