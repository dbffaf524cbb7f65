"""Objectives: what a student minimises, each a plain function of logits.

    from kdcache.methods import dkd
    loss = ce(v, labels) + dkd(v, z, labels, beta=8.0)      # v, z: (B, K) logits

`Objective` is all of it behind one configuration: method, weights, noise, ensemble, ablation.
"""

from collections.abc import Callable

from torch import Tensor

from kdcache.methods.ablations import ablate, permutation
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.curriculum import ctkd, learned_temperature, reversal
from kdcache.methods.ensembles import Ensemble, confidence_weights, entropy_weights
from kdcache.methods.losses import ce, dkd, dkd_warmup, kd, tckd_nckd
from kdcache.methods.multilevel import mlkd
from kdcache.methods.noise import Noise
from kdcache.methods.objective import Objective
from kdcache.methods.scaling import divergence, scaled, standardize
from kdcache.methods.step import Step

METHODS: dict[str, Callable[..., Tensor]] = {
    "ce": ce,
    "kd": kd,
    "dkd": dkd,
    "mlkd": mlkd,
    "ctkd": ctkd,
}

__all__ = [
    "METHODS",
    "Ensemble",
    "Noise",
    "Objective",
    "ObjectiveConfig",
    "Step",
    "ablate",
    "ce",
    "confidence_weights",
    "ctkd",
    "divergence",
    "dkd",
    "dkd_warmup",
    "entropy_weights",
    "kd",
    "learned_temperature",
    "mlkd",
    "permutation",
    "reversal",
    "scaled",
    "standardize",
    "tckd_nckd",
]
