"""Cached equals online in accuracy: all views from a store against the teacher in the loop on fresh crops.

    python evidence/fresh_crops.py --dataset fashion-mnist --data-root DATA --folder fashion \
        --out evidence/fresh_crops.json

Stated beforehand: cached is not inferior if the whole 95% interval of the difference (cached - online, test
top-1 after the last epoch, paired by seed) lies above -0.3 points. Both draw every sample's crop and flip
afresh in every epoch, from the same 162 that there are; they differ in which ones they draw.
"""

from __future__ import annotations

from methods import objectives
from study import Arm, Study

MARGIN = 0.3


def main() -> None:
    """Train every student and write one JSON file."""
    study = Study(__doc__, dataset="fashion-mnist", seeds=16, test_samples=10000)
    teacher = study.args.teacher or study.teacher("resnet14", 20000, 5)
    objective = objectives(study.args.epochs)["kd+std"]
    arms = {
        "cached, all 162 views": Arm(
            objective,
            {"stores": (study.store("exhaustive", teacher=teacher),)},
            control="online, fresh crops",
        ),
        "online, fresh crops": Arm(objective, {"online": (teacher,), "schedule": "epoch"}),
    }
    results = study.compare(arms)
    difference = results["cached, all 162 views"]["last_minus_control"]
    verdict = difference["mean"] - difference["ci95"] > -MARGIN
    study.report(results, margin=MARGIN, not_inferior=verdict)


if __name__ == "__main__":
    main()
