"""The group of commands, their common options, and how errors become one line and an exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click

from kdcache._version import __version__
from kdcache_cli.groups import OUTPUT
from kdcache_cli.needs import require_needs

# Command -> (module:function that is it, its line of help). Modules are imported when their command runs,
# so that `kdcache -h`, `inspect` and `verify` do without importing torch.
COMMANDS = {
    "demo": (
        "demonstrating:demo",
        "Teacher, store and students on embedded data, compared in one table.",
    ),
    "train-teacher": ("training:train_teacher", "Train a network from labels."),
    "dump-teacher": (
        "dumping:dump_teacher",
        "Run a teacher once and store its logits for every view.",
    ),
    "seal": ("making:seal", "Finish a store whose parts several jobs dumped."),
    "train-student": ("training:train_student", "Train a student from labels and cached logits."),
    "check": (
        "checking:check",
        "Check stores, settings or a run: what will likely go wrong, and a remedy.",
    ),
    "evaluate": ("evaluating:evaluate", "Accuracy, calibration, cost and agreement of a network."),
    "compare": (
        "evaluating:compare",
        "Size, speed and accuracy of runs and exported files in one table.",
    ),
    "export": ("evaluating:export", "Write a trained network as a file that others can run."),
    "report": ("reporting:report", "A page of figures about runs and stores."),
    "bench": ("measuring:bench", "Measure the claims of the README on this machine."),
    "inspect": ("inspecting:inspect", "Describe a store."),
    "verify": ("inspecting:verify", "Check every byte of a store."),
    "import": ("making:import_logits", "Make a store of logits in an .npz file."),
    "export-views": (
        "making:export_views",
        "Write the parameters of every view as a Parquet table.",
    ),
    "push": ("sharing:push", "Copy a sealed store to a folder, bucket or the Hub."),
    "pull": ("sharing:pull", "Copy a store, or some of its views, to this disk."),
    "ls": ("cataloguing:ls", "List the stores in a folder, bucket or on a web server."),
    "diff": ("cataloguing:diff", "Compare two stores, view by view."),
    "card": ("cataloguing:card", "Write a store's README.md and croissant.json."),
    "cache": ("sharing:cache", "Show or clear the local cache of remote stores."),
    "list": (
        "listing:list_names",
        "Names of models, datasets, methods, augmentations, encodings, recipes; the words of kdcache.",
    ),
}


class LazyGroup(click.Group):
    """A group whose commands live in modules that are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a newcomer needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(f"kdcache_cli.commands.{module}"), function)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but an unknown command is answered with the closest name."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            from kdcache_stores.errors import UnknownName

            raise click.UsageError(str(UnknownName("command", args[0], COMMANDS)), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", prog_name="kdcache")
def app() -> None:
    """Knowledge distillation from a cache: run the teacher once, train any student from its logits.

    What store, view, plan, seal and break-even mean: kdcache list words.
    """


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command has: --json, --quiet, --debug. With --json it is quiet too.

    An option that would do nothing beside the others is refused (`kdcache_cli.needs`).
    """

    @OUTPUT.option(
        "--json", "as_json", is_flag=True, help="Results as one JSON document on stdout."
    )
    @OUTPUT.option("-q", "--quiet", is_flag=True, help="No progress and no page for people.")
    @OUTPUT.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def command(*args: Any, debug: bool, as_json: bool, quiet: bool, **kwargs: Any) -> Any:
        require_needs(click.get_current_context())
        return function(*args, as_json=as_json, quiet=quiet or as_json, **kwargs)

    return command


def main(args: list[str] | None = None) -> int:
    """Run the command line; the exit code: 0 done, 1 data or store wrong, 2 wrong usage, 130 Ctrl-C."""
    debug = "--debug" in (sys.argv[1:] if args is None else args)
    try:
        os.getcwd()
    except OSError:  # NumPy cannot even be imported there by Python 3.13
        click.echo("error: the current folder was deleted: change to another one", err=True)
        return 1
    try:
        code = app.main(args=args, prog_name="kdcache", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        from kdcache_stores.printable import printable

        vars(error).update(message=printable(error.message))
        error.show()
        return error.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to go on where it stopped", err=True)
        return 130
    except BrokenPipeError:
        # Whoever read our output went away (`kdcache inspect ... | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from kdcache_stores.errors import KDCacheError, TrainingError, UsageError, explain
        from kdcache_stores.printable import printable

        if debug or not isinstance(error, (KDCacheError, OSError)):
            raise
        first, *more = error.args if isinstance(error, TrainingError) else [explain(error)]
        for line in (f"error: {first}", *more):
            click.echo(printable(line), err=True)
        return 2 if isinstance(error, UsageError) else 1
