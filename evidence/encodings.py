"""Does an encoding change what a student learns? The same logits in five encodings, three methods.

    python evidence/encodings.py --dataset arrays:cifar100.npz --teacher resnet20@resnet20.pth \
        --normalisation cifar100 --folder study --out evidence/encodings.json
"""

from __future__ import annotations

from methods import objectives
from study import Arm, Study

from kdcache_stores import describe, open_store

ENCODINGS = ("float16", "compact:2.5e-5", "compact:3e-4", "quantized", "topk:10")


def main() -> None:
    """Train every student and write one JSON file."""
    study = Study(__doc__)
    stores = {encoding: study.store(encoding=encoding) for encoding in ENCODINGS}
    methods = objectives(study.args.epochs)
    arms = {
        f"{method}, {encoding}": Arm(
            methods[method],
            # All of its views, in so many words: the name of the run of the views study.
            {"stores": (store,), "views": study.args.views},
            control=f"{method}, float16" if encoding != "float16" else None,
        )
        for method in ("kd+std", "dkd", "kd")
        for encoding, store in stores.items()
        if method == "kd+std" or encoding != "quantized"
    }
    fields = {}
    for encoding, store in stores.items():
        with open_store(store) as opened:
            info = describe(opened)["fields"]["logits"]
        fields[encoding] = {
            "bytes_per_view": round(info["bytes_per_row"], 2),
            "kl_z": info["fidelity"]["kl_z_mean"],
        }
    study.report(study.compare(arms), stores=fields)


if __name__ == "__main__":
    main()
