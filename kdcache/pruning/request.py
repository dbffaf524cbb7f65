"""What is to be pruned, how much of it, and when."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache_stores import UnknownName, UsageError

#: Kind -> what goes.
KINDS = {
    "structured": "whole channels, with all that depends on them: a smaller and faster network",
    "unstructured": "single weights, set to zero: no smaller file and no faster network",
}
#: By what channels or weights are chosen.
IMPORTANCES = ("magnitude", "gradient")


@dataclass(frozen=True)
class PruneRequest:
    """A pruning that goes on over some epochs and leaves the others for recovery.

    Attributes:
        kind: a key of `KINDS`.
        ratio: of each layer's channels, or of all weights, that goes in the end; between 0 and 1.
        by: one of `IMPORTANCES`: the size of the weights, or how much the loss would change without them to
            first order (the gradient of the epoch's losses times the weight).
        epochs: at the end of each of so many, the first ones, a part goes.
    """

    kind: str
    ratio: float
    by: str
    epochs: int

    @classmethod
    def parse(cls, text: str, by: str, epochs: int | None, total: int) -> PruneRequest:
        """From the command line.

        Args:
            text: "structured:0.5".
            by: one of `IMPORTANCES`.
            epochs: None is a third of all, 1 at least.
            total: epochs of the training.

        Raises:
            UsageError: of no such kind, a ratio that is not between 0 and 1, or more epochs than there are.
        """
        kind, _, number = text.partition(":")
        if kind not in KINDS:
            raise UnknownName("kind of pruning", kind, KINDS)
        if by not in IMPORTANCES:
            raise UnknownName("importance", by, IMPORTANCES)
        try:
            ratio = float(number)
        except ValueError:
            ratio = 0.0
        if not 0 < ratio < 1:
            raise UsageError(
                f"--prune {text}: expected the part that goes, between 0 and 1, such as {kind}:0.5"
            )
        epochs = max(1, total // 3) if epochs is None else epochs
        if not 1 <= epochs <= total:
            raise UsageError(f"--prune-epochs {epochs}: the training has {total} epochs.")
        return cls(kind, ratio, by, epochs)

    def ratio_after(self, epochs: int) -> float:
        """The part that is gone after so many epochs: fast at first, slowly in the end.

        Source: Zhu and Gupta, To prune, or not to prune, 2017, eq. 1, from nothing at the start.
        """
        done = min(epochs, self.epochs) / self.epochs
        return self.ratio if done == 1 else self.ratio * (1 - (1 - done) ** 3)
