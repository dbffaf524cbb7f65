"""check: what will go wrong with stores, settings and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kdcache_cli import groups, options
from kdcache_cli.app import common
from kdcache_cli.commands.training import from_recipe
from kdcache_cli.output import emit, show_line


@groups.command(
    "check",
    "kdcache check t.zarr --dataset cifar100",
    "kdcache check --run runs/kd",
)
@click.argument("stores", nargs=-1, type=options.STORE)
@options.expect
@groups.STUDENT.option(
    "--student", "model", type=options.MODEL, help="Its model, as for train-student."
)
@options.recipe
@options.dataset_name("The student's; needed for a part of it, and for --teacher.")
@options.data_root
@options.download
@options.samples
@options.seed
@options.epochs
@options.baseline
@groups.TEACHER.option(
    "--teacher",
    type=options.NETWORK,
    help="The store's teacher: tried on a few clean images with other normalisations, sizes and "
    "channel orders.",
)
@groups.STUDENT.option(
    "--run",
    type=options.LOCAL_PATH,
    help="A finished run: everything as it was trained, and whether it fits its targets.",
)
@options.cache_size
@options.strict
@options.objective
@options.device_alone
@common
def check(
    stores: tuple[str, ...],
    recipe: str | None,
    run: Path | None,
    strict: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> int:
    """Check STORES, and the student that will be trained from them with the given options.

    Where all is well there are no findings. A sample of the logits is read, some thousand rows of a few views.
    """
    from kdcache.checks.check import CheckRequest, check_stores

    settings["stores"] = stores
    settings["device"] = options.resolve_device(settings["device"])
    source = click.get_current_context().get_parameter_source
    given = {name for name in settings if source(name) is ParameterSource.COMMANDLINE}
    if run is not None:
        mine = {name: settings[name] for name in ("baseline", "teacher", "device", "data_root")}
        if others := sorted(given - {*mine, "stores"}):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            raise click.UsageError(f"--run takes its settings from the run: leave out {flags}.")
        asked = CheckRequest.of_run(run, stores, **_texts(mine))
    elif not stores:
        raise click.UsageError("give the STORES to check, or a --run.")
    else:
        asked = _asked(settings, recipe, given)
    findings = check_stores(asked)
    emit({"findings": [finding.to_dict() for finding in findings]}, as_json)
    for finding in findings:
        show_line(f"warning: {finding}", as_json)
    if not findings:
        show_line("nothing to warn of", quiet)
    return 1 if strict and findings else 0


def _asked(settings: dict[str, Any], recipe: str | None, given: set[str]) -> Any:
    from kdcache.checks.check import CheckRequest
    from kdcache.methods.config import ObjectiveConfig

    if recipe:
        # Of the optimization only the number of epochs is checked.
        published = from_recipe(recipe, settings)
        settings |= {name: value for name, value in published.items() if name in settings}
    named = settings["method"] is not None
    loss = {*ObjectiveConfig.flags(), "biased_std", "reverse_kl", "teacher_weights"}
    if not named and (alone := sorted(given & loss)):
        raise click.UsageError(f"{', '.join(alone)}: of which --method (or --recipe)?")
    settings["student"] = settings.pop("model")
    values = options.with_objective(settings)
    (values,) = options.deal(values if named else values | {"objective": None}, CheckRequest)
    return CheckRequest(**_texts(values))


def _texts(values: dict[str, Any]) -> dict[str, Any]:
    """The same with paths as text."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
