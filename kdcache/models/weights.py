"""Weights from files, without running anybody's code: safetensors, or torch files as data only."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdcache_stores.errors import DataError, MismatchError, UsageError

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".tar", ".bin", ".ckpt")

#: Where published checkpoints keep their state dict, in the order in which they are tried.
NESTS = ("state_dict", "model", "net", "model_state_dict", "model_state")

#: What wrappers (DataParallel, torch.compile) put before every name.
PREFIXES = ("module.", "_orig_mod.")

SCRIPTED = (
    "it is a TorchScript archive, which holds code. Where you trust it, convert it once: "
    "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
)

CONVERT = (
    "it holds pickled code, not only weights. Where you trust it, convert it once: "
    "torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pt')"
)


@dataclass(frozen=True)
class Weights:
    """A state dict read from a file, its names without wrappers' prefixes.

    Args:
        state: name -> tensor, on the CPU.
        path: the file that it came from.
        file_sha256: of the file's bytes, hexadecimal.
    """

    state: dict[str, Tensor]
    path: Path
    file_sha256: str

    @property
    def classes(self) -> int:
        """How many classes the last layer has."""
        matrices = [t for n, t in self.state.items() if n.endswith("weight") and t.ndim >= 2]
        if not matrices:
            raise DataError(f"weights {self.path}: no layer with weights to count the classes of")
        return matrices[-1].shape[0]

    def apply(self, module: nn.Module) -> None:
        """Load into a module; every name and every shape must agree.

        Raises:
            MismatchError: naming missing and unexpected names, shapes that differ, and a wrong
                class count as such.
        """
        apply_state(module, self.state, str(self.path))


def load_weights(path: str | Path) -> Weights:
    """Read `.safetensors`, or a torch file (`.pt`, `.pth`, `.th`, `.tar`) with weights_only=True.

    The state dict may be nested under "state_dict", "model", "net" or as the only one under another
    name, and its names may begin with "module." or "_orig_mod.".

    Raises:
        DataError: no such file, not readable, pickled code, or no state dict in it.
        UsageError: a suffix of neither kind.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"weights {path}: there is no such file")
    if path.suffix == ".safetensors":
        content: Any = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        content = _read_torch(path)
    else:
        known = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise UsageError(f"weights {path}: expected a file ending in {known}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Weights(_strip(_find_state(content, path)), path, digest)


def names_file(text: str) -> bool:
    """Whether a text means a file of weights rather than a library's name for some."""
    return Path(text).suffix in (".safetensors", *TORCH_SUFFIXES) or Path(text).exists()


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


def _find_state(content: Any, path: Path) -> dict[str, Tensor]:
    if _is_state(content):
        return dict(content)
    if not isinstance(content, Mapping):
        raise DataError(f"weights {path}: expected a state dict, found {type(content).__name__}")
    for nest in NESTS:
        if _is_state(content.get(nest)):
            return dict(content[nest])
    others = [name for name, entry in content.items() if _is_state(entry)]
    if len(others) == 1:
        return dict(content[others[0]])
    content_text = ", ".join(map(str, content)) or "nothing"
    raise DataError(
        f"weights {path}: expected a state dict (names and tensors), at the top or under "
        f"{', '.join(NESTS)}; found: {content_text}"
        + (f", of which {', '.join(others)} are state dicts" if others else "")
    )


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in PREFIXES:  # either may be around the other
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def apply_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
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
        name = type(module).__name__
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
        raise MismatchError(
            f"weights {source} hold the network under each of {', '.join(whole)}: save the one that is "
            "meant in a file of its own"
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


def _listed(kind: str, names: list[str], most: int = 8) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {kind}: {', '.join(names[:most])}{more}"]


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
