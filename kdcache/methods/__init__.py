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

_HOMES = {
    "Ensemble": "kdcache.methods.ensembles",
    "Loss": "kdcache.methods.loss",
    "METHODS": "kdcache.methods.table",
    "Method": "kdcache.methods.record",
    "Noise": "kdcache.methods.noise",
    "Objective": "kdcache.methods.objective",
    "ObjectiveConfig": "kdcache.methods.config",
    "Step": "kdcache.methods.step",
    "ablate": "kdcache.methods.ablations",
    "ce": "kdcache.methods.logits.ce",
    "confidence_weights": "kdcache.methods.ensembles",
    "ctkd": "kdcache.methods.logits.ctkd",
    "divergence": "kdcache.methods.scaling",
    "dkd": "kdcache.methods.logits.dkd",
    "dkd_warmup": "kdcache.methods.logits.dkd",
    "entropy_weights": "kdcache.methods.ensembles",
    "kd": "kdcache.methods.logits.kd",
    "learned_temperature": "kdcache.methods.logits.ctkd",
    "mlkd": "kdcache.methods.logits.mlkd",
    "permutation": "kdcache.methods.ablations",
    "reversal": "kdcache.methods.logits.ctkd",
    "scaled": "kdcache.methods.scaling",
    "standardize": "kdcache.methods.scaling",
    "tckd_nckd": "kdcache.methods.logits.dkd",
}

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

__getattr__, __dir__ = lazily(__name__, _HOMES)
