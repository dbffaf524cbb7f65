"""Which part of the teacher's targets helps? Students of cached logits with a part taken away.

    python evidence/knowledge.py --dataset arrays:cifar100.npz --teacher resnet20@resnet20.pth \
        --normalisation cifar100 --folder study --out evidence/knowledge.json

The ablations are those of `kdcache.methods.ablate`, of plain KD at T = 4.
"""

from __future__ import annotations

from dataclasses import replace

from methods import objectives
from study import Arm, Study

from kdcache.methods.ablations import ABLATIONS


def main() -> None:
    """Train every student and write one JSON file."""
    study = Study(__doc__)
    options = {"stores": (study.store(),), "views": study.args.views}
    methods = objectives(study.args.epochs)
    arms = {"ce": Arm(methods["ce"], options, control="full")}
    for ablation in ABLATIONS:
        objective = replace(methods["kd"], ablation=ablation)
        arms[ablation] = Arm(objective, options, control=None if ablation == "full" else "full")
    study.report(study.compare(arms))


if __name__ == "__main__":
    main()
