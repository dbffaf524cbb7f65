"""train-teacher, train-student."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.progress import Progress, TaskID

from kdcache_cli import groups, options
from kdcache_cli.app import common
from kdcache_cli.output import (
    LogLines,
    StageBars,
    emit,
    is_first,
    percent,
    progress,
    say,
    show_facts,
    show_line,
    show_table,
)
from kdcache_cli.student_runs import StudentRun, student_runs


class Bars:
    """An epoch bar over one training, and a step bar that trainings side by side share.

    In a log the epochs are lines of `log`, the last one in any case, and the steps of a long one.
    """

    def __init__(
        self, bars: Progress, log: LogLines, title: str, steps: TaskID | None = None
    ) -> None:
        self.bars, self.log, self.title = bars, log, title
        self.steps = bars.add_task("  steps", total=None, note="") if steps is None else steps
        self.epochs: TaskID | None = None
        self.tested = ""

    def note(self, text: str) -> None:
        """Say it above the bars."""
        say(text)

    def step(self, epoch: int, done: int, total: int) -> None:
        """Move the step bar."""
        self.bars.update(self.steps, completed=done, total=total)
        if done < total:
            self.log(f"{self.title}, epoch {epoch}: {done:,} of {total:,} steps", after=60)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """Move the epoch bar and show where the training stands."""
        if self.epochs is None:
            self.epochs = self.bars.add_task(self.title, total=epochs, note="")
        wait = record["data_wait_seconds"] / max(record["seconds"], 1e-9)
        if "test_top1" in record:
            self.tested = f"test {percent(record['test_top1'])}  "
        note = (
            f"loss {record['train_loss']:.3f}  {self.tested}"
            f"{record['images_per_second']:,.0f} images/s  wait {wait:.1%}"
        )
        self.bars.update(self.epochs, completed=record["epoch"], total=epochs, note=note)
        tested = f"test top-1 {percent(record['test_top1'])}, " if "test_top1" in record else ""
        self.log(
            f"{self.title}, epoch {record['epoch']}/{epochs}: {tested}loss {record['train_loss']:.3f}, "
            f"{record['seconds']:.1f} s",
            after=0 if record["epoch"] >= epochs else 10,
        )


def _train(
    trainings: Sequence[Any],
    outs: Sequence[Path],
    titles: Sequence[str],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    from kdcache.stages import watching
    from kdcache.training.preparation import train_together

    quiet, as_json = quiet or not is_first(), as_json and is_first()
    with progress(quiet, "") as bars, watching(StageBars(bars, quiet)):
        steps = bars.add_task("  steps", total=None, note="")
        log = LogLines(quiet)
        watches = [Bars(bars, log, title, steps) for title in titles]
        runs = train_together(trainings, outs, watches, **options)
    summaries = [run.summary() or {} for run in runs]
    documents = [{"run": str(r.path)} | s for r, s in zip(runs, summaries, strict=True)]
    emit(documents[0] if len(documents) == 1 else documents, as_json)
    if quiet:
        return
    if len(runs) == 1:
        show_facts(titles[0], _page(summaries[0]))
        show_line(f"run: {runs[0].path}")
    else:
        columns = ("", "last top-1", "best top-1", "NLL", "seconds per epoch of all")
        rows = [
            (f"teacher {name}, clean test images", percent(top1), "-", "-", "-")
            for name, top1 in _teachers(summaries)
        ]
        rows += [
            (title, percent(summary["last_top1"]), percent(summary["best_top1"]),
             f"{summary['last_nll']:.4f}", f"{summary['seconds_per_epoch']:.3f}")
            for title, summary in zip(titles, summaries, strict=True)
        ]  # fmt: skip
        show_table("students side by side", columns, rows)
        for line in _means([run.path for run in runs]):
            show_line(line)
        show_line(f"runs: {runs[0].path.parent}")


def _teachers(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Name and top-1 of the teachers whose stores say what they reach on clean test images."""
    named: dict[str, float] = {}
    for summary in summaries:
        named |= summary.get("teachers", {})
    return list(named.items())


def _means(runs: Sequence[Path]) -> list[str]:
    """A line for each method that was trained with several seeds."""
    from kdcache.report.side_by_side import means_over_seeds

    lines = []
    for mean in means_over_seeds(runs):
        if mean.top1.n < 2:
            continue
        line = f"{mean.label}: {percent(mean.top1.mean)} over {mean.top1.n} seeds"
        if mean.gain is not None:
            spread = "" if math.isnan(mean.gain.half) else f" +- {100 * mean.gain.half:.2f}"
            pairs = "seed by seed" if mean.gain.paired else "of other seeds"
            line += f"; {mean.label} - {mean.baseline}: {100 * mean.gain.mean:+.2f}{spread} points "
            line += f"(95%, {pairs})" if spread else f"({pairs})"
        lines.append(line)
    return lines


def _page(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person wants to know of a finished run."""
    return [
        *(
            (f"teacher {name}, top-1 of clean test images", percent(top1))
            for name, top1 in _teachers([summary])
        ),
        ("test top-1, last epoch", percent(summary["last_top1"])),
        (
            f"test top-1, best epoch ({summary['best_epoch']}, chosen on "
            f"{summary['best_chosen_on']})",
            percent(summary["best_top1"]),
        ),
        ("test top-5, last epoch", percent(summary["last_top5"])),
        ("negative log-likelihood (nats)", f"{summary['last_nll']:.4f}"),
        ("expected calibration error", percent(summary["last_ece"])),
        (
            f"both at T={summary['temperature']:.2f}, fitted on the "
            f"{summary['temperature_fitted_on']}",
            f"{summary['calibrated_nll']:.4f}, {percent(summary['calibrated_ece'])}",
        ),
        ("seconds per epoch (median)", f"{summary['seconds_per_epoch']:.3f}"),
        ("share of time waiting for data", percent(summary["data_wait_fraction"])),
        ("teacher forwards", f"{summary['teacher_forwards']:,}"),
    ]


def _beside(settings: dict[str, Any]) -> dict[str, Any]:
    """What a command's arguments say beside the `Training`, which is taken out of them."""
    from kdcache.training.preparation import TrainingOptions

    names = TrainingOptions.__optional_keys__ & settings.keys()
    return {name: settings.pop(name) for name in sorted(names)}


def _training(settings: dict[str, Any]) -> Any:
    """The `Training` that a command's arguments describe; every one of them has its field."""
    from kdcache.training.optim import Optimization
    from kdcache.training.settings import Training

    for name in ("data_root", "init_weights"):
        settings[name] = str(settings[name]) if settings.get(name) else None
    settings["device"] = options.resolve_device(settings["device"])
    steps, rest = options.deal(settings, Optimization, Training)
    return Training(**rest, optimization=Optimization(**steps))


@groups.command(
    "train-teacher",
    "kdcache train-teacher --dataset cifar10 --model resnet56 --out runs/teacher",
    "kdcache train-teacher --dataset folder:photos --model torchvision:resnet18 --epochs 90 --out runs/teacher",
)
@options.dataset
@options.skip_bad
@groups.NETWORK.option(
    "--model", type=options.MODEL, required=True, help="Name; see `kdcache list models`."
)
@options.run_out
@groups.VIEWS.option(
    "--augment",
    type=options.AUGMENTATION,
    help="[default: pad-crop-flip, or resized-crop-flip for large images]",
)
@options.train_samples
@options.val_split
@options.steps
@options.seed
@options.device
@common
def train_teacher(out: Path, as_json: bool, quiet: bool, **settings: Any) -> None:
    """Train a network from labels."""
    from kdcache.methods.config import ObjectiveConfig

    beside = _beside(settings)
    training = _training(settings | {"objective": ObjectiveConfig(method="ce")})
    _train([training], [out], [f"teacher {training.model}"], as_json, quiet, **beside)


@groups.command(
    "train-student",
    "kdcache train-student --store t.zarr --dataset cifar100 --student resnet20 --recipe cifar100/kd --out kd",
    "kdcache train-student --dataset digits --student resnet8 --method dml --seed 0 --seed 1 --out peers",
)
@groups.TEACHER.option(
    "--store",
    "stores",
    type=options.STORE,
    multiple=True,
    help="Store of logits; several of one plan: an ensemble.",
)
@options.expect
@options.dataset
@options.skip_bad
@groups.STUDENT.option(
    "--student", "model", type=options.MODEL, required=True, help="Name; see `kdcache list models`."
)
@groups.OBJECTIVE.option(
    "--method",
    "methods",
    type=options.METHOD,
    multiple=True,
    help="Name; see `kdcache list methods`. Or a --recipe. Several: a student by each.",
)
@groups.OBJECTIVE.option(
    "--recipe",
    "recipes",
    type=options.RECIPE,
    multiple=True,
    help="Published settings, such as cifar100/kd-ls; flags override them. Several: a student by each.",
)
@groups.STUDENT.option(
    "--runs",
    type=options.LOCAL_PATH,
    help="TOML file of students to train side by side: a table [[run]] of options for each.",
)
@options.run_out
@options.samples
@groups.VIEWS.option(
    "--augment",
    type=options.AUGMENTATION,
    help="Views for training without a store [default: as for train-teacher]; with one, the store's "
    "where they are your own.",
)
@groups.VIEWS.option(
    "--schedule",
    default="epoch",
    show_default=True,
    help="epoch: view = epoch mod V; random: any view in memory, per sample.",
)
@groups.VIEWS.option(
    "--resident-views",
    type=click.IntRange(1),
    help="Views in memory for `random` [default: what fits into half of the free memory].",
)
@groups.VIEWS.option(
    "--views-per-decode",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="M views of each image come together in a batch, from a file that is decoded once; a pass over the "
    "samples then counts as M of the --epochs.",
)
@groups.TEACHER.option(
    "--online", type=options.NETWORK, multiple=True, help="Teacher to run in the loop: the control."
)
@options.cache_size
@groups.STUDENT.option(
    "--init-weights", type=options.LOCAL_PATH, help="File of weights to start from."
)
@groups.STUDENT.option(
    "--prune",
    help="structured:0.5 takes out half of the channels of each layer (extra `prune`), unstructured:0.8 zeroes "
    "80% of the weights, a part after each of the first epochs; the others are for recovery.",
)
@groups.STUDENT.option(
    "--prune-by",
    default="magnitude",
    show_default=True,
    help="Choose what goes by magnitude, or by the gradient of the loss.",
)
@groups.STUDENT.option(
    "--prune-epochs",
    type=click.IntRange(1),
    help="At the end of each of so many epochs a part goes [default: a third of --epochs].",
)
@groups.STUDENT.option(
    "--generations",
    type=click.IntRange(1),
    help="So many students, each taught by the one before (born-again networks); --out holds a run and a "
    "store of each.",
)
@options.allow_code
@options.baseline
@options.strict
@options.objective
@options.steps
@groups.OPTIMIZATION.option(
    "--seed",
    "seeds",
    type=options.SEED,
    multiple=True,
    default=(0,),
    show_default=True,
    help="Of the initial weights and the noise. Several: a student of each, side by side.",
)
@groups.OPTIMIZATION.option(
    "--data-seed",
    type=options.SEED,
    help="Of the order of the samples and their choice [default: the --seed; for students side by side of "
    "files, or of --train-samples, the first one's].",
)
@options.device
@common
def train_student(
    out: Path, as_json: bool, quiet: bool, generations: int | None, **settings: Any
) -> None:
    """Train students from labels and cached outputs of their teacher, without the teacher.

    Several seeds, methods, recipes or --runs train side by side: files are decoded once for all, in one order;
    images in memory come to each in its own, unless samples are chosen. Each writes its run into a
    folder of --out.
    """
    from kdcache.augment.custom import is_import_path

    if settings["stores"] and settings["augment"] and not is_import_path(settings["augment"]):
        raise click.UsageError(
            "--augment is for training without a store, or names the MODULE:FUNCTION that the store's "
            "views were made with; other views a store brings itself."
        )
    beside = _beside(settings)
    listed = settings["runs"] is not None
    runs = student_runs(click.get_current_context(), settings)
    several = len(runs) > 1 or listed
    trainings = [_student(run) for run in runs]
    titles = [
        run.name if several else f"student {training.model} by {training.objective.method}"
        for run, training in zip(runs, trainings, strict=True)
    ]
    if generations is not None:
        if several:
            raise click.UsageError(
                "--generations is for one student: give one seed and one method."
            )
        _born_again(trainings[0], out, generations, titles[0], as_json, quiet, **beside)
        return
    outs = [out / run.name if several else out for run in runs]
    _train(trainings, outs, titles, as_json, quiet, **beside)


def _born_again(
    training: Any,
    out: Path,
    generations: int,
    title: str,
    as_json: bool,
    quiet: bool,
    **beside: Any,
) -> None:
    from kdcache.training.generations import born_again

    with progress(quiet, "") as bars:
        result = born_again(
            training, out, generations, Bars(bars, LogLines(quiet), title), **beside
        )
    emit([generation.to_dict() for generation in result], as_json)
    if not quiet:
        rows = [(g.run.name, percent(g.top1), percent(g.ensemble_top1)) for g in result]
        show_table(title, ("", "test top-1", "with those before, averaged"), rows)


def _student(run: StudentRun) -> Any:
    settings = dict(run.settings)
    if recipe := settings.pop("recipe"):
        settings |= from_recipe(recipe, settings, run.given)
    return _training(options.with_objective(settings))


def from_recipe(name: str, settings: dict[str, Any], own: Collection[str] = ()) -> dict[str, Any]:
    """The recipe's options, but for those given on the command line of ``settings``, or named here."""
    from kdcache.training.settings import recipe_options

    published = recipe_options(name, settings["model"], settings["stores"])
    source = click.get_current_context().get_parameter_source
    given = {key for key in published if source(key) is ParameterSource.COMMANDLINE}
    given |= {*own}
    if settings["alpha"] is not None:  # short for both weights
        given |= {"ce_weight", "kd_weight"}
    return {key: value for key, value in published.items() if key not in given}
