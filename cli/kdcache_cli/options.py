"""Options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, in reading order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


dataset = together(
    click.option("--dataset", required=True, help="Name; see `kdcache list datasets`."),
    click.option(
        "--data-root",
        type=click.Path(path_type=Path),
        help="Folder of the datasets [default: `data` in the user's cache folder].",
    ),
    click.option("--download", is_flag=True, help="Fetch the dataset if it is not there."),
)

device = together(
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.",
    ),
    click.option("--workers", default=0, show_default=True, help="Processes that decode image files."),
    click.option(
        "--threads",
        type=click.IntRange(1),
        help="Compute threads on the CPU; 1 is fastest for tiny networks.",
    ),
)

steps = together(
    click.option("--epochs", type=click.IntRange(1), default=240, show_default=True),
    click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True),
    click.option("--lr", type=float, default=0.05, show_default=True),
    click.option("--momentum", type=float, default=0.9, show_default=True),
    click.option("--weight-decay", type=float, default=5e-4, show_default=True),
    click.option("--nesterov", is_flag=True),
    click.option(
        "--schedule",
        default="step",
        show_default=True,
        help="step (a tenth after 62.5, 75 and 87.5% of the epochs), cosine or constant.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Of the initial weights, the order of the samples and their choice, and the noise.",
    ),
)

run_out = click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory of the run; an interrupted run is continued.",
)


def resolve_device(name: str) -> str:
    """"auto" becomes the GPU if there is one.

    Raises:
        UsageError: a device that this machine does not have.
    """
    import torch

    from kdcache_stores.errors import UsageError

    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found.type if found else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: not on this machine ({reason}); try cpu.") from error
    return name


def optimization(settings: dict[str, Any]) -> Any:
    """Take the `steps` options (but the seed) out of a command's arguments."""
    from kdcache.optim import Optimization

    names = ("epochs", "batch_size", "lr", "momentum", "weight_decay", "nesterov", "schedule")
    return Optimization(**{name: settings.pop(name) for name in names})
