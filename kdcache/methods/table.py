"""The table of methods. A new method is a row here, a file with its loss, and a test of its formula."""

from __future__ import annotations

from collections.abc import Iterable

from kdcache.methods.record import Defaults, Method, Option

TWO_TEMPERATURES = ("temperature", "teacher_temperature", "student_temperature")

_ROWS = (
    Method(
        name="ce",
        title="cross-entropy with the labels, without a teacher",
        source="the baseline",
        loss=None,
        teacher_fields=(),
        needs_labels=True,
        plain=Defaults(ce_weight=1.0, kd_weight=0.0),
    ),
    Method(
        name="kd",
        title="T²·KL of the two softmaxes at one temperature",
        source="Hinton et al. 2015",
        loss="kdcache.methods.logits.kd:KD",
        plain_kl=True,
        takes=(*TWO_TEMPERATURES, "ablation", "reverse"),
        plain=Defaults(ce_weight=0.1, kd_weight=0.9, temperature=4.0),
        standardized=Defaults(ce_weight=0.1, kd_weight=9.0, temperature=2.0),
        options=(
            Option(
                "target",
                "soft",
                "soft, or hard: cross-entropy with the teacher's largest class (DeiT, weights .5 and .5)",
                choices=("soft", "hard"),
            ),
        ),
        variants=((("target", "hard"), Defaults(ce_weight=0.5, kd_weight=0.5)),),
    ),
    Method(
        name="dkd",
        title="target and non-target parts of KD with weights of their own",
        source="Zhao et al., CVPR 2022",
        loss="kdcache.methods.logits.dkd:DKD",
        needs_labels=True,
        takes=TWO_TEMPERATURES,
        plain=Defaults(ce_weight=1.0, kd_weight=1.0, temperature=4.0),
        standardized=Defaults(ce_weight=1.0, kd_weight=9.0, temperature=2.0),
        options=(
            Option("alpha", 1.0, "weight of the target part; 0 leaves it out", least=0),
            Option("beta", 8.0, "weight of the non-target part; 0 leaves it out", least=0),
            Option("warmup", 20, "epochs over which the term grows to its weight", least=0),
        ),
    ),
    Method(
        name="mlkd",
        title="instance, batch and class terms at five temperatures, on pairs of views",
        source="Jin et al., CVPR 2023",
        loss="kdcache.methods.logits.mlkd:MLKD",
        pairs=True,
        whole_batch=True,
        takes=("temperature",),
        plain=Defaults(ce_weight=0.1, kd_weight=0.9, temperature=4.0),
        standardized=Defaults(ce_weight=0.1, kd_weight=9.0, temperature=2.0),
        options=(
            Option(
                "variant",
                "as-coded",
                "as-coded (the published code) or as-described (the paper)",
                choices=("as-coded", "as-described"),
            ),
        ),
    ),
    Method(
        name="ctkd",
        title="KD at a temperature that is trained against the student",
        source="Li et al., AAAI 2023",
        loss="kdcache.methods.logits.ctkd:CTKD",
        takes=("ablation", "reverse"),
        plain=Defaults(ce_weight=0.1, kd_weight=0.9),
        standardized=Defaults(ce_weight=0.1, kd_weight=9.0),
        options=(
            Option("start", 1.0, "smallest temperature", above=0, standardized=2.0),
            Option("end", 20.0, "range of the temperatures above it", above=0),
            Option("ramp", 10, "epochs until the temperature is trained in full", least=0),
        ),
    ),
    Method(
        name="dist",
        title="correlation of probabilities over classes, and over the samples of a batch",
        source="Huang et al., NeurIPS 2022",
        loss="kdcache.methods.logits.dist:DIST",
        whole_batch=True,
        takes=("temperature",),
        plain=Defaults(ce_weight=1.0, kd_weight=1.0, temperature=4.0),
        options=(
            Option("beta", 2.0, "weight of the correlation over classes", least=0),
            Option("gamma", 2.0, "weight of the correlation over samples", least=0),
        ),
    ),
    Method(
        name="rkd",
        title="distances and angles among the samples of a batch",
        source="Park et al., CVPR 2019",
        loss="kdcache.methods.features.rkd:RKD",
        teacher_fields=("pooled",),
        student_fields=("pooled",),
        whole_batch=True,
        plain=Defaults(ce_weight=1.0, kd_weight=1.0),
        options=(
            Option("distance", 25.0, "weight of the distances", least=0),
            Option("angle", 50.0, "weight of the angles", least=0),
        ),
    ),
    Method(
        name="at",
        title="attention maps of the stages, means over channels of their squares",
        source="Zagoruyko and Komodakis, ICLR 2017",
        loss="kdcache.methods.features.at:AT",
        teacher_fields=("attention",),
        student_fields=("stages",),
        plain=Defaults(ce_weight=1.0, kd_weight=1000.0),
    ),
    Method(
        name="simkd",
        title="the last map, projected to the teacher's and classified by the teacher's head",
        source="Chen et al., CVPR 2022",
        loss="kdcache.methods.features.simkd:SimKD",
        teacher_fields=("last",),
        student_fields=("last",),
        student="kdcache.methods.features.simkd:with_projector",
        needs_head=True,
        one_teacher=True,
        plain=Defaults(ce_weight=0.0, kd_weight=1.0),
        options=(
            Option(
                "factor", 2, "how much narrower the projector is than the teacher's map", least=1
            ),
        ),
    ),
    Method(
        name="cat-kd",
        title="class activation maps, averaged to a few places",
        source="Guo et al., CVPR 2023",
        loss="kdcache.methods.features.cat_kd:CATKD",
        teacher_fields=("last",),
        student_fields=("cam",),
        student="kdcache.methods.features.cat_kd:without_bias",
        needs_head=True,
        one_teacher=True,
        plain=Defaults(ce_weight=1.0, kd_weight=15.0),
        options=(
            Option("size", 2, "r of the r x r places that maps are averaged to", least=1),
            Option(
                "normalise", "none", "l2: unit length of each class's map", choices=("none", "l2")
            ),
        ),
    ),
    Method(
        name="crd",
        title="embeddings of a sample among those of other classes, by two memory banks",
        source="Tian et al., ICLR 2020",
        loss="kdcache.methods.features.crd:CRD",
        teacher_fields=("pooled",),
        student_fields=("pooled",),
        needs_labels=True,
        one_teacher=True,
        plain=Defaults(ce_weight=1.0, kd_weight=0.8),
        options=(
            Option("negatives", 16384, "K, negatives of each sample", least=1),
            Option("temperature", 0.07, "T of the contrast", above=0),
            Option("momentum", 0.5, "of the memory banks", least=0),
            Option("dim", 128, "dimension of the embeddings", least=1),
        ),
    ),
    Method(
        name="fitnet",
        title="one stage of the student, by a regressor, is the teacher's",
        source="Romero et al., ICLR 2015",
        loss="kdcache.methods.features.fitnet:FitNet",
        teacher_fields=("stages",),
        student_fields=("stages",),
        one_teacher=True,
        plain=Defaults(ce_weight=1.0, kd_weight=100.0),
        options=(Option("stage", 2, "which stage is compared, the stem being 0", least=1),),
    ),
    Method(
        name="ofd",
        title="the stages before their ReLU, with a margin; the teacher in the loop",
        source="Heo et al., ICCV 2019",
        loss="kdcache.methods.features.ofd:OFD",
        teacher_fields=("stages:pre",),
        student_fields=("stages:pre",),
        one_teacher=True,
        online=True,
        batch_statistics=("statistics", "batch"),
        plain=Defaults(ce_weight=1.0, kd_weight=1e-3),
        options=(
            Option(
                "statistics",
                "running",
                "of the teacher's batch norms: running (as it is evaluated), or batch (as published)",
                choices=("running", "batch"),
            ),
        ),
    ),
    Method(
        name="reviewkd",
        title="every stage of the teacher from all deeper ones of the student, fused",
        source="Chen et al., CVPR 2021",
        loss="kdcache.methods.features.reviewkd:ReviewKD",
        teacher_fields=("stages:pre", "pooled"),
        student_fields=("stages", "pooled"),
        student_variants=((("relu", "before"), ("stages:pre", "pooled")),),
        one_teacher=True,
        plain=Defaults(ce_weight=1.0, kd_weight=5.0),
        options=(
            Option("warmup", 20, "epochs over which the term grows to its weight", least=0),
            Option(
                "middle", 512, "most channels of the maps that are fused; ImageNet 256", least=1
            ),
            Option(
                "relu",
                "after",
                "the student's stages are read after or before their ReLU; ImageNet before",
                choices=("after", "before"),
            ),
        ),
    ),
    Method(
        name="ps-kd",
        title="labels mixed with the student's own predictions of the last epoch",
        source="Kim et al., ICCV 2021",
        loss="kdcache.methods.logits.ps_kd:PSKD",
        teacher_fields=(),
        needs_labels=True,
        plain=Defaults(ce_weight=0.0, kd_weight=1.0),
        options=(Option("alpha", 0.8, "share of the predictions in the last epoch", least=0),),
    ),
    Method(
        name="ban",
        title="cross-entropy with the labels and with the teacher's probabilities, in equal parts",
        source="Furlanello et al., ICML 2018",
        loss="kdcache.methods.logits.ban:BAN",
        plain_kl=True,
        takes=("temperature",),
        plain=Defaults(ce_weight=1.0, kd_weight=1.0, temperature=1.0),
    ),
    Method(
        name="dml",
        title="students side by side, each taught by the others; two of them at least, no teacher",
        source="Zhang et al., CVPR 2018",
        loss="kdcache.methods.mutual.dml:DML",
        teacher_fields=(),
        peers=True,
        plain=Defaults(ce_weight=1.0, kd_weight=1.0),
    ),
    Method(
        name="byot",
        title="the deepest classifier teaches exits after the shallower stages; no teacher",
        source="Zhang et al., ICCV 2019",
        loss="kdcache.methods.mutual.byot:BYOT",
        teacher_fields=(),
        student_fields=("stages", "pooled"),
        needs_labels=True,
        plain=Defaults(ce_weight=0.9, kd_weight=1.0),
        options=(
            Option("alpha", 0.1, "share of the deepest classifier in what an exit learns", least=0),
            Option("temperature", 3.0, "T of that share", above=0),
            Option("hint", 1e-6, "weight of the squared distance of features", least=0),
        ),
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ROWS}


def names_of(methods: Iterable[Method]) -> str:
    """Some methods in a sentence: "kd, dkd and mlkd"."""
    *first, last = [method.name for method in methods]
    return f"{', '.join(first)} and {last}" if first else last


def without_teacher(name: str) -> bool:
    """Whether this is a method of kdcache, by its name in a run, that trains from labels alone."""
    return name in METHODS and METHODS[name].loss is None
