"""How commands are described: their options in groups, two examples below."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import cloup
from cloup import OptionGroup

DATA = OptionGroup("Data")
TEACHER = OptionGroup("Teacher and stores")
STUDENT = OptionGroup("Student")
VIEWS = OptionGroup("Views")
OBJECTIVE = OptionGroup("Objective")
OF_METHODS = OptionGroup("Options of single methods")
OPTIMIZATION = OptionGroup("Optimization")
MACHINE = OptionGroup("Machine")
OUTPUT = OptionGroup("Output")

#: The order in which a page of help shows them.
GROUPS = (DATA, TEACHER, STUDENT, VIEWS, OBJECTIVE, OF_METHODS, OPTIMIZATION, MACHINE, OUTPUT)


class GroupedCommand(cloup.Command):
    """A command whose help shows its groups of options in the order of `GROUPS`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        titles = [group.title for group in GROUPS]
        # cloup writes a command's options into the groups, which all commands share: keep copies.
        groups = [copy.copy(group) for group in self.option_groups]
        self.option_groups = sorted(groups, key=lambda group: titles.index(group.title))


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
