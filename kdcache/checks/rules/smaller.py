"""Rules about students that were made smaller: by int8, and by pruning."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kdcache.checks.case import Case
from kdcache.checks.finding import Finding, percent

#: Rounding moves predictions near a tie to either side. A loss is more than that where the samples that float
#: alone has right outnumber those that int8 alone has right by so many standard deviations of a fair coin,
#: and top-1 falls by at least `LOSS`. Measured on 10,000 test images of CIFAR-100: a resnet20 calibrated on 512
#: samples lost 72 and won 71, calibrated on one it lost 1,135 and won 382.
DEVIATIONS, LOSS = 3.0, 0.005

#: The distillation term at the end beside that of the last epoch before anything went. Measured: a resnet8
#: with its teacher's weights on digits, 8 epochs, the first two of pruning: 0.9 where a quarter of the channels
#: went (top-1 95.6%), 1.4 where half did (95.3%), 3.0 at three quarters (93.1%), 7.6 at seven eighths (87.5%).
KNEE = 2.0


def int8_loss(lost: int, won: int, samples: int, calibration: int) -> Iterator[Finding]:
    """An int8 network that predicts worse than rounding explains.

    Args:
        lost: samples that the float network alone has right.
        won: samples that the int8 network alone has right.
        samples: of all.
        calibration: training samples that the ranges were measured on.
    """
    loss = (lost - won) / samples
    if loss < LOSS or lost - won <= DEVIATIONS * math.sqrt(lost + won):
        return
    yield Finding(
        "int8-loss",
        f"The int8 network loses {percent(loss)} of top-1, right on {won} samples that float has wrong and "
        f"wrong on {lost} that float has right: rounding moves as many either way.",
        f"a --calibration of more samples than {calibration}; if that does not help, export in float32.",
    )


def pruned_too_far(case: Case) -> Iterator[Finding]:
    """A pruned student that does not come back to where it was, though it was trained before.

    Nothing is said of one that was not: its first epoch is no measure.
    """
    fit, prune = case.fit, case.prune
    if fit is None or prune is None or not prune.trained or fit.epochs <= prune.epochs:
        return
    before, after = fit.kd[0], fit.kd[-1]
    if after <= KNEE * before:
        return
    recovery = fit.epochs - prune.epochs
    yield Finding(
        "pruned-too-far",
        f"After {recovery} epochs of recovery the student is {after / before:.1f} times as far from its "
        f"targets as before {percent(prune.ratio)} of it went.",
        "a smaller ratio of --prune, or more epochs of recovery.",
    )
