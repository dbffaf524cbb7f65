"""A loss that is not finite, or that is and still explodes: seen at the end of an epoch, named by its steps.

What a training's losses are measured against is the larger of two: the loss of its very first step, and
that of a student which gives all classes the same logit, on the first batch of the epoch. The second
follows every weight and temperature that changes while it trains (the warm-up of DKD, the learned
temperature of CTKD), and keeps a fine-tuning whose losses begin near 0 from being taken for an explosion
when they rise. A run of which 50 steps are 20 times worse than both has lost what it knew.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kdcache_stores import TrainingError

WINDOW, FACTOR = 50, 20.0


class LossWatch:
    """The losses of a training, on its device; looked at once per epoch.

    Its state goes into the checkpoint, so that a resumed training stops where an uninterrupted one does.

    Args:
        steps: of the whole training; one of fewer than 50 is measured by the mean of them all.
        device: of the losses.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.window = min(WINDOW, steps)
        self.first = torch.tensor(torch.nan)
        self.before = torch.empty(0)
        self.ignorant = torch.full((), torch.nan, device=device)
        self.losses = torch.empty(0, device=device)

    def begin(self, ignorant: Tensor, steps: int) -> None:
        """An epoch begins.

        Args:
            ignorant: 0-d, the loss on its first batch of a student with equal logits.
            steps: of the epoch.
        """
        self.ignorant = ignorant
        self.losses = torch.empty(steps, device=ignorant.device)

    def add(self, index: int, loss: Tensor) -> None:
        """Note the loss (0-d) of a step of the epoch, counted from 0."""
        self.losses[index] = loss

    def end(self, epoch: int, where: Path) -> None:
        """The epoch, counted from 0, is over: raise if its losses are no losses of a sound training.

        Raises:
            TrainingError: one is not finite, or the mean of 50 in a row exceeds 20 times what it is
                measured against.
        """
        losses, ignorant = self.losses.cpu(), self.ignorant.cpu()
        bad = losses.isfinite().logical_not().nonzero()
        if len(bad):
            step = int(bad[0])
            raise TrainingError(
                f"the loss became {losses[step].item()} in epoch {epoch + 1} of {where}, first at "
                f"step {step + 1}. {_last_good(epoch)}; use a lower --lr, lower loss weights, or "
                "--precision float32."
            )
        if epoch == 0:
            self.first = losses[0].clone()
        known = torch.cat([self.before, losses])
        self.before = known[max(len(known) - self.window + 1, 0) :].clone()
        if len(known) < self.window:
            return
        means = known.double().unfold(0, self.window, 1).mean(1)
        over = (means > FACTOR * torch.fmax(self.first, ignorant).double()).nonzero()
        if not len(over):
            return
        start = int(over[0])
        last = start + self.window - (len(known) - len(losses))
        raise TrainingError(
            f"the loss exploded in epoch {epoch + 1} of {where}: its mean over the {self.window} steps "
            f"that end with step {last} is {means[start].item():.4g}. The run began with "
            f"{self.first.item():.4g}, and a student that gives all classes the same logit has "
            f"{ignorant.item():.4g}. {_last_good(epoch)}; begin anew in another --out with a lower "
            "--lr, a longer --warmup-epochs, --clip 1 or lower loss weights."
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What the next epochs need of those before."""
        return {"first": self.first, "before": self.before}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from the state of a checkpoint."""
        self.first, self.before = state["first"].cpu(), state["before"].cpu()


def _last_good(epoch: int) -> str:
    return f"The last good checkpoint {f'is of epoch {epoch}' if epoch else 'is none yet'}"
