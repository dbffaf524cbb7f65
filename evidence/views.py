"""How many views? Accuracy of a student against the number of stored views.

    python evidence/views.py --dataset arrays:cifar100.npz --teacher resnet20@resnet20.pth \
        --normalisation cifar100 --folder study --out evidence/views.json

All numbers of views come from the same store (`--views`), so runs differ in nothing else. The schedule
`random` draws each sample's view afresh every epoch; `exhaustive` is the store of all views of
pad-crop-flip, which makes it online distillation with fresh random crops.
"""

from __future__ import annotations

from study import Arm, Study

from kdcache.methods.config import ObjectiveConfig

COUNTS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    """Train every student and write one JSON file."""
    study = Study(__doc__)
    some, every = study.store(), study.store("exhaustive")
    objective = ObjectiveConfig(method="kd", standardize="unbiased")
    counts = [count for count in COUNTS if count <= study.args.views]
    arms = {
        f"{count} view{'s' * (count > 1)}": Arm(
            objective, {"stores": (some,), "views": count}, control="exhaustive"
        )
        for count in counts
    }
    arms["exhaustive"] = Arm(objective, {"stores": (every,)})
    study.report(study.compare(arms), bytes_per_view=study.bytes_per_view(some))


if __name__ == "__main__":
    main()
