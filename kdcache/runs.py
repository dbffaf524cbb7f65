"""A run: the directory that a training leaves behind.

    RUN/config.toml        everything that decides the result, resolved, with the digests of the stores read,
                           and of a pruned network the widths of its layers;
                           [[resumed]] for each resume by another version of kdcache than began it
    RUN/metrics.jsonl      one line per epoch
    RUN/model.safetensors  the weights after the last epoch
    RUN/checkpoint.pt      what is needed to go on after the last finished epoch
    RUN/summary.json       last and best accuracy, seconds per epoch, teacher forwards
    RUN/tensorboard/       events, where they were asked for
    RUN/writer.lock        who trains here now; one that a killed training left locks nothing

Files are written to a temporary name, flushed and renamed, so a killed run leaves whole files. Nothing
in a run is ever executed: TOML, JSON and safetensors are data, and the checkpoint is read with
``weights_only=True``.
"""

from __future__ import annotations

import io
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import safetensors
import safetensors.torch
import tomli_w
import torch
from torch import nn

from kdcache import run_schema
from kdcache.data.item import Item
from kdcache.methods.config import ObjectiveConfig
from kdcache.models.projected import from_spec
from kdcache.models.zoo import build_model
from kdcache.preprocessing import Inputs, inputs_from_dict
from kdcache.pruning.narrowing import narrow
from kdcache_stores.errors import (
    DataError,
    MismatchError,
    StoreInUse,
    TrainingError,
    UsageError,
    about,
    naming,
)
from kdcache_stores.objects.files import LocalFiles
from kdcache_stores.objects.urls import require_local

CONFIG, METRICS, WEIGHTS, CHECKPOINT, SUMMARY, TENSORBOARD, LOCK = (
    "config.toml",
    "metrics.jsonl",
    "model.safetensors",
    "checkpoint.pt",
    "summary.json",
    "tensorboard",
    "writer.lock",
)


class _Sink(io.RawIOBase):
    """A file that takes every write, and keeps the first error for `raise_error`.

    PyTorch writes archives from C++. An error under it comes out as another, or ends the process.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Write all of it; its size in bytes."""
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def raise_error(self) -> None:
        """Raise what a write has met."""
        if self.error is not None:
            raise self.error


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all: temporary name in the same folder, fsync, rename.

    Raises `OSError` with the file's name.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with open(temporary, "wb") as stream:
                sink = _Sink(stream)
                write(sink)  # type: ignore[arg-type]
                sink.raise_error()
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Be the one training that writes this run, until the end of the block or of the process.

    A finished run is only read, by any number.

    Raises:
        UsageError: the path is a file.
        TrainingError: another training is writing it; names the process and the machine.
    """
    _require_no_file(Path(require_local(path)))
    if (path / SUMMARY).exists():
        yield
        return
    with ExitStack() as held:
        try:
            held.enter_context(LocalFiles(path).lock(LOCK))
        except StoreInUse as error:
            raise TrainingError(f"one training writes a run at a time. {error}") from None
        yield


def _require_no_file(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; --out needs a directory for the run.")


class Run:
    """The directory of one training; see the module's docstring for its files.

    Args:
        path: the directory; made if it is not there.
        config: the resolved configuration, tables of TOML values (no None).

    Raises:
        UsageError: the directory holds something that is no run.
        MismatchError: it holds a run of another configuration; the first differing entry is named.
    """

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        self.path = Path(require_local(path))
        self.config = config
        _require_no_file(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        if (self.path / CONFIG).exists():
            with about(str(self.path / CONFIG)):
                self._require_same(read_config(self.path, ()))
        elif any(file.name not in (TENSORBOARD, LOCK) for file in self.path.iterdir()):
            raise UsageError(
                f"{self.path} is not empty and holds no {CONFIG}, so it is no run; "
                "choose another --out."
            )
        else:
            write_atomically(self.path / CONFIG, lambda s: s.write(tomli_w.dumps(config).encode()))

    def _require_same(self, old: Mapping[str, Any]) -> None:
        was, now = flatten(dict(old) | _objective_of_now(old)), flatten(self.config)
        differ = [
            key
            for key in sorted(was.keys() | now.keys())
            if not (key in _FREE_ON_RESUME or key.startswith(_NOT_COMPARED))
            and was.get(key) != now.get(key)
        ]
        if not differ:
            return
        # What others follow from comes first: another method has other settings of its own.
        first = next((key for key in _NAMED_FIRST if key in differ), differ[0])
        more = f" and {len(differ) - 1} more differ" if len(differ) > 1 else ""
        begun = (self.path / CHECKPOINT).exists()
        instead = "" if begun else "; it has not finished an epoch, so you may also delete it"
        versions = was.get("kdcache"), now.get("kdcache")
        by = f" (by kdcache {versions[0]}, this is {versions[1]})" if len(set(versions)) > 1 else ""
        raise MismatchError(
            f"{self.path} holds a run with another configuration{by}: {first} was "
            f"{was.get(first)!r}, now {now.get(first)!r}{more}. Use the old value to go on with that "
            f"run, or another --out for a new one{instead}."
        )

    def note_version(self, epochs_done: int) -> str | None:
        """Record that another version of kdcache than the last goes on with this run.

        Args:
            epochs_done: how many epochs the versions before it finished.

        Returns:
            What to tell the user, or None where the version is the same.
        """
        began = read_config(self.path, ())
        resumed = began.get("resumed", [])
        was, now = (resumed[-1] if resumed else began).get("kdcache"), self.config.get("kdcache")
        if was == now:
            return None
        resumed = [*resumed, {"after_epoch": epochs_done, "kdcache": now}]
        text = tomli_w.dumps(began | {"resumed": resumed})
        write_atomically(self.path / CONFIG, lambda s: s.write(text.encode()))
        return (
            f"{epochs_done} epochs of {self.path} were trained by kdcache {was}, the rest is by {now}: its "
            "config records both. The result may differ from that of one version."
        )

    # -- metrics ------------------------------------------------------------------------------
    def metrics(self) -> list[dict[str, Any]]:
        """The records of the finished epochs, oldest first."""
        return read_metrics(self.path)

    def keep_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """Drop records past ``epochs``: those of an epoch that finished without its checkpoint."""
        kept = [record for record in self.metrics() if record["epoch"] <= epochs]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(self.path / METRICS, lambda s: s.write(text.encode()))
        return kept

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one epoch's record to ``metrics.jsonl``."""
        file = self.path / METRICS
        with naming(file), open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    # -- state --------------------------------------------------------------------------------
    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint by ``state`` (tensors, numbers, strings, lists and dicts).

        Raises `OSError` with its name, where the disk is full.
        """
        write_atomically(self.path / CHECKPOINT, lambda s: torch.save(dict(state), s))

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The last checkpoint, or None where the run has none yet."""
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged archive
            raise DataError(
                f"{path} cannot be read ({error}); delete it to start this run again."
            ) from error
        return state

    def finish(self, model: nn.Module, summary: Mapping[str, Any]) -> None:
        """Write the weights and then the summary, whose presence means that the run is complete."""
        state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        blob = safetensors.torch.save(state)
        write_atomically(self.path / WEIGHTS, lambda s: s.write(blob))
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(self.path / SUMMARY, lambda s: s.write(text.encode()))

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None."""
        if not (self.path / SUMMARY).exists():
            return None
        return read_summary(self.path, run_schema.OF_A_SUMMARY)


# What to name first where a run's configuration differs.
_NAMED_FIRST = ("objective.method", "data.name", "model.name", "data.fingerprint", "training.prune")

# Where a run's data and stores lie, and what computes it, may change between a start and its resume.
_FREE_ON_RESUME = {"kdcache", "data.root", "training.device", "training.threads"}
_NOT_COMPARED = ("store_paths.", "resumed.", "computing.")


def _objective_of_now(config: Mapping[str, Any]) -> dict[str, Any]:
    """The loss of a run with every default filled in that an older version did not know."""
    objective = config.get("objective", {})
    if not objective:
        return {}
    return {"objective": ObjectiveConfig.from_dict(objective).resolved().to_dict()}


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted name; the items of a list by their number."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, (list, tuple)):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether the directory holds a run's config."""
    return (Path(path) / CONFIG).is_file()


def read_config(
    path: str | os.PathLike[str], needed: Sequence[str] = run_schema.OF_A_RUN
) -> dict[str, Any]:
    """The resolved configuration of a run.

    Args:
        needed: dotted names of what it must hold.

    Raises:
        DataError: there is no run, or its config is not TOML or not one that a training wrote.
    """
    file = Path(path) / CONFIG
    try:
        config = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is not a run: {_instead(Path(path))}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{file} is not valid TOML: {error}") from error
    return run_schema.require_shape(config, run_schema.CONFIG, needed, file)


def _instead(path: Path) -> str:
    """Of a folder that is no run, what to give in its place."""
    inside = sorted(child for child in path.iterdir() if is_run(child)) if path.is_dir() else []
    if inside:
        more = f", ... ({len(inside)} in all)" if len(inside) > 10 else ""
        return f"it is a folder of runs. Give one of them: {', '.join(map(str, inside[:10]))}{more}"
    return (
        f"it holds no {CONFIG}. Give a directory made by `kdcache train-teacher` or "
        "`kdcache train-student`."
    )


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, oldest first; a torn last line is left out.

    Raises:
        DataError: another line is none that a training wrote.
    """
    file = Path(path) / METRICS
    lines = file.read_bytes().splitlines() if file.exists() else []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        where = f"{file}: line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise DataError(f"{where} is not valid JSON: {error}") from error
        records.append(run_schema.require_shape(record, run_schema.RECORD, ("epoch",), where))
    return records


def read_summary(
    path: str | os.PathLike[str], needed: Sequence[str] = ("last_top1",)
) -> dict[str, Any]:
    """The summary of a finished run.

    Args:
        needed: names of what it must hold.

    Raises:
        DataError: not a finished run, or a summary that is not JSON or not one that a training wrote.
    """
    file = Path(path) / SUMMARY
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} holds no {SUMMARY}: it is no finished run.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    return run_schema.require_shape(summary, run_schema.SUMMARY, needed, file)


class RunModel(NamedTuple):
    """A trained model: module (eval mode, CPU), preprocessing, the run's config, file of weights."""

    module: nn.Module
    preprocessing: Inputs
    config: dict[str, Any]
    file: Path


def build(spec: Mapping[str, Any], allow_code: bool) -> nn.Module:
    """The network that a run's ``[model]`` table names, with fresh weights.

    Raises:
        UsageError: it is a user's own (MODULE:FUNCTION) and ``allow_code`` is off.
    """
    name = spec["name"]
    if ":" in name and name.partition(":")[0] not in ("torchvision", "timm") and not allow_code:
        raise UsageError(
            f"the network is made by {name}, code that is not kdcache's. If you trust it, "
            "dump-teacher, train-student, evaluate and export import and run it with --allow-code "
            "(allow_code=True)."
        )
    if "item" in spec:
        network = build_model(name, spec["classes"], item=Item.from_dict(spec["item"]))
    else:
        network = build_model(name, spec["classes"], spec["channels"], spec["size"])
    if "projector" in spec:
        network = from_spec(network, spec["classes"], spec["projector"])
    return narrow(network, spec["widths"]) if "widths" in spec else network


def trained_size(spec: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the images that a run's ``[model]`` was trained at; None for other items."""
    return None if "item" in spec else (spec.get("height", spec["size"]), spec["size"])


def load_run_model(path: str | os.PathLike[str], allow_code: bool = False) -> RunModel:
    """The trained model of a finished run.

    Args:
        path: the run's directory.
        allow_code: import and call the function that the run names, if its network is a user's own
            (MODULE:FUNCTION). A run is data, so without this another's run starts nobody's code.

    Raises:
        UsageError: the network is a user's own and ``allow_code`` is off.
        DataError: not a run, unfinished (no weights), or weights that do not fit its config.
    """
    config = read_config(path)
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise DataError(
            f"{path} has no {WEIGHTS}: the run did not finish. Run its command again to go on."
        )
    where = Path(path) / CONFIG
    inputs = ("model.item",) if "item" in config["model"] else ("model.channels", "model.size")
    needed = ("model.classes", *inputs, "preprocessing")
    run_schema.require_shape(config, {}, needed, where)
    with about(str(where)):
        module = build(config["model"], allow_code)
        preprocessing = inputs_from_dict(config["preprocessing"])
    try:
        module.load_state_dict(safetensors.torch.load_file(file))
    except (safetensors.SafetensorError, RuntimeError) as error:
        name = config["model"]["name"]
        raise DataError(f"{file} does not hold the weights of {name}: {error}") from error
    return RunModel(module.eval(), preprocessing, config, file)
