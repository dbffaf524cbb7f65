"""Methods: what a student minimises, each a record, a plain function of logits, and a loss made of it.

    from kdcache.methods import ce, dkd
    loss = ce(v, labels) + dkd(v, z, labels, beta=8.0)      # v, z: (B, K) logits

`Objective` is all of it behind one configuration: method, weights, noise, ensemble, ablation. `METHODS` is
the table of all methods. The names below are imported when they are first used: the table needs no torch.
"""

from typing import TYPE_CHECKING

from kdcache.lazy import lazily

if TYPE_CHECKING:
    from kdcache.methods.ablations import ablate, permutation
    from kdcache.methods.config import ObjectiveConfig
    from kdcache.methods.ensembles import Ensemble, confidence_weights, entropy_weights
    from kdcache.methods.logits.ce import ce
    from kdcache.methods.logits.ctkd import ctkd, learned_temperature, reversal
    from kdcache.methods.logits.dkd import dkd, dkd_warmup, tckd_nckd
    from kdcache.methods.logits.kd import kd
    from kdcache.methods.logits.mlkd import mlkd
    from kdcache.methods.loss import Loss
    from kdcache.methods.noise import Noise
    from kdcache.methods.objective import Objective
    from kdcache.methods.record import Method
    from kdcache.methods.scaling import divergence, scaled, standardize
    from kdcache.methods.step import Step
    from kdcache.methods.table import METHODS

__getattr__, __dir__ = lazily(
    __name__,
    {
        "kdcache.methods.ablations": ("ablate", "permutation"),
        "kdcache.methods.config": ("ObjectiveConfig",),
        "kdcache.methods.ensembles": ("Ensemble", "confidence_weights", "entropy_weights"),
        "kdcache.methods.logits.ce": ("ce",),
        "kdcache.methods.logits.ctkd": ("ctkd", "learned_temperature", "reversal"),
        "kdcache.methods.logits.dkd": ("dkd", "dkd_warmup", "tckd_nckd"),
        "kdcache.methods.logits.kd": ("kd",),
        "kdcache.methods.logits.mlkd": ("mlkd",),
        "kdcache.methods.loss": ("Loss",),
        "kdcache.methods.noise": ("Noise",),
        "kdcache.methods.objective": ("Objective",),
        "kdcache.methods.record": ("Method",),
        "kdcache.methods.scaling": ("divergence", "scaled", "standardize"),
        "kdcache.methods.step": ("Step",),
        "kdcache.methods.table": ("METHODS",),
    },
)

__all__ = [
    "METHODS",
    "Ensemble",
    "Loss",
    "Method",
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
