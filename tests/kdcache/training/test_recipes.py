"""Recipes: the published numbers, written down a second time, and flags that win over them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.noise import Noise
from kdcache.methods.table import METHODS
from kdcache.models.zoo import MODELS
from kdcache.recipes.published import datasets, load, names, resolve
from kdcache.runs import read_metrics
from kdcache.training.optim import Optimization
from kdcache_stores import UnknownName
from tests.conftest import Result, Trained

# Logit standardization (Sun et al., CVPR 2024), released logs: tau, weight of KD and of DKD, beta.
# teacher, student: (KD+LS tau, lambda), (DKD+LS tau, lambda, beta)
STANDARDIZED = {
    ("ResNet50", "MobileNetV2"): ((3, 1), (2, 15, 2)),
    ("resnet110", "resnet20"): ((4, 12), (2, 15, 2)),
    ("resnet110", "resnet32"): ((2, 9), (2, 15, 2)),
    ("resnet32x4", "ShuffleV2"): ((2, 9), (2, 9, 8)),
    ("resnet32x4", "resnet8x4"): ((2, 9), (2, 9, 8)),
    ("resnet32x4", "wrn_16_2"): ((3, 9), (2, 9, 2)),
    ("resnet32x4", "wrn_40_2"): ((3, 9), (2, 9, 8)),
    ("resnet56", "resnet20"): ((2, 9), (3, 18, 2)),
    ("vgg13", "MobileNetV2"): ((3, 9), (3, 9, 2)),
    ("vgg13", "vgg8"): ((3, 9), (2, 15, 2)),
    ("wrn_40_2", "MobileNetV2"): ((3, 9), (2, 15, 2)),
    ("wrn_40_2", "resnet8x4"): ((2, 9), (2, 18, 2)),
    ("wrn_40_2", "wrn_16_2"): ((2, 9), (2, 12, 2)),
    ("wrn_40_2", "wrn_40_1"): ((2, 9), (2, 12, 2)),
}
# DKD (Zhao et al., CVPR 2022): beta.
BETA = {
    ("resnet56", "resnet20"): 2, ("resnet110", "resnet32"): 2, ("resnet32x4", "resnet8x4"): 8,
    ("wrn_40_2", "wrn_16_2"): 6, ("wrn_40_2", "wrn_40_1"): 6, ("vgg13", "vgg8"): 6,
    ("vgg13", "MobileNetV2"): 6, ("ResNet50", "MobileNetV2"): 8, ("resnet32x4", "ShuffleV1"): 8,
    ("resnet32x4", "ShuffleV2"): 8, ("wrn_40_2", "ShuffleV1"): 8,
}  # fmt: skip
# MLKD (Jin et al., CVPR 2023): epochs, lr. With standardized logits: epochs, lambda, lr.
MULTI = {
    ("resnet32x4", "resnet8x4"): (240, 0.025), ("ResNet50", "MobileNetV2"): (480, 0.01),
    ("vgg13", "MobileNetV2"): (480, 0.01), ("wrn_40_2", "ShuffleV1"): (480, 0.01),
    ("resnet32x4", "ShuffleV1"): (960, 0.01), ("resnet32x4", "ShuffleV2"): (960, 0.01),
}  # fmt: skip
MULTI_STANDARDIZED = {
    ("resnet32x4", "resnet8x4"): (480, 9, 0.025), ("resnet32x4", "ShuffleV2"): (960, 6, 0.01),
    ("vgg13", "MobileNetV2"): (480, 6, 0.01), ("vgg13", "vgg8"): (480, 6, 0.01),
    ("wrn_40_2", "MobileNetV2"): (480, 9, 0.005), ("ResNet50", "MobileNetV2"): (480, 9, 0.01),
}  # fmt: skip


# CAT-KD (Guo et al., CVPR 2023): weight, size, normalised. ReviewKD (Chen et al., CVPR 2021): weight.
CAT = {
    ("resnet110", "resnet32"): (1.8, 2, "none"), ("resnet32x4", "resnet8x4"): (15, 2, "none"),
    ("resnet32x4", "ShuffleV1"): (600, 4, "l2"), ("resnet32x4", "ShuffleV2"): (600, 4, "l2"),
    ("ResNet50", "MobileNetV2"): (40, 2, "l2"), ("resnet56", "resnet20"): (0.7, 2, "none"),
    ("vgg13", "MobileNetV2"): (15, 2, "l2"), ("vgg13", "vgg8"): (4.5, 2, "none"),
    ("wrn_40_2", "ShuffleV1"): (80, 4, "l2"), ("wrn_40_2", "wrn_16_2"): (12, 2, "none"),
    ("wrn_40_2", "wrn_40_1"): (1.5, 2, "none"),
}  # fmt: skip
REVIEW = {
    ("resnet56", "resnet20"): 0.6, ("resnet110", "resnet32"): 1, ("wrn_40_2", "wrn_16_2"): 5,
    ("wrn_40_2", "wrn_40_1"): 5, ("wrn_40_2", "ShuffleV1"): 5, ("resnet32x4", "resnet8x4"): 5,
    ("resnet32x4", "ShuffleV1"): 5, ("resnet32x4", "ShuffleV2"): 8,
}  # fmt: skip


@pytest.mark.parametrize("pair", CAT, ids=">".join)
def test_cat_kd_of_pairs(pair: tuple[str, str]) -> None:
    options = resolve("cifar100/cat-kd", pair[1], pair[0])
    normalise = options.get("cat_kd_normalise", "none")
    assert (options["kd_weight"], options["cat_kd_size"], normalise) == CAT[pair]


@pytest.mark.parametrize("pair", REVIEW, ids=">".join)
def test_reviewkd_of_pairs(pair: tuple[str, str]) -> None:
    options = resolve("cifar100/reviewkd", pair[1], pair[0])
    assert (options["kd_weight"], options["reviewkd_warmup"]) == (REVIEW[pair], 20)


@pytest.mark.parametrize("pair", STANDARDIZED, ids=">".join)
def test_standardized_settings_of_pairs(pair: tuple[str, str]) -> None:
    (tau, weight), (dkd_tau, dkd_weight, beta) = STANDARDIZED[pair]
    kd = resolve("cifar100/kd-ls", pair[1], pair[0])
    assert (kd["temperature"], kd["kd_weight"], kd["ce_weight"]) == (tau, weight, 0.1)
    dkd = resolve("cifar100/dkd-ls", pair[1], pair[0])
    assert (dkd["temperature"], dkd["kd_weight"], dkd["dkd_beta"]) == (dkd_tau, dkd_weight, beta)
    assert (dkd["ce_weight"], dkd["dkd_alpha"]) == (1, 1)


@pytest.mark.parametrize("pair", BETA, ids=">".join)
def test_beta_of_pairs(pair: tuple[str, str]) -> None:
    dkd = resolve("cifar100/dkd", pair[1], pair[0])
    assert (dkd["dkd_beta"], dkd["temperature"], dkd["kd_weight"]) == (BETA[pair], 4, 1)


@pytest.mark.parametrize("pair", MULTI, ids=">".join)
def test_mlkd_of_pairs(pair: tuple[str, str]) -> None:
    mlkd = resolve("cifar100/mlkd", pair[1], pair[0])
    assert (mlkd["epochs"], mlkd["lr"]) == MULTI[pair]
    drops = [round(fraction * mlkd["epochs"]) for fraction in mlkd["milestones"]]
    assert drops == [150, 180, 210]


@pytest.mark.parametrize("pair", MULTI_STANDARDIZED, ids=">".join)
def test_standardized_mlkd_of_pairs(pair: tuple[str, str]) -> None:
    mlkd = resolve("cifar100/mlkd-ls", pair[1], pair[0])
    assert (mlkd["epochs"], mlkd["kd_weight"], mlkd["lr"]) == MULTI_STANDARDIZED[pair]
    drops = [round(fraction * mlkd["epochs"]) for fraction in mlkd["milestones"]]
    assert drops == [150, 180, 210]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("cifar10", (240, 64, 0.05, 5e-4, [150, 180, 210])),
        ("cifar100", (240, 64, 0.05, 5e-4, [150, 180, 210])),
        ("imagenet", (100, 512, 0.2, 1e-4, [30, 60, 90])),
        ("tiny-imagenet", (200, 256, 0.2, 5e-4, [60, 120, 160])),
        ("stl10", (240, 64, 0.05, 5e-4, [150, 180, 210])),
    ],
)
def test_schedules(dataset: str, expected: tuple[Any, ...]) -> None:
    found = resolve(f"{dataset}/kd", "resnet8x4")
    drops = [round(fraction * found["epochs"]) for fraction in found["milestones"]]
    assert (
        found["epochs"],
        found["batch_size"],
        found["lr"],
        found["weight_decay"],
        drops,
    ) == expected
    assert (found["optimizer"], found["momentum"]) == ("sgd", 0.9)
    assert not found.get("nesterov", False)


@pytest.mark.parametrize("student", ["MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_light_students_learn_slower(student: str) -> None:
    assert resolve("cifar100/kd", student)["lr"] == 0.01
    assert resolve("cifar10/kd", student)["lr"] == 0.01


LOGIT_METHODS = {
    "ce", "kd", "kd-ls", "dkd", "dkd-ls", "ctkd", "ctkd-ls", "mlkd", "mlkd-ls", "dist", "tald"
}  # fmt: skip


@pytest.mark.parametrize("dataset", ["cifar10", "stl10", "tiny-imagenet"])
def test_every_logit_method_has_a_recipe_that_says_it_is_ours(dataset: str) -> None:
    ours = {name: what for name, what in names().items() if name.startswith(f"{dataset}/")}
    assert {name.partition("/")[2] for name in ours} == LOGIT_METHODS
    assert all(what.endswith("; not published, ours") for what in ours.values())
    assert set(load("cifar100")["method"]) > LOGIT_METHODS


def test_what_is_published_is_not_called_ours() -> None:
    ours = [name for name, what in names().items() if what.endswith("; not published, ours")]
    assert [n for n in ours if n.startswith(("cifar100/", "imagenet/"))] == [
        "cifar100/tald", "imagenet/tald",
    ]  # fmt: skip


@pytest.mark.parametrize("dataset", datasets())
def test_tald_is_labels_and_noisy_kd(dataset: str) -> None:
    tald = resolve(f"{dataset}/tald", "resnet8x4")
    noise = Noise.parse(tald["noise"])
    assert (tald["method"], tald["ce_weight"], tald["kd_weight"]) == ("kd", 1, 1)
    assert (noise.family, noise.scale, noise.relative) == ("gaussian", 0.1, True)
    assert tald["temperature"] == (1 if dataset == "imagenet" else 4)


def test_mlkd_of_tiny_imagenet() -> None:
    """Half the rate, twice the epochs when standardized, for every student; the schedule of its own base."""
    for student in ("resnet8x4", "ShuffleV2"):
        plain = resolve("tiny-imagenet/mlkd", student)
        assert (plain["epochs"], plain["lr"], plain["batch_size"]) == (200, 0.1, 256)
        assert plain["milestones"] == [0.3, 0.6, 0.8]
        ls = resolve("tiny-imagenet/mlkd-ls", student)
        assert (ls["epochs"], ls["lr"], ls["milestones"]) == (400, 0.1, [0.15, 0.3, 0.4])
        assert (ls["ce_weight"], ls["kd_weight"], ls["temperature"]) == (0.1, 9, 2)


def test_imagenet_weights() -> None:
    def of(method: str, student: str = "torchvision:resnet18") -> tuple[Any, ...]:
        found = resolve(f"imagenet/{method}", student)
        return found["ce_weight"], found["kd_weight"], found.get("temperature")

    assert of("kd") == (0.5, 0.5, 1)
    assert of("kd-ls") == (0.1, 9, 2)
    assert of("dkd") == (1, 1, 1)
    assert of("dkd-ls") == (0.5, 12, 2)
    assert of("mlkd") == (0.5, 0.5, 1)
    assert of("ctkd") == (1, 1, None)
    assert resolve("imagenet/dkd", "torchvision:resnet18")["dkd_beta"] == 0.5
    assert resolve("imagenet/dkd", "mobilenetv1")["dkd_beta"] == 2
    ctkd = resolve("imagenet/ctkd", "torchvision:resnet18")
    drops = [round(fraction * ctkd["epochs"]) for fraction in ctkd["milestones"]]
    assert (ctkd["epochs"], ctkd["batch_size"], ctkd["lr"], drops) == (120, 256, 0.1, [30, 60, 90])


@pytest.mark.parametrize("name", datasets())
def test_recipes_name_what_there_is(name: str) -> None:
    """Methods, models and options; also in tables that no pair of the tests below reads."""
    recipe = load(name)
    options = set(ObjectiveConfig.flags()) | set(Optimization.__annotations__)
    pairs = recipe.get("pair", {})
    models = {model for pair in pairs for model in pair.split(">")} | set(recipe.get("student", {}))
    tables = [recipe["base"], *recipe.get("student", {}).values()]
    for settings in recipe["method"].values():
        assert settings["method"] in METHODS
        models |= set(settings.get("student", {}))
        tables += [settings, *settings.get("student", {}).values()]
    for pair in pairs.values():
        assert set(pair) <= set(recipe["method"])
        tables += pair.values()
    used = {key.replace("-", "_") for table in tables for key in table} - {
        "about",
        "ours",
        "student",
    }
    assert used <= options
    assert models <= {*MODELS, "mobilenetv1"}


@pytest.mark.parametrize("name", list(names()))
def test_every_recipe_is_a_training(name: str) -> None:
    """Each gives options that exist and agree, for every student and pair that it knows."""
    dataset, _, method = name.partition("/")
    recipe = load(dataset)
    pairs = [(None, "resnet8x4"), *(pair.split(">") for pair in recipe.get("pair", {}))]
    for teacher, student in pairs:
        options = resolve(name, student, teacher)
        optimization = {
            k: options.pop(k) for k in list(options) if k in Optimization.__annotations__
        }
        Optimization(**optimization | {"milestones": tuple(optimization["milestones"])})
        config = ObjectiveConfig.from_flags(options).resolved()
        assert bool(config.standardize) == method.endswith("-ls")
        assert all(one is None or one in MODELS for one in (teacher, student))


def test_unknown_recipes_are_answered_with_the_closest() -> None:
    with pytest.raises(UnknownName, match="cifar100/kd-ls"):
        resolve("cifar100/kdls", "resnet8x4")
    assert datasets() == ["cifar10", "cifar100", "imagenet", "stl10", "tiny-imagenet"]


def test_a_recipe_with_flags_that_override_it(
    trained: Trained, tmp_path: Path, kdcache: Any
) -> None:
    done: Result = kdcache(
        "train-student", "--store", trained.store, "--dataset", "digits", "--student", "resnet8",
        "--recipe", "cifar100/kd-ls", "--epochs", 8, "--kd-weight", 3, "--train-samples", 40,
        "--out", tmp_path / "run", "--device", "cpu", "-q",
    )  # fmt: skip
    assert done.code == 0, done.err
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    objective, training = config["objective"], config["training"]
    assert (objective["kd_weight"], objective["ce_weight"], objective["temperature"]) == (3, 0.1, 2)
    assert objective["standardize"] == "unbiased"
    assert (training["epochs"], training["batch_size"], training["lr"]) == (8, 64, 0.05)
    assert training["milestones"] == [0.625, 0.75, 0.875]
    rates = [record["lr"] for record in read_metrics(tmp_path / "run")]
    assert rates == pytest.approx([0.05] * 5 + [0.005, 0.0005, 0.00005])


def test_recipes_are_listed(kdcache: Any) -> None:
    listed = {entry["name"]: entry["what"] for entry in kdcache("list", "recipes", "--json").json}
    assert listed == names()
    assert "tau=2" in listed["cifar100/kd-ls"]
