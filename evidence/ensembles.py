"""One, two and four teachers on one plan, by rule of combination.

    python evidence/ensembles.py --dataset fashion-mnist --data-root DATA --folder fashion \
        --out evidence/ensembles.json

The teachers are the same network trained for the study from four seeds; each is dumped once, and every
student reads as many of the stores as it has teachers.
"""

from __future__ import annotations

from dataclasses import replace

from methods import objectives
from study import Arm, Study

from kdcache.runs import read_summary

RULES = ("mean-logits", "mean-zscores", "mean-probs", "mean-losses", "random")


def main() -> None:
    """Train every student and write one JSON file."""
    study = Study(__doc__, samples=2000, views=8, dataset="fashion-mnist")
    teachers = [study.teacher("resnet14", 20000, 5, seed) for seed in range(4)]
    stores = tuple(study.store(teacher=teacher) for teacher in teachers)
    methods = objectives(study.args.epochs)
    arms = {
        "ce": Arm(methods["ce"], {"stores": stores[:1]}, control="1 teacher"),
        "1 teacher": Arm(methods["kd+std"], {"stores": stores[:1]}),
        "1 teacher, plain KD": Arm(methods["kd"], {"stores": stores[:1]}),
        "2 teachers, mean-logits": Arm(
            methods["kd+std"], {"stores": stores[:2]}, control="1 teacher"
        ),
    }
    for rule in RULES:
        # A mean of probabilities leaves no logits to standardize.
        plain = rule == "mean-probs"
        objective = replace(methods["kd" if plain else "kd+std"], combine=rule)
        control = "1 teacher, plain KD" if plain else "1 teacher"
        arms[f"4 teachers, {rule}"] = Arm(objective, {"stores": stores}, control=control)
    results = study.compare(arms)
    top1 = [round(100 * read_summary(path)["last_top1"], 2) for path in teachers]
    study.report(results, teachers_top1=top1)


if __name__ == "__main__":
    main()
