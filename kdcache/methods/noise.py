"""Noise on the teacher's logits, drawn at training time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from kdcache.methods.scaling import full_precision
from kdcache.methods.step import Step
from kdcache.philox import DISTRIBUTIONS
from kdcache_stores.errors import UnknownName, UsageError

MODES = ("additive", "multiplicative")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Noise:
    """z + ε on the teacher's logits: fresh each epoch, the same for the same seed.

    TALD-KD (Information Processing and Management, 2025) minimises the expectation
    E_ε[CE(v, y) + λ·L_KD(v, z + ε)]. No code was published, and the formula names neither the
    distribution of ε nor its size, schedule or number of draws. **All of these are choices of
    kdcache, not the paper's:** the three families, each with `scale` as its standard deviation; the
    multiplicative form (that of Sau and Balasubramanian 2016, there on a part of the samples); the
    sizes relative to a row; the schedules; the mean over `copies` draws as the expectation; the
    defaults.

    ε is a pure function of (seed, epoch, key, view, teacher, copy): it depends on neither batch
    size, order, number of workers nor resume, and two stores of one plan get independent noise.

    Args:
        family: "gaussian", "uniform" or "laplace", with mean zero.
        scale: the standard deviation of ε (of ξ for multiplicative noise), at least 0.
        relative: in units of each row's own standard deviation (unbiased) instead of logits, which
            makes it the same for teachers of different scale and meaningful before a Z-score.
        mode: "additive", z + ε, or "multiplicative", (1 + ξ)·z. The latter depends on the mean of
            the logits, which a softmax does not.
        schedule: factor on the scale over the epochs e = 0, ..., E - 1: "constant" 1, "linear"
            1 - e/E, "cosine" (1 + cos(πe/E))/2.
        copies: number of draws M per step; the loss is their mean.

    Raises:
        UnknownName: for another family, mode or schedule.
        UsageError: for a negative scale, no copies, or relative multiplicative noise.
    """

    family: Literal["gaussian", "uniform", "laplace"] = "gaussian"
    scale: float = 0.1
    relative: bool = False
    mode: Literal["additive", "multiplicative"] = "additive"
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    copies: int = 1

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("noise", self.family, DISTRIBUTIONS),
            ("noise mode", self.mode, MODES),
            ("noise schedule", self.schedule, SCHEDULES),
        ):
            if name not in known:
                raise UnknownName(kind, name, known)
        if not (self.scale >= 0 and math.isfinite(self.scale)):
            raise UsageError(f"expected a noise scale of at least 0, found {self.scale}")
        if self.copies < 1:
            raise UsageError(f"expected at least 1 noisy copy, found {self.copies}")
        if self.relative and self.mode == "multiplicative":
            raise UsageError(
                "multiplicative noise is relative to each logit already: leave out 'relative'"
            )

    @classmethod
    def parse(cls, text: str) -> Noise:
        """Noise from "FAMILY:SCALE", with options after commas, as on the command line.

        >>> Noise.parse("gaussian:0.1")
        Noise(family='gaussian', scale=0.1, relative=False, mode='additive', ...)
        >>> str(Noise.parse("laplace:0.2,relative,cosine,copies=4"))
        'laplace:0.2,relative,cosine,copies=4'
        """
        family, _, rest = text.partition(":")
        if family not in DISTRIBUTIONS:
            raise UnknownName("noise", family, DISTRIBUTIONS)
        fields: dict[str, Any] = {"family": family}
        scale, *options = rest.split(",")
        try:
            fields["scale"] = float(scale)
            for option in options:
                name, _, value = option.partition("=")
                if option == "relative":
                    fields["relative"] = True
                elif option in MODES:
                    fields["mode"] = option
                elif option in SCHEDULES:
                    fields["schedule"] = option
                elif name == "copies":
                    fields["copies"] = int(value)
                else:
                    raise ValueError(option)
        except ValueError as error:
            raise UsageError(
                "expected noise as FAMILY:SCALE[,relative][,multiplicative][,linear|cosine]"
                f"[,copies=M], such as 'gaussian:0.1,relative'; found {text!r} ({error})"
            ) from None
        return cls(**fields)

    def __str__(self) -> str:
        options = [
            *(["relative"] if self.relative else []),
            *([self.mode] if self.mode != "additive" else []),
            *([self.schedule] if self.schedule != "constant" else []),
            *([f"copies={self.copies}"] if self.copies != 1 else []),
        ]
        return ",".join([f"{self.family}:{self.scale!r}", *options])

    def scale_at(self, epoch: int, epochs: int) -> float:
        """The scale in an epoch, counted from 0."""
        progress = epoch / max(epochs, 1)
        if self.schedule == "linear":
            return self.scale * (1 - progress)
        if self.schedule == "cosine":
            return self.scale * (1 + math.cos(math.pi * progress)) / 2
        return self.scale

    def __call__(self, logits: Tensor, step: Step, teacher: int = 0, copy: int = 0) -> Tensor:
        """Noisy `logits` (B, ..., K), float32, for the `copy`-th draw of the `teacher`-th teacher.

        Raises:
            UsageError: when the step has no keys to seed by.
        """
        logits = full_precision(logits)
        n = math.prod(logits.shape[1:])
        numbers = step.draw(self.family, n, "noise", teacher, copy)
        noise = step.number("noise scale", self.scale_at) * numbers.view(logits.shape)
        if self.mode == "multiplicative":
            return logits * (1 + noise)
        if self.relative:
            noise = noise * logits.std(-1, keepdim=True)
        return logits + noise
