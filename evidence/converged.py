"""Methods, encodings and views on all of CIFAR-100, trained until the student has converged.

    python evidence/converged.py --dataset arrays:cifar100.npz --teacher resnet20@resnet20.pth \
        --normalisation cifar100 --folder study --out evidence/converged.json

One student of 30 epochs takes a resnet8 about eleven minutes of one core. The arms stand in the order of
their worth, the seeds outside them: a study that is stopped has whole rows of its first seeds, --seeds 1
asks for the first rows only, and a repeated call trains what is missing. Margin for the encodings, stated
before any of them ran: 0.3 points of top-1 below float16, by the lower end of the 95% interval.
"""

from __future__ import annotations

from dataclasses import replace

from methods import objectives
from study import Arm, Study

from kdcache.training.optim import Optimization

METHODS = ("ce", "kd+std", "kd", "dkd+std", "dkd", "dist")
ENCODINGS = ("compact:2.5e-5", "topk:10", "compact:3e-4", "topk:50")


class Converged(Study):
    """The study's optimization: one cycle over the learning rate, as short trainings converge best."""

    def optimization(self, epochs: int | None = None) -> Optimization:
        """SGD with Nesterov momentum and one cycle."""
        whole = super().optimization(epochs)
        return replace(whole, lr_schedule="one-cycle", warmup_epochs=0, nesterov=True)


def main() -> None:
    """Train every student and write one JSON file."""
    study = Converged(
        __doc__, samples=50000, test_samples=10000, epochs=30, batch_size=128, lr=0.1, views=8, seeds=3
    )  # fmt: skip
    configs = objectives(study.args.epochs)
    store = study.store(encoding="float16")
    arms = {
        name: Arm(
            configs[name],
            {"stores": (store,), "views": study.args.views},
            control=None if name == "ce" else "ce" if name == "kd" else "kd",
        )
        for name in METHODS
    }
    bytes_per_view = {"float16": study.bytes_per_view(store)}
    wanted = [word for word in study.args.only.split(";") if word]
    for encoding in ENCODINGS:
        if wanted and f"kd+std, {encoding}" not in wanted:
            continue  # its dump takes minutes
        encoded = study.store(encoding=encoding)
        bytes_per_view[encoding] = study.bytes_per_view(encoded)
        arms[f"kd+std, {encoding}"] = Arm(
            configs["kd+std"], {"stores": (encoded,), "views": study.args.views}, control="kd+std"
        )
    study.report(study.compare(arms), bytes_per_view=bytes_per_view)


if __name__ == "__main__":
    main()
