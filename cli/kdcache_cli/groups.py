"""How commands are described: their options in groups, two examples below."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import click
import cloup
from cloup import OptionGroup

DATA = OptionGroup("Data")
TEACHER = OptionGroup("Teacher and stores")
STUDENT = OptionGroup("Student")
NETWORK = OptionGroup("Network")
VIEWS = OptionGroup("Views")
OBJECTIVE = OptionGroup("Objective")
OF_METHODS = OptionGroup("Options of single methods")
OPTIMIZATION = OptionGroup("Optimization")
MACHINE = OptionGroup("Machine")
OUTPUT = OptionGroup("Output")

#: The order in which a page of help shows them.
GROUPS = (
    DATA,
    TEACHER,
    STUDENT,
    NETWORK,
    VIEWS,
    OBJECTIVE,
    OF_METHODS,
    OPTIMIZATION,
    MACHINE,
    OUTPUT,
)


#: By command, what to say of an option that it lacks and people look for.
INSTEAD = {
    name: {"--size": "the size of the views is their augmentation's, such as "
                     f"--augment resized-crop-flip:size=64{where}"}
    for name, where in (("train-teacher", ""), ("train-student", "; of a store's views it is stored"))
}  # fmt: skip


class GroupedCommand(cloup.Command):
    """A command whose help shows its groups of options in the order of `GROUPS`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        titles = [group.title for group in GROUPS]
        # cloup writes a command's options into the groups, which all commands share: keep copies.
        groups = [copy.copy(group) for group in self.option_groups]
        self.option_groups = sorted(groups, key=lambda group: titles.index(group.title))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, but an option that another way of saying replaces is answered with that."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if instead := INSTEAD.get(self.name or "", {}).get(error.option_name):
                raise click.UsageError(
                    f"No such option {error.option_name}: {instead}", ctx
                ) from None
            raise


def command(name: str, *examples: str) -> Callable[[Callable[..., Any]], GroupedCommand]:
    """A decorator that makes a command of a function.

    Args:
        name: of the command.
        examples: lines that somebody could type, shown at the end of its help.
    """
    text = "\n".join(("Examples:", *(f"  {line}" for line in examples)))
    made: Callable[[Callable[..., Any]], GroupedCommand]
    made = cloup.command(name, cls=GroupedCommand, epilog=f"\b\n{text}")
    return made
