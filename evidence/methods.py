"""Every method with and without logit standardization, against labels alone.

    python evidence/methods.py --dataset arrays:cifar100.npz --teacher resnet20@resnet20.pth \
        --normalisation cifar100 --folder study --out evidence/methods.json

Weights and temperatures are the published ones; warm-ups that the papers give in epochs of 240 are
shortened with the training. MLKD sees two views of each image, a weak and a strong one, so twice as many
images as the others.
"""

from __future__ import annotations

from study import Arm, Study

from kdcache.methods import ObjectiveConfig


def objectives(epochs: int) -> dict[str, ObjectiveConfig]:
    """The objectives of the studies, for a training of so many epochs."""
    ramps = {"dkd": {"dkd_warmup": max(1, round(20 * epochs / 240))},
             "ctkd": {"ctkd_ramp": max(1, round(10 * epochs / 240))}}  # fmt: skip
    found = {}
    for method in ("kd", "dkd", "ctkd", "mlkd"):
        plain = ramps.get(method, {})
        found[method] = ObjectiveConfig(method=method, **plain)
        found[f"{method}+std"] = ObjectiveConfig(method=method, standardize="unbiased", **plain)
    return {"ce": ObjectiveConfig(method="ce")} | found


def main() -> None:
    """Train every student and write one JSON file."""
    study = Study(__doc__)
    store, pairs = study.store(), study.store("weak+strong", views=2 * study.args.views)
    arms = {}
    for name, objective in objectives(study.args.epochs).items():
        options = (
            {"stores": (pairs,)}
            if name.startswith("mlkd")
            else {"stores": (store,), "views": study.args.views}
        )
        arms[name] = Arm(objective, options, control="ce" if name != "ce" else None)
    found = study.compare(arms)
    study.report(found)


if __name__ == "__main__":
    main()
