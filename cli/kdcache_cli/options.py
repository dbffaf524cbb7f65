"""Options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from kdcache.methods.table import METHODS
from kdcache_cli.groups import (
    DATA,
    MACHINE,
    OBJECTIVE,
    OF_METHODS,
    OPTIMIZATION,
    OUTPUT,
    TEACHER,
    VIEWS,
)
from kdcache_cli.names import KINDS

#: What torch and NumPy both take.
SEED = click.IntRange(0, 2**63 - 1)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class LocalPath(click.Path):
    """A path on this machine; a URL is refused, which would become a folder named like its scheme."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        from kdcache_stores.errors import UsageError
        from kdcache_stores.objects.urls import require_local

        try:
            return super().convert(require_local(value), param, ctx)
        except UsageError as error:
            self.fail(str(error), param, ctx)


LOCAL_PATH = LocalPath()


class Name(click.types.StringParamType):
    """A name, which the shell completes.

    Args:
        kind: of `kdcache_cli.names.KINDS`.
        all_known: whether there are no others, so that a misspelt one is refused at once.
    """

    name = "name"

    def __init__(self, kind: str, all_known: bool = False) -> None:
        self.kind, self.all_known = kind, all_known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The name as it is."""
        if self.all_known:
            known = KINDS[self.kind]()
            if value not in known:
                from kdcache_stores.errors import UnknownName

                raise UnknownName(self.kind.removesuffix("s"), value, known)
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The names that begin so, each with its line."""
        names = KINDS[self.kind]().items()
        return [CompletionItem(n, help=line) for n, line in names if n.startswith(incomplete)]


class Place(click.types.StringParamType):
    """A store or a network by its place; what is plainly the other one is refused with what fits it.

    Args:
        store: whether a store is wanted.
    """

    def __init__(self, store: bool) -> None:
        self.store, self.name = store, "store" if store else "network"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The place as it is."""
        folder = Path(str(value).partition("@")[0])
        # Told by the files that only one of them has; who knows these by name imports torch or NumPy.
        if self.store and (folder / "config.toml").is_file():
            self.fail(
                f"{folder} is the run of a training, and a store of a teacher's outputs is wanted here. See "
                f"it with: kdcache evaluate {folder} --dataset NAME; make a store of it with: kdcache "
                f"dump-teacher --teacher {folder}",
                param,
                ctx,
            )
        if not self.store and (folder / "manifest.sha256").is_file():
            self.fail(
                f"{folder} is a store of a teacher's outputs, and a network is wanted here: a run, or a "
                f"model's name. What there is to see of a store: kdcache inspect {folder}, kdcache verify "
                f"{folder}",
                param,
                ctx,
            )
        return str(value)


STORE, NETWORK = Place(store=True), Place(store=False)
METHOD, RECIPE = Name("methods", all_known=True), Name("recipes", all_known=True)
MODEL, DATASET, AUGMENTATION = Name("models"), Name("datasets"), Name("augmentations")


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, in reading order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


data_root = DATA.option(
    "--data-root",
    type=LOCAL_PATH,
    help="Folder of the datasets [default: `data` in the user's cache folder].",
)

download = DATA.option("--download", is_flag=True, help="Fetch the dataset if it is not there.")


def _keep_column(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    ctx.meta[f"kdcache.{param.name}"] = value


def _with_columns(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The dataset's name with the columns asked for: these options were taken before it."""
    image, label = (ctx.meta.get(f"kdcache.{name}_column") for name in ("image", "label"))
    if value is None or not (image or label):
        return value
    from kdcache.data.loading import with_columns

    return with_columns(value, image, label)


def dataset_name(help: str, required: bool = False) -> Decorator:
    """--dataset, and the columns that become a part of its name."""
    return together(
        DATA.option(
            "--dataset", type=DATASET, required=required, callback=_with_columns, help=help
        ),
        DATA.option(
            "--image-column",
            is_eager=True,
            expose_value=False,
            callback=_keep_column,
            help="Of the images, in tables; their extension, in archives (tar:, parquet:, hf:).",
        ),
        DATA.option(
            "--label-column",
            is_eager=True,
            expose_value=False,
            callback=_keep_column,
            help="Of the labels, in tables; a field of the .json members, in archives.",
        ),
    )


dataset = together(
    dataset_name("Name; see `kdcache list datasets`.", required=True),
    data_root,
    download,
)

expect = TEACHER.option(
    "--expect",
    multiple=True,
    metavar="DIGEST",
    help="Content digest that the store must have; for several stores give it for each, in their order.",
)

skip_bad = DATA.option(
    "--skip-bad",
    is_flag=True,
    help="Decode every image first and leave out those that cannot be, instead of failing.",
)

threads = MACHINE.option(
    "--threads",
    type=click.IntRange(1),
    help="Compute threads on the CPU; 1 is fastest for tiny networks.",
)

device_alone = MACHINE.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.",
)

augmentation_of_store = VIEWS.option(
    "--augment",
    type=AUGMENTATION,
    help="With --store: needed where its augmentation is your own.",
)

workers = MACHINE.option(
    "--workers",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Processes that decode image files.",
)

device = together(device_alone, workers, threads)

val_split = DATA.option(
    "--val-split", type=float, default=0.0, help="Fraction held out to choose an epoch."
)

recipe = together(
    OBJECTIVE.option(
        "--method", type=METHOD, help="Name; see `kdcache list methods`. Or a --recipe."
    ),
    OBJECTIVE.option(
        "--recipe",
        type=RECIPE,
        help="Published settings, such as cifar100/kd-ls; flags override them.",
    ),
)

train_samples = DATA.option(
    "--train-samples", type=click.IntRange(1), help="Use so many samples, class-balanced."
)

samples = together(
    train_samples,
    val_split,
    DATA.option("--subset", is_flag=True, help="Leave out samples that the store does not have."),
    VIEWS.option(
        "--views", type=click.IntRange(1), help="Stored views to cycle through [default: all]."
    ),
)

epochs = OPTIMIZATION.option("--epochs", type=click.IntRange(1), default=240, show_default=True)

seed = OPTIMIZATION.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Of the initial weights, the order of the samples and their choice, and the noise.",
)

steps = together(
    epochs,
    OPTIMIZATION.option(
        "--batch-size",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Samples per step, over all ranks together.",
    ),
    OPTIMIZATION.option("--lr", type=float, default=0.05, show_default=True),
    OPTIMIZATION.option("--optimizer", default="sgd", show_default=True, help="sgd or adamw."),
    OPTIMIZATION.option("--momentum", type=float, default=0.9, show_default=True),
    OPTIMIZATION.option("--nesterov", is_flag=True, help="Nesterov's momentum."),
    OPTIMIZATION.option("--weight-decay", type=float, default=5e-4, show_default=True),
    OPTIMIZATION.option(
        "--lr-schedule",
        default="step",
        show_default=True,
        help="step (a tenth after each milestone), cosine, one-cycle or constant.",
    ),
    OPTIMIZATION.option(
        "--milestones",
        default="0.625,0.75,0.875",
        show_default=True,
        callback=lambda ctx, param, value: fractions(value),
        help="Fractions of the epochs for `step`.",
    ),
    OPTIMIZATION.option(
        "--warmup-epochs", type=float, default=0.0, help="Linear rise of the rate."
    ),
    OPTIMIZATION.option("--clip", type=float, help="Largest norm of the gradient."),
    OPTIMIZATION.option(
        "--ema", type=float, help="Decay of a moving average of the weights to evaluate."
    ),
    MACHINE.option(
        "--precision",
        default="float32",
        show_default=True,
        help="float32, bf16 or fp16 (autocast).",
    ),
    MACHINE.option("--channels-last", is_flag=True, help="Memory layout that GPUs prefer."),
    MACHINE.option("--compile", is_flag=True, help="Compile the network with torch.compile."),
    MACHINE.option(
        "--graph/--no-graph",
        default=False,
        show_default=True,
        help="Compile the whole step and, on a GPU, capture it; off until it has been measured there.",
    ),
    MACHINE.option(
        "--no-tf32",
        "tf32",
        is_flag=True,
        flag_value=False,
        default=True,
        help="Float32 convolutions on a GPU in full float32, not in TF32.",
    ),
    OPTIMIZATION.option(
        "--eval-every",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Measure the test set after every so many epochs, and after the last.",
    ),
    OUTPUT.option(
        "--checkpoint-every",
        default="60s",
        show_default=True,
        help="Epochs such as 10, or a time such as 60s, 5m: each epoch, but at most once in that time.",
    ),
    MACHINE.option(
        "--trim-memory",
        "hold_memory",
        is_flag=True,
        flag_value=False,
        default=True,
        help="Leave glibc's allocator as it is; slower steps of small networks on a CPU.",
    ),
    OUTPUT.option(
        "--tensorboard", is_flag=True, help="Write the metrics as TensorBoard events too."
    ),
)


def _set_cache_size(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        from kdcache_stores.objects.cache import parse_size

        parse_size(value)
        os.environ["KDCACHE_CACHE_SIZE"] = value  # so that worker processes keep to it too


cache_size = MACHINE.option(
    "--cache-size",
    callback=_set_cache_size,
    expose_value=False,
    help="Disk for objects of remote stores, such as 5GB; 0 for none [default: 20GB].",
)


def fractions(text: str) -> tuple[float, ...]:
    """ "0.5,0.75" -> (0.5, 0.75).

    Raises:
        click.BadParameter: not numbers between 0 and 1.
    """
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = (-1.0,)
    if not all(0 < value < 1 for value in values):
        raise click.BadParameter(f"{text!r}: expected fractions between 0 and 1, such as 0.5,0.75")
    return values


allow_code = TEACHER.option(
    "--allow-code", is_flag=True, help="Import the user's own network that a run names."
)

baseline = OUTPUT.option(
    "--baseline",
    type=LOCAL_PATH,
    help="Finished run of the student by labels alone, which its teacher should surpass.",
)

strict = OUTPUT.option(
    "--strict", is_flag=True, help="Exit 1 on any warning, before anything is trained or written."
)

run_out = OUTPUT.option(
    "--out",
    required=True,
    type=LOCAL_PATH,
    help="Directory of the run; an interrupted run is continued.",
)


def source(given: dict[str, Any]) -> Any:
    """The `DatasetSource` that a command's options describe, which are taken out of ``given``."""
    from kdcache.data.loading import DatasetSource

    names = {"data_root": "root", "download": "download", "skip_bad": "skip_bad"}
    how = {name: given.pop(option) for option, name in names.items() if option in given}
    return DatasetSource(given.pop("dataset"), workers=given.get("workers", 0), **how)


def resolve_device(name: str, threads: int | None = None) -> str:
    """The device to compute on, with so many threads if any are asked for: "auto" is the GPU if there is one.

    Raises:
        UsageError: a device that this machine does not have.
    """
    import torch

    from kdcache_stores.errors import UsageError

    if threads:
        torch.set_num_threads(threads)
    if name == "auto":
        here = torch.accelerator.is_available()
        accelerator = torch.accelerator.current_accelerator() if here else None
        return accelerator.type if accelerator else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: not on this machine ({reason}); try cpu.") from error
    return name


def deal(settings: dict[str, Any], *kinds: type) -> list[dict[str, Any]]:
    """A command's options, for each of some dataclasses those that are named like its fields.

    Raises:
        TypeError: a field of two of the dataclasses, which one option cannot set apart, or an option
            that is a field of none: it would not arrive.
    """
    names = [{field.name for field in fields(kind)} for kind in kinds]
    for (kind, mine), (other, its) in combinations(zip(kinds, names, strict=True), 2):
        if shared := sorted(mine & its):
            raise TypeError(f"{kind.__name__} and {other.__name__} both have {', '.join(shared)}")
    if homeless := sorted(settings.keys() - set().union(*names)):
        raise TypeError(f"no field for the options {', '.join(homeless)}")
    return [{key: settings[key] for key in settings if key in mine} for mine in names]


def method_options() -> list[Decorator]:
    """The options of single methods, --METHOD-OPTION, from their records."""
    flags: list[Decorator] = []
    for method in METHODS.values():
        for option in method.options:
            default = _text(option.default)
            if option.standardized is not None:
                default += f"; {_text(option.standardized)} with --standardize"
            flags.append(
                OF_METHODS.option(
                    f"--{method.flag(option).replace('_', '-')}",
                    type=type(option.default),
                    help=f"{method.name}: {option.help} [default: {default}].",
                )
            )
    return flags


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


objective = together(
    OBJECTIVE.option(
        "--ce-weight", type=float, help="Weight of cross-entropy [default: the method's]."
    ),
    OBJECTIVE.option(
        "--kd-weight", type=float, help="Weight of distillation [default: the method's]."
    ),
    OBJECTIVE.option("--alpha", type=float, help="Short for --ce-weight A --kd-weight 1-A."),
    OBJECTIVE.option(
        "--temperature", type=float, help="T, or tau with --standardize [default: 4; 2]."
    ),
    OBJECTIVE.option("--teacher-temperature", type=float, help="Another T for the teacher."),
    OBJECTIVE.option("--student-temperature", type=float, help="Another T for the student."),
    OBJECTIVE.option(
        "--standardize", is_flag=True, help="Z-score the logits of teacher and student."
    ),
    OBJECTIVE.option(
        "--biased-std", is_flag=True, help="Z-score by the biased std, as in the paper."
    ),
    OBJECTIVE.option(
        "--noise",
        help="On the teacher's logits: FAMILY:SCALE, then any of ,relative or ,multiplicative; ,linear or "
        ",cosine; ,copies=M. FAMILY gaussian, uniform or laplace; SCALE its standard deviation, in logits, or "
        "in units of the row's own with relative, or as a factor of each logit with multiplicative; "
        "falling to 0 over the epochs with linear or cosine; the loss is the mean of M draws.",
    ),
    OBJECTIVE.option(
        "--combine", default="mean-logits", help="How several teachers become one target."
    ),
    OBJECTIVE.option(
        "--teacher-weights", help="Of the teachers: 2,1,1, or entropy, or confidence."
    ),
    OBJECTIVE.option("--ablation", default="full", help="What of the teacher's targets is kept."),
    OBJECTIVE.option("--reverse-kl", is_flag=True, help="KL from the student to the teacher."),
    OBJECTIVE.option("--label-smoothing", type=float, default=0.0, help="Of the cross-entropy."),
    OBJECTIVE.option(
        "--add",
        multiple=True,
        help="Another method whose term is added, NAME or NAME:WEIGHT, such as kd.",
    ),
    *method_options(),
)


def with_objective(settings: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments with those of the loss as one `ObjectiveConfig`, named objective.

    Raises:
        click.BadParameter: weights of teachers that begin like numbers and are none.
    """
    from kdcache.methods.config import ObjectiveConfig

    settings = dict(settings)
    unbiased, biased = settings.pop("standardize"), settings.pop("biased_std")
    settings["standardize"] = "biased" if biased else "unbiased" if unbiased else False
    settings["reverse"] = settings.pop("reverse_kl")
    weights = settings.pop("teacher_weights")
    if weights and weights[0] in "0123456789.+-":
        try:
            weights = tuple(float(word) for word in weights.split(","))
        except ValueError as error:
            raise click.BadParameter(
                f"--teacher-weights {weights!r}: expected numbers such as 2,1,1, entropy or confidence"
            ) from error
    settings["weights"] = weights
    flags = {name: settings.pop(name) for name in ObjectiveConfig.flags() if name in settings}
    return settings | {"objective": ObjectiveConfig.from_flags(flags)}


foreign = together(
    TEACHER.option(
        "--normalize",
        "normalizations",
        multiple=True,
        help="What the network was trained with: cifar10, cifar100, imagenet, ... "
        "[default: its own, else its dataset's]",
    ),
    TEACHER.option(
        "--mean",
        "means",
        multiple=True,
        help="Instead: of pixels from 0 to 1, 0.5,0.5,0.5 or 0.5 for all channels.",
    ),
    TEACHER.option("--std", "stds", multiple=True, help="With --mean."),
    TEACHER.option(
        "--size",
        "sizes",
        multiple=True,
        type=click.IntRange(1),
        help="Side in pixels that views are resized to.",
    ),
)


def each(flag: str, values: Sequence[Any], count: int) -> list[Any]:
    """One value per teacher: none, one for all, or one for each, in order.

    Raises:
        click.UsageError: another number.
    """
    if len(values) not in (0, 1, count):
        raise click.UsageError(
            f"{len(values)} {flag} for {count} networks: give one for all, or one for each."
        )
    return list(values) if len(values) == count else [values[0] if values else None] * count


def preprocessings(given: dict[str, Any], count: int) -> list[Any]:
    """The `Preprocessing` that --normalize, or --mean and --std, ask for; None where nothing does.

    These options are taken out of ``given``.
    """
    from kdcache.preprocessing import PREPROCESSINGS, Preprocessing
    from kdcache_stores.errors import UnknownName

    names = each("--normalize", given.pop("normalizations"), count)
    means, stds = (each(f"--{key}", given.pop(f"{key}s"), count) for key in ("mean", "std"))
    chosen: list[Any] = []
    for name, mean, std in zip(names, means, stds, strict=True):
        if (mean is None) != (std is None) or (name and mean):
            raise click.UsageError("give --normalize NAME, or --mean and --std together.")
        if name and name not in PREPROCESSINGS:
            raise UnknownName("normalization", name, PREPROCESSINGS)
        numbers = mean and Preprocessing(_numbers(mean), _numbers(std))
        chosen.append(PREPROCESSINGS[name] if name else numbers)
    return chosen


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}: expected numbers such as 0.5,0.5,0.5") from None
    if max(numbers) > 10:  # none of pixels from 0 to 1 is
        raise click.BadParameter(
            f"{text!r}: mean and std are of pixels from 0 to 1; divide those of pixels from 0 to 255 by 255"
        )
    return numbers


def encodings(given: tuple[str, ...]) -> dict[str, str]:
    """("float32", "pooled=float16") -> {"logits": "float32", "pooled": "float16"}."""
    chosen: dict[str, str] = {}
    for text in given:
        field, equals, name = text.rpartition("=")
        field = field if equals else "logits"
        if field in chosen:
            raise click.BadParameter(f"the encoding of {field} is given twice")
        chosen[field] = name
    return chosen


def part(text: str | None) -> tuple[int, int]:
    """ "2/8" -> (2, 8).

    Raises:
        click.BadParameter: not i/n with 0 <= i < n.
    """
    if text is None:
        return 0, 1
    index, _, parts = text.partition("/")
    if not (index.isdecimal() and parts.isdecimal() and int(index) < int(parts)):
        raise click.BadParameter(
            f"{text!r}: expected i/n with i from 0, so 0/4 to 3/4 for four jobs"
        )
    return int(index), int(parts)
