"""A finding of a rule: what will likely go wrong, the reason and a remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that will likely make a distillation worse than it could be.

    Attributes:
        rule: its name, kebab-case; the same in every message, summary and version.
        message: what was found and why it matters, with the numbers that were measured.
        remedy: what to do about it.
    """

    rule: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.message} Remedy: {self.remedy} [{self.rule}]"

    def to_dict(self) -> dict[str, str]:
        """As JSON."""
        return asdict(self)


def percent(value: float) -> str:
    """0.6531 -> "65.3%"."""
    return f"{value:.1%}"
