"""What a training is: everything that decides its result, in plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kdcache.data.loading import DatasetSource
from kdcache.methods.config import ObjectiveConfig
from kdcache.preprocessing import require_precision
from kdcache.recipes.published import resolve
from kdcache.training.optim import Optimization
from kdcache_stores import UsageError, open_store


@dataclass(frozen=True)
class Training:
    """Everything that decides the result of a training.

    Attributes:
        dataset: a name as `load_dataset` takes it.
        model: a name as `build_model` takes it.
        objective: the loss; without a teacher (method "ce") it needs no store.
        stores: paths of stores of one view plan.
        online: teachers to run in the loop instead of reading their logits, as `load_teacher` takes
            them; with a store they see the store's views.
        augment: the views when there is no store (each epoch sees new ones); by default
            `default_augmentation` of the dataset. With stores, theirs, where it is a user's own.
        views: how many stored views to cycle through (default: all).
        schedule: of the views, "epoch" or "random", see `CachedViews`.
        resident_views: views in memory at once, with schedule "random".
        views_per_decode: M views of each sample come together in a batch, from an image that is decoded
            once: a pass over the samples counts as M epochs, see `CachedViews`.
        train_samples: train on so many samples, as many of each class as possible, drawn by ``seed``.
        val_split: fraction of the training samples held out to choose the best epoch on.
        subset: allow samples of the dataset that the store lacks.
        init_weights: a file of weights to start from.
        seed: of the initial weights, the noise and what layers draw.
        data_seed: of the sample order, the choice of samples and, without a store, the views; None
            is the seed, or that of the first of trainings that share an order, see `with_orders`.
        precision: "float32", or "bf16"/"fp16" autocast; the loss is float32 always.
        graph: compile the whole step and, on a GPU, capture it, see `kdcache.training.learning.static_step`.
        tf32: a float32 network on a GPU computes its convolutions in TF32, see `kdcache.training.tuning`.
        ema: decay of an exponential moving average of the weights that is evaluated and saved instead.
        eval_every: measure the test set after every so many epochs, and after the last.
        threads: compute threads on the CPU (default: as torch chooses; 1 is fastest for tiny networks).
    """

    dataset: str
    model: str
    objective: ObjectiveConfig = field(default_factory=lambda: ObjectiveConfig(method="ce"))
    optimization: Optimization = field(default_factory=Optimization)
    stores: tuple[str, ...] = ()
    online: tuple[str, ...] = ()
    augment: str | None = None
    views: int | None = None
    schedule: str = "epoch"
    resident_views: int | None = None
    views_per_decode: int = 1
    train_samples: int | None = None
    val_split: float = 0.0
    subset: bool = False
    init_weights: str | None = None
    seed: int = 0
    data_seed: int | None = None
    device: str = "cpu"
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    graph: bool = False
    tf32: bool = True
    eval_every: int = 1
    ema: float | None = None
    workers: int = 0
    threads: int | None = None
    data_root: str | None = None
    download: bool = False
    skip_bad: bool = False

    @property
    def stream_seed(self) -> int:
        """The seed of what the network is shown."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def source(self) -> DatasetSource:
        """Where its datasets come from."""
        root = Path(self.data_root) if self.data_root else None
        return DatasetSource(self.dataset, root, self.download, self.skip_bad, self.workers)

    @property
    def named(self) -> str:
        """What tells it from the students that are trained with it: "resnet8, seed 1"."""
        begun = f", from {self.init_weights}" if self.init_weights else ""
        return f"{self.model}, seed {self.seed}{begun}"

    def __post_init__(self) -> None:
        if self.objective.needs_teacher and not self.stores and not self.online:
            raise UsageError(
                f"--method {self.objective.method} needs at least one --store "
                "(or --online TEACHER, to run the teacher in the loop)."
            )
        live = [record.name for record in self.objective.records if record.online]
        if live and not self.online:
            raise UsageError(
                f"--method {live[0]} needs more of its teacher than a store holds: give --online TEACHER, to "
                "run it in the loop; a --store beside it still proves that it is the right one."
            )
        require_precision(self.precision)
        epochs, each = self.optimization.epochs, self.views_per_decode
        if each > 1 and epochs % each:
            raise UsageError(
                f"--views-per-decode {each}: a pass over the samples counts as {each} epochs, and --epochs "
                f"{epochs} is no multiple of it; use --epochs {-(-epochs // each) * each}."
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise UsageError(f"--ema {self.ema} must be between 0 and 1, such as 0.999.")
        if self.eval_every < 1:
            raise UsageError(f"--eval-every {self.eval_every} must be at least 1.")
        if not 0 <= self.val_split < 1:
            raise UsageError(f"--val-split {self.val_split} must be in [0, 1).")


#: What trainings side by side may differ in; the rest makes the stream of batches, or is the process's.
OWN = ("model", "objective", "optimization", "init_weights", "seed", "data_seed", "precision",
       "channels_last", "compile", "graph", "ema")  # fmt: skip


def require_one_stream(trainings: Sequence[Training]) -> None:
    """Refuse trainings that cannot share a stream of batches.

    They may differ in their networks, losses, optimizers, seeds and precision, but for the number of
    epochs, the batch size and whether views come in pairs; of their orders see `with_orders`.

    Raises:
        UsageError: naming what differs; or there is none.
    """
    if not trainings:
        raise UsageError("expected at least one training, found none.")
    _require_peers([training for training in trainings if training.objective.record.peers])
    shared = {
        field.name: lambda t, name=field.name: getattr(t, name)
        for field in fields(Training)
        if field.name not in OWN
    } | {
        "epochs": lambda t: t.optimization.epochs,
        "batch_size": lambda t: t.optimization.batch_size,
        "weak and strong views": lambda t: t.objective.record.pairs,
        "batch norm of the teacher by each batch": lambda t: t.objective.batch_statistics,
    }
    for name, value in shared.items():
        _require_equal(name.replace("_", "-"), [value(training) for training in trainings])


def _require_equal(name: str, values: Sequence[Any]) -> None:
    for number, value in enumerate(values, start=1):
        if value != values[0]:
            raise UsageError(
                f"trainings side by side share their stream of batches: {name} is {values[0]!r} in training 1 "
                f"and {value!r} in training {number}. Give all the same, or train them one after the other."
            )


def with_orders(trainings: Sequence[Training], in_memory: bool) -> list[Training]:
    """Trainings side by side, each with the order of samples that it sees.

    Each has its own, of its data seed, where its stream costs next to nothing: images in memory, views and
    logits from stores. One order is shared where that saves decoding, or teachers in the loop; where the data
    seed chooses the samples or the views, too; and by students that teach each other. Trainings without a
    data seed then have that of the first.

    Args:
        in_memory: the images are, and are augmented in batches.

    Raises:
        UsageError: data seeds differ where an order is shared.
    """
    first = trainings[0]
    costly = not in_memory or not first.stores or bool(first.online)
    chosen = first.train_samples is not None or first.val_split > 0
    peers = any(training.objective.record.peers for training in trainings)
    if len(trainings) == 1 or not (costly or chosen or peers):
        return list(trainings)
    seed = first.stream_seed
    alike = [t if t.data_seed is not None else replace(t, data_seed=seed) for t in trainings]
    _require_equal("data-seed", [training.stream_seed for training in alike])
    return alike


def _require_peers(trainings: Sequence[Training]) -> None:
    """Refuse students that shall teach each other and cannot."""
    if not trainings:
        return
    method = trainings[0].objective.method
    if len(trainings) == 1:
        raise UsageError(
            f"--method {method}: students side by side teach each other, found one: give --seed twice, or a "
            "list of students (--runs)."
        )
    named = [training.named for training in trainings]
    begins = [(t.model, t.init_weights or t.seed) for t in trainings]
    if len(set(begins)) < len(begins) or len(set(named)) < len(named):
        raise UsageError(
            f"--method {method}: students that begin alike have nothing to teach each other, found "
            f"{'; '.join(named)}. Give each a seed, a model or initial weights of its own."
        )


def recipe_options(name: str, student: str, stores: Sequence[str] = ()) -> dict[str, Any]:
    """The published options of a student and the teacher of its first store, see `resolve`."""
    teacher = None
    if stores:
        with open_store(stores[0]) as store:
            teacher = store.teacher.architecture
    published = resolve(name, student, teacher)
    return published | {"milestones": tuple(published["milestones"])}
