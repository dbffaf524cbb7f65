"""train-teacher, train-student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.progress import Progress, TaskID

from kdcache_cli import options
from kdcache_cli.app import common
from kdcache_cli.output import console, emit, percent, progress, say, table


class Bars:
    """An epoch bar and a step bar over one training."""

    def __init__(self, bars: Progress, title: str) -> None:
        self.bars, self.title = bars, title
        self.epochs: TaskID | None = None
        self.steps = bars.add_task("  steps", total=None, note="")

    def note(self, text: str) -> None:
        """Say it above the bars."""
        say(text)

    def step(self, epoch: int, done: int, total: int) -> None:
        """Move the step bar."""
        self.bars.update(self.steps, completed=done, total=total)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """Move the epoch bar and show where the training stands."""
        if self.epochs is None:
            self.epochs = self.bars.add_task(self.title, total=epochs, note="")
        wait = record["data_wait_seconds"] / max(record["seconds"], 1e-9)
        note = (
            f"loss {record['train_loss']:.3f}  test {percent(record['test_top1'])}  "
            f"{record['images_per_second']:,.0f} images/s  wait {wait:.1%}"
        )
        self.bars.update(self.epochs, completed=record["epoch"], total=epochs, note=note)


def _train(
    training: Any, out: Path, title: str, as_json: bool, quiet: bool, **options: Any
) -> None:
    from kdcache.training.preparation import train

    # Of the processes that torchrun starts, one prints.
    first = os.environ.get("RANK", "0") == "0"
    quiet, as_json = quiet or not first, as_json and first
    with progress(quiet, "") as bars:
        run = train(training, out, Bars(bars, title), **options)
    summary = run.summary() or {}
    emit({"run": str(run.path)} | summary, as_json)
    if not quiet:
        rows = [
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
        console.print(table(title, ("", ""), rows))
        say(f"run: {run.path}")


def _training(settings: dict[str, Any]) -> Any:
    """The `Training` that a command's arguments describe; every one of them has its field."""
    from kdcache.training.optim import Optimization
    from kdcache.training.settings import Training

    for name in ("data_root", "init_weights"):
        settings[name] = str(settings[name]) if settings.get(name) else None
    settings["device"] = options.resolve_device(settings["device"])
    steps, rest = options.deal(settings, Optimization, Training)
    return Training(**rest, optimization=Optimization(**steps))


@click.command("train-teacher")
@options.dataset
@options.skip_bad
@click.option("--model", required=True, help="Name; see `kdcache list models`.")
@options.run_out
@click.option("--augment", help="[default: pad-crop-flip, or resized-crop-flip for large images]")
@options.val_split
@options.steps
@options.device
@common
def train_teacher(
    out: Path, as_json: bool, quiet: bool, tensorboard: bool, **settings: Any
) -> None:
    """Train a network from labels."""
    from kdcache.methods.config import ObjectiveConfig

    training = _training(settings | {"objective": ObjectiveConfig(method="ce")})
    title = f"teacher {training.model}"
    _train(training, out, title, as_json, quiet, tensorboard=tensorboard)


@click.command("train-student")
@click.option(
    "--store", "stores", multiple=True, help="Store of logits; several of one plan: an ensemble."
)
@options.expect
@options.dataset
@options.skip_bad
@click.option("--student", "model", required=True, help="Name; see `kdcache list models`.")
@options.recipe
@options.run_out
@options.samples
@click.option(
    "--augment",
    help="Views for training without a store [default: as for train-teacher]; with one, the store's "
    "where they are your own.",
)
@click.option(
    "--schedule",
    default="epoch",
    show_default=True,
    help="epoch: view = epoch mod V; random: any view in memory, per sample.",
)
@click.option(
    "--resident-views",
    type=click.IntRange(1),
    help="Views in memory for `random` [default: what fits into half of the free memory].",
)
@click.option("--online", multiple=True, help="Teacher to run in the loop: the control.")
@options.cache_size
@click.option("--init-weights", type=options.LOCAL_PATH, help="File of weights to start from.")
@click.option(
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
@options.device
@common
def train_student(
    out: Path,
    as_json: bool,
    quiet: bool,
    recipe: str | None,
    tensorboard: bool,
    generations: int | None,
    allow_code: bool,
    baseline: Path | None,
    strict: bool,
    expect: tuple[str, ...],
    **settings: Any,
) -> None:
    """Train a student from labels and cached outputs of its teacher, without the teacher."""
    from kdcache.augment.custom import is_import_path

    if recipe:
        settings |= from_recipe(recipe, settings)
    if settings["method"] is None:
        raise click.UsageError("give --method (see `kdcache list methods`) or --recipe.")
    if settings["stores"] and settings["augment"] and not is_import_path(settings["augment"]):
        raise click.UsageError(
            "--augment is for training without a store, or names the MODULE:FUNCTION that the store's "
            "views were made with; other views a store brings itself."
        )
    training = _training(options.with_objective(settings))
    title = f"student {training.model} by {training.objective.method}"
    how: dict[str, Any] = {
        "tensorboard": tensorboard,
        "allow_code": allow_code,
        "baseline": baseline,
        "strict": strict,
        "expect": expect,
    }
    if generations is None:
        _train(training, out, title, as_json, quiet, **how)
        return
    from kdcache.training.generations import born_again

    with progress(quiet, "") as bars:
        result = born_again(training, out, generations, Bars(bars, title), **how)
    emit([generation.to_dict() for generation in result], as_json)
    if not quiet:
        rows = [(g.run.name, percent(g.top1), percent(g.ensemble_top1)) for g in result]
        console.print(table(title, ("", "test top-1", "with those before, averaged"), rows))


def from_recipe(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The recipe's options, but for those given on the command line of ``settings``."""
    from kdcache.training.settings import recipe_options

    published = recipe_options(name, settings["model"], settings["stores"])
    source = click.get_current_context().get_parameter_source
    given = {key for key in published if source(key) is ParameterSource.COMMANDLINE}
    if settings["alpha"] is not None:  # short for both weights
        given |= {"ce_weight", "kd_weight"}
    return {key: value for key, value in published.items() if key not in given}
