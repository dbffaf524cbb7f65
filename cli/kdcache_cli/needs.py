"""Options that do something only beside others: which, in one table; one that would do nothing is refused."""

from __future__ import annotations

import click
from click.core import ParameterSource

#: By command, for an option what it needs: another option, that one with a value, an argument, or one of
#: several such with " or " between; "no" before an option: that it is not given, "several": more than once.
NEEDS: dict[str, dict[str, str]] = {
    "train-teacher": {
        "--milestones": "--lr-schedule step",
        "--momentum": "--optimizer sgd",
        "--nesterov": "--optimizer sgd",
    },
    "train-student": {
        "--milestones": "--lr-schedule step",
        "--momentum": "--optimizer sgd",
        "--nesterov": "--optimizer sgd",
        "--resident-views": "--schedule random",
        "--prune-by": "--prune",
        "--prune-epochs": "--prune",
        "--subset": "--store",
        "--cache-size": "--store",
        "--combine": "several --store or several --online",
        "--teacher-weights": "several --store or several --online",
    },
    "check": {
        "--cache-size": "STORES or --run",
        "--data-root": "--dataset or --run",
        "--download": "--dataset",
        "--seed": "--dataset",
        "--subset": "--dataset",
    },
    "evaluate": {"--augment": "--store"},
    "compare": {"--augment": "--store"},
    "export": {
        "--quantize": "--format onnx",
        "--calibration": "--quantize",
        "--store": "--quantize",
        "--data-root": "--quantize",
        "--augment": "--store",
    },
    "import": {
        "--augment": "--dataset",
        "--data-root": "--dataset",
        "--seed": "--dataset",
        "--split": "--dataset",
    },
    "verify": {
        "--augment": "--teacher",
        "--data-root": "--teacher",
        "--dataset": "--teacher",
        "--rows": "--teacher",
    },
    "report": {"--teacher": "RUNS", "--toy-case": "RUNS"},
    "bench": {"--gpu": "no --quick"},
}


def require_needs(ctx: click.Context) -> None:
    """Refuse an option on the command line that would do nothing, by `NEEDS`.

    Raises:
        click.UsageError: it lacks what it needs.
    """
    params = {word: param for param in ctx.command.params for word in words_of(param)}
    for flag, needs in NEEDS.get(ctx.command.name or "", {}).items():
        source = ctx.get_parameter_source(params[flag].name or "")
        if source is not ParameterSource.COMMANDLINE:
            continue
        if any(_holds(ctx, params, need) for need in needs.split(" or ")):
            continue
        if needs.startswith("no "):
            other = needs.removeprefix("no ")
            raise click.UsageError(
                f"{flag} does nothing beside {other}: leave out one of them.", ctx
            )
        raise click.UsageError(f"{flag} does nothing here: it needs {needs}.", ctx)


def words_of(param: click.Parameter) -> list[str]:
    """How the table names a parameter: an option's flags, an argument in capitals."""
    return param.opts if isinstance(param, click.Option) else [(param.name or "").upper()]


def _holds(ctx: click.Context, params: dict[str, click.Parameter], need: str) -> bool:
    how, _, flag = need.rpartition(" ") if need.startswith(("no ", "several ")) else ("", "", need)
    flag, _, value = flag.partition(" ")
    given = ctx.params.get(params[flag].name or "")
    if how:
        return not given if how == "no" else len(given or ()) > 1
    return bool(given == value if value else given)
