"""Every method with and without logit standardization, against labels alone.

    python evidence/methods.py --dataset arrays:cifar100.npz --teacher resnet20@resnet20.pth \
        --normalisation cifar100 --folder study --out evidence/methods.json

Weights and temperatures are the published ones; warm-ups that the papers give in epochs of 240 are
shortened with the training. MLKD sees two views of each image, a weak and a strong one, so twice as many
images as the others.
"""

from __future__ import annotations

from dataclasses import replace

from study import Arm, Study

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.table import METHODS


def objectives(epochs: int) -> dict[str, ObjectiveConfig]:
    """The objectives of the studies, for a training of so many epochs."""
    ramps = {"dkd": {"warmup": max(1, round(20 * epochs / 240))},
             "ctkd": {"ramp": max(1, round(10 * epochs / 240))}}  # fmt: skip
    configs = {}
    for name, method in METHODS.items():
        if method.teacher_fields not in ((), ("logits",)):
            continue  # those have a study of their own, features.py
        configs[name] = ObjectiveConfig(method=name, options=ramps.get(name, {}))
        if method.standardized:
            configs[f"{name}+std"] = replace(configs[name], standardize="unbiased")
    return configs


def main() -> None:
    """Train every student and write one JSON file."""
    study = Study(__doc__)
    store, pairs = study.store(), study.store("weak+strong", views=2 * study.args.views)
    arms = {}
    for name, objective in objectives(study.args.epochs).items():
        options = (
            {"stores": (pairs,)}
            if objective.record.pairs
            else {"stores": (store,), "views": study.args.views}
        )
        arms[name] = Arm(
            objective, options, control="ce" if objective.record.needs_teacher else None
        )
    results = study.compare(arms)
    study.report(results)


if __name__ == "__main__":
    main()
