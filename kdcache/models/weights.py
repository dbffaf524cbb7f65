"""Weights from files, without running anybody's code: safetensors, or torch files as data only."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdcache_stores.errors import DataError, MismatchError, UnknownName, UsageError

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".tar", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

#: Where published checkpoints keep their state dict, in the order in which they are tried.
NESTS = ("state_dict", "model", "net", "model_state_dict", "model_state")

#: Networks by name: functions of (classes, channels).
Networks = Mapping[str, Callable[[int, int], nn.Module]]
NONE: Networks = {}

#: What wrappers (DataParallel, torch.compile) put before every name.
PREFIXES = ("module.", "_orig_mod.")

SCRIPTED = (
    "it is a TorchScript archive, which holds code. Where you trust it, convert it once: "
    "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
)

CONVERT = (
    "it holds pickled code, not only weights. Where you trust it, convert it once: "
    "content = torch.load(FILE, weights_only=False); torch.save(content.state_dict(), 'weights.pt'). "
    "Where the file holds a dict, it is content['model'] (weights) or content['model'].state_dict() (a "
    "network) in place of content.state_dict()"
)


@dataclass(frozen=True)
class Weights:
    """A state dict read from a file, its names without wrappers' prefixes.

    Args:
        state: name -> tensor, on the CPU.
        path: the file that it came from.
        file_sha256: of the file's bytes, hexadecimal.
        entry: of the file that was taken, "model_ema" say; None where the file is the state dict itself.
    """

    state: dict[str, Tensor]
    path: Path
    file_sha256: str
    entry: str | None = None

    def classes(self, module: nn.Module, classes: int) -> int:
        """How many classes these weights of a network are for, whatever the order of their names.

        Args:
            module: the network, built for ``classes``: where it alone differs from the weights in the
                first axis of some layers, these are the layers of its classes.

        Returns:
            ``classes`` too where the weights differ otherwise: `apply` says how.
        """
        expected = module.state_dict()
        state = _within(expected, self.state, str(self.path))
        shapes = [(expected[n].shape, t.shape) for n, t in state.items() if n in expected]
        differ = [(ours, theirs) for ours, theirs in shapes if ours != theirs]
        counts = {theirs[:1] for _, theirs in differ}
        alike = all(o[0] == classes and o[1:] == t[1:] for o, t in differ if len(o) and len(t))
        return counts.pop()[0] if alike and len(counts) == 1 and all(counts) else classes

    def apply(self, module: nn.Module, name: str | None = None, zoo: Networks = NONE) -> None:
        """Load into a module; every name and every shape must agree.

        Args:
            name: what errors call the module (default: its class).
            zoo: networks that these weights may be of instead.

        Raises:
            MismatchError: naming missing and unexpected names, shapes that differ, a wrong class count
                as such, and networks of the zoo that the weights fit.
        """
        name = name or type(module).__name__
        try:
            apply_state(module, self.state, str(self.path), name)
        except MismatchError as error:
            others = fitting(self.state, zoo, str(self.path))
            if not others or name in others:
                raise
            raise MismatchError(f"{error}. They fit {' and '.join(others)}") from None


def load_weights(path: str | Path) -> Weights:
    """Read `.safetensors`, or a torch file (`.pt`, `.pth`, `.th`, `.tar`) with weights_only=True.

    The state dict may be nested under "state_dict", "model", "net" or as the only one under another
    name, and its names may begin with "module." or "_orig_mod.". ``FILE#ENTRY`` takes what lies under
    one name of the file: "w.pth#model_ema", or "w.ckpt#teacher" of names that begin with "teacher.".

    Raises:
        DataError: no such file or entry, not readable, pickled code, no state dict in it, or one network
            with several weights, as beside their moving average.
        UsageError: a suffix of neither kind.
    """
    path, entry = split_entry(path)
    if not path.is_file():
        raise DataError(f"weights {path}: there is no such file")
    if path.suffix == ".safetensors":
        content: Any = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        content = _read_torch(path)
    else:
        raise UsageError(f"weights {path}: expected a file ending in {', '.join(SUFFIXES)}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    taken, state = _find_state(content, path, entry)
    return Weights(_strip(state), path, digest, taken)


def split_entry(source: str | Path) -> tuple[Path, str | None]:
    """ "w.pth#model_ema" -> the file w.pth and its entry model_ema; None where none is named."""
    file, _, entry = str(source).rpartition("#")
    if Path(file).suffix not in SUFFIXES or Path(source).exists():
        return Path(source), None
    return Path(file), entry


def names_file(text: str) -> bool:
    """Whether a text means a file of weights rather than a library's name for some."""
    return split_entry(text)[0].suffix in SUFFIXES or Path(text).exists()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"weights {path}: not a readable safetensors file ({error})") from None


def _read_torch(path: Path) -> Any:
    if path.stat().st_size == 0:
        raise DataError(f"weights {path}: the file is empty (0 bytes)")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise DataError(f"weights {path}: {SCRIPTED}")
    # RepDistiller keeps its command line, an argparse.Namespace (plain data), beside the weights.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        cause = str(error).splitlines()
        if any("Unsupported" in line or "allowed global" in line for line in cause):
            raise DataError(f"weights {path}: {CONVERT}") from None
        raise DataError(f"weights {path}: not a readable torch file ({cause[0]})") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise DataError(f"weights {path}: not a readable torch file ({error})") from None


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(name, str) and isinstance(t, Tensor) for name, t in content.items())
    )


def _find_state(
    content: Any, path: Path, entry: str | None
) -> tuple[str | None, dict[str, Tensor]]:
    """The state dict of a file, and the name of its entry."""
    if not isinstance(content, Mapping):
        raise DataError(f"weights {path}: expected a state dict, found {type(content).__name__}")
    entries = dict(_state_dicts(content))
    if entry is not None:
        return entry, _entry(entries, path, entry)
    if "" in entries:
        return None, entries[""]
    if not entries and any(isinstance(item, Tensor) for item in content.values()):
        raise DataError(f"weights {path}: {_mixed(content)}")
    nested = [nest for nest in NESTS if nest in entries]
    if not nested and len(entries) != 1:
        raise DataError(
            f"weights {path}: expected a state dict (names and tensors), at the top or under "
            f"{', '.join(NESTS)}; found: {_few(map(str, content)) or 'nothing'}"
            + (f", of which {_choice(path, list(entries))}" if entries else "")
        )
    taken = (nested or list(entries))[0]
    rivals = [name for name in entries if _is_rival(entries[name], entries[taken])]
    if rivals:
        raise DataError(
            f"weights {path}: one network with several weights (a moving average is as a rule the "
            f"better): {_choice(path, [taken, *rivals])}"
        )
    return taken, entries[taken]


def _mixed(content: Mapping[Any, Any]) -> str:
    """What keeps a mapping that holds tensors from being a state dict."""
    others = [
        f"{name} ({type(item).__name__})"
        for name, item in content.items()
        if not (isinstance(item, Tensor) and isinstance(name, str))
    ]
    return (
        f"a state dict of {len(content) - len(others)} tensors but for {_few(others)}. Save the tensors "
        "alone: torch.save({n: t for n, t in torch.load(FILE).items() if torch.is_tensor(t)}, "
        "'weights.pt')"
    )


def _state_dicts(content: Mapping[Any, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state dict that a file is ("") or holds, one or two levels deep ("model", "ema.shadow")."""
    if _is_state(content):
        yield "", dict(content)
        return
    for name, entry in content.items():
        if _is_state(entry):
            yield str(name), dict(entry)
        elif isinstance(entry, Mapping):
            deeper = {n: e for n, e in entry.items() if isinstance(n, str) and _is_state(e)}
            yield from ((f"{name}.{n}", dict(e)) for n, e in deeper.items())


def _entry(entries: Mapping[str, dict[str, Tensor]], path: Path, entry: str) -> dict[str, Tensor]:
    """What lies under a name: a state dict of its own, or the names of one that begin with it."""
    if entry in entries:
        return entries[entry]
    start = f"{entry}."
    states = [_strip(state) for state in entries.values()]
    under = [
        {n.removeprefix(start): t for n, t in s.items() if n.startswith(start)} for s in states
    ]
    if not (chosen := [state for state in under if state]):
        heads = {n.partition(".")[0] for state in states for n in state if "." in n}
        known = sorted({name for name in entries if name} | heads)
        raise UnknownName(f"entry of weights {path}", entry, known)
    return chosen[0]


def _is_rival(state: dict[str, Tensor], taken: dict[str, Tensor]) -> bool:
    """Whether a state dict holds other values of the same network, or of all its parameters."""
    prefix = "module."  # what torch's averaged models put before all names but their counter
    ours, theirs = (
        {n.removeprefix(prefix): t for n, t in _strip(s).items()} for s in (taken, state)
    )
    both = [(ours[n], theirs[n]) for n in ours if n in theirs]
    return (
        len(both) in (len(ours), len(theirs))
        and all(a.shape == b.shape for a, b in both)
        and not all(torch.equal(a, b) for a, b in both)
    )


def _choice(path: Path, entries: list[str]) -> str:
    named = " or ".join(f"{path}#{entry}" for entry in entries)
    return f"{', '.join(entries)} are state dicts. Say which: {named}"


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in PREFIXES:  # either may be around the other
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def fitting(state: Mapping[str, Tensor], zoo: Networks, source: str) -> list[str]:
    """The networks of a zoo that have these names and shapes, for the classes and channels of the weights.

    They are built on torch's meta device, which holds no values.

    Args:
        state: name -> tensor.
        source: how errors name it.
    """
    layers = [tensor.shape for tensor in state.values() if tensor.ndim == 2]
    images = [tensor.shape for tensor in state.values() if tensor.ndim == 4]
    if not layers or not images:
        return []
    names = []
    for name, make in zoo.items():
        with torch.device("meta"):
            expected = make(layers[-1][0], images[0][1]).state_dict()
        if _shapes(expected) == _shapes(_within(expected, state, source)):
            names.append(name)
    return names


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {n: t.shape for n, t in state.items() if not n.endswith("num_batches_tracked")}


def apply_state(module: nn.Module, state: Mapping[str, Tensor], source: str, name: str) -> None:
    """Load a state dict into a module, or report in full why it does not fit.

    A missing `num_batches_tracked` is no error: older files lack it and inference ignores it.

    Raises:
        MismatchError: as for `Weights.apply`; the module is then unchanged.
    """
    expected = module.state_dict()
    state = _within(expected, state, source)
    missing = [n for n in expected if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in expected]
    both = [n for n in expected if n in state]
    differ = [n for n in both if expected[n].shape != state[n].shape]
    problems = _class_count(expected, state, differ)
    if not problems:
        problems = [
            *_listed("missing", missing),
            *_listed("unexpected", unexpected),
            *_listed(
                "of another shape",
                [f"{n} {_shape(state[n])} where {_shape(expected[n])} is wanted" for n in differ],
            ),
        ]
    if problems or missing or unexpected:
        if not both:
            problems.append("no name agrees, so they are of another network")
        raise MismatchError(f"weights {source} do not fit {name}: {'; '.join(problems)}")
    module.load_state_dict(dict(state), strict=False)


def _within(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str
) -> Mapping[str, Tensor]:
    """The entries under the one prefix that holds every name expected, as Lightning saves a module.

    What lies beside it, such as the weights of a metric or a loss, is left out.
    """
    names = [name for name in expected if not name.endswith("num_batches_tracked")]
    if not names or all(name in state for name in names):
        return state
    prefixes = [name.removesuffix(names[0]) for name in state if name.endswith("." + names[0])]
    whole = [prefix for prefix in prefixes if all(prefix + name in state for name in names)]
    if len(whole) > 1:
        named = [prefix.removesuffix(".") for prefix in whole]
        raise MismatchError(
            f"weights {source} hold the network under each of {', '.join(named)}. Say which: "
            + " or ".join(f"{source}#{name}" for name in named)
        )
    if not whole:
        return state
    start = whole[0]
    return {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}


def _class_count(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], differ: list[str]
) -> list[str]:
    """The message where the number of classes is all that differs: the last layer's first axis."""
    weights = [name for name in expected if name.endswith(".weight")]
    last = weights[-1].removesuffix(".weight") if weights else ""
    if not differ or not set(differ) <= {f"{last}.weight", f"{last}.bias"}:
        return []
    if any(expected[n].shape[1:] != state[n].shape[1:] for n in differ):
        return []
    if set(expected) - set(state) or set(state) - set(expected):
        return []
    wanted, stored = expected[differ[0]].shape[0], state[differ[0]].shape[0]
    return [f"they are for {stored} classes, {wanted} are wanted (layer {last})"]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _listed(kind: str, names: list[str]) -> list[str]:
    return [f"{len(names)} {kind}: {_few(names)}"] if names else []


def _few(names: Iterable[str], most: int = 4) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """`tensor_digest` of a network's state, but for the counters of its batch norms."""
    return tensor_digest({n: state[n] for n in state if not n.endswith("num_batches_tracked")})


def tensor_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, hexadecimal.

    Sorted by name, values as little-endian bytes: independent of the file format, the device and
    the order in which the tensors were saved.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{_shape(tensor)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
