"""Are a store's fields this teacher's? Some of its rows are computed again and compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from kdcache.data.dataset import Dataset
from kdcache.data.loading import DatasetSource
from kdcache.dumping.plans import stored_plan
from kdcache.fields.spelling import needs_head
from kdcache.preprocessing import Inputs, inputs_from_dict, require_precision
from kdcache.runs import is_run
from kdcache.teachers.load import load_teacher
from kdcache.teachers.posterior import mc_dropout
from kdcache.teachers.teacher import Teacher
from kdcache.views import replay
from kdcache.views.plan import ViewPlan
from kdcache_stores import FormatError, MismatchError, Store, UsageError, describe, open_store
from kdcache_stores.encodings.fidelity import head_kl, measure, relative_error

#: KL that rounding in other batches, kernels and devices may add, per precision: at T = 1, Z-scored.
TOLERANCE = {"float32": (1e-3, 1e-4), "fp16": (1e-2, 1e-3), "bf16": (3e-2, 3e-3)}

#: The same of fields other than logits: mean of the squared error over the squared norm of a row.
ERROR_TOLERANCE = {"float32": 1e-5, "fp16": 1e-3, "bf16": 1e-2}

#: How far the spread of stored rows may be from that of live ones; encodings keep it.
SPREAD = 0.03


@dataclass(frozen=True)
class Recheck:
    """What the comparison found.

    Attributes:
        rows: rows computed again.
        problems: why these are not that teacher's outputs; empty if they are.
        measured: by field. Of logits KL(live || stored) and top-1 agreement, as `fidelity.measure`, and
            `spread`, the mean standard deviation of stored rows over that of live ones; of other fields
            `error`, as `fidelity.relative_error`, and of those that the store's head makes logits of
            `head_kl`, the mean KL(live || stored) of these logits at T = 1.
        recorded: the same measures as the dump recorded them for the encoding.
        worst: key, row, view and field of the row that differs most from its live one.
    """

    rows: int
    problems: list[str]
    measured: dict[str, dict[str, float]]
    recorded: dict[str, dict[str, float]]
    worst: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether the fields are the teacher's."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"ok": self.ok}


def _settings(store: Store) -> tuple[Inputs, list[int] | None, int | None]:
    """The preprocessing, class map and dropout seed that a store names.

    Raises:
        FormatError: they are none.
    """
    where = f"{store.where}: teacher.preprocessing"
    settings = dict(store.teacher.preprocessing)
    class_map, seed = settings.pop("class_map", None), settings.pop("dropout_seed", None)
    if class_map is not None and not (
        isinstance(class_map, list)
        and len(class_map) == store.classes
        and all(type(index) is int and index >= 0 for index in class_map)
    ):
        raise FormatError(
            f"{where}: class_map must be {store.classes} classes, found {class_map!r:.80}"
        )
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise FormatError(f"{where}: dropout_seed must be a number from 0, found {seed!r:.80}")
    try:
        require_precision(store.teacher.precision)
        return inputs_from_dict(settings), class_map, seed
    except UsageError as error:
        raise FormatError(f"{where}: {error}") from None


def load_stored_teacher(
    store: Store,
    spec: str,
    device: torch.device | str,
    shape: tuple[int, int, int] | None,
    allow_code: bool = False,
    fields: Sequence[str] | None = None,
) -> Teacher:
    """A teacher with the preprocessing, precision, class map and dropout masks that a store names.

    Args:
        spec: as `load_teacher` takes it.
        shape: (C, H, W) of the views, where they are images of one size.
        allow_code: see `load_teacher`.
        fields: what it shall give; None: the fields of the store.
    """
    preprocessing, class_map, seed = _settings(store)
    channels, size = (shape[0], shape[-1]) if shape else (3, 224)
    teacher = load_teacher(
        spec,
        classes=store.classes,
        channels=channels,
        size=size,
        preprocessing=preprocessing,
        class_map=class_map,
        precision=store.teacher.precision,
        device=device,
        channels_last=bool(store.config.get("channels_last", False)),
        allow_code=allow_code,
        fields=tuple(store.fields) if fields is None else fields,
    )
    return teacher if seed is None else mc_dropout(teacher, seed)


def teacher_of_store(
    stores: Sequence[Store],
    spec: str,
    device: torch.device | str,
    dataset: Dataset,
    allow_code: bool = False,
) -> Teacher | None:
    """A teacher for the images of a dataset as the store names it that it filled; None where it filled none.

    A run is none: it comes with its own preprocessing.

    Args:
        stores: among which it is looked for by the digest of its weights.
        spec: as `load_teacher` takes it.
        allow_code: see `load_teacher`.
    """
    for store in stores:
        if store.classes != dataset.classes or is_run(spec.partition("@")[0]):
            continue
        try:
            teacher = load_stored_teacher(
                store, spec, device, dataset.image_shape, allow_code, ("logits",)
            )
        except MismatchError:
            continue  # another network's store
        if teacher.weights_sha256 == store.teacher.weights_sha256:
            return teacher
    return None


def recheck_store(
    path: str | os.PathLike[str],
    spec: str,
    source: DatasetSource,
    augment: str | None = None,
    rows: int = 256,
    device: torch.device | str = "cpu",
) -> Recheck:
    """`recheck` of the store at a path, by its teacher and dataset's names.

    Args:
        spec: of the teacher, as `load_teacher` takes it.
        source: where the images are.
        augment: the store's augmentation, where it is a user's own.
    """
    plan, _ = stored_plan(source, path, augment)
    with open_store(path) as store:
        teacher = load_stored_teacher(store, spec, device, plan.dataset.image_shape)
        return recheck(store, plan, teacher, rows, device=device)


def recheck(
    store: Store,
    plan: ViewPlan,
    teacher: Teacher,
    rows: int = 256,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Recheck:
    """Run the teacher on a sample of (row, view) pairs, spread over the store, and compare.

    Every field of the store is compared. Its rows may be as far from the live ones as the dump measured
    for their encoding, twice over, and a little further for rounding in batches of another size.

    Args:
        store: a sealed store.
        plan: its plan over the dataset that is here.
        teacher: see `load_stored_teacher`.
        rows: how many pairs.
        batch_size: images per forward.
        device: where the teacher is.

    Raises:
        MismatchError: the views here are not those of the dump (`replay.check`).
        UsageError: the teacher does not give a field of the store.
    """
    if missing := sorted(store.fields.keys() - set(teacher.fields)):
        raise UsageError(
            f"{store.where} holds {', '.join(missing)}, and the teacher gives {', '.join(teacher.fields)}: "
            "load it with the fields of the store"
        )
    replay.check(plan, store, device)
    pairs = len(plan) * store.n_views
    count = min(rows, pairs)
    chosen = np.arange(count) * pairs // count
    views = store.first_view + chosen // len(plan)
    # Shifted from view to view, or a step that divides the samples would pick the same row always.
    where = (chosen + views * (len(plan) * 618 // 1000 + 1)) % len(plan)
    batches = [
        (where[i : i + batch_size], views[i : i + batch_size]) for i in range(0, count, batch_size)
    ]
    stream = plan.stream(batches, device)
    outputs = [teacher(batch.images) for batch in stream]
    recorded = describe(store)["fields"]
    comparisons = {}
    for name in store.fields:
        live = torch.cat([fields[name] for fields in outputs]).cpu().numpy()
        stored = np.concatenate(
            [store.read(int(v), where[views == v], field=name) for v in np.unique(views)]
        )
        comparisons[name] = _compare(name, live, stored, recorded[name])
        if store.head is not None and needs_head(name):
            comparisons[name].measured["head_kl"] = head_kl(live, stored, *store.head)
    problems = _weights(store, teacher)
    for name, comparison in comparisons.items():
        problems += comparison.problems(name, store.teacher.precision)
    name, comparison = max(comparisons.items(), key=lambda item: item[1].furthest.max())
    row = int(comparison.furthest.argmax())
    worst = {
        "key": plan.samples.keys[int(where[row])],
        "row": int(where[row]),
        "view": int(views[row]),
        "field": name,
        "difference": float(comparison.furthest[row]),
    }
    return Recheck(
        count,
        problems,
        {name: comparison.measured for name, comparison in comparisons.items()},
        {name: comparison.recorded for name, comparison in comparisons.items()},
        worst,
    )


@dataclass(frozen=True)
class _Comparison:
    """Live and stored rows of one field, compared.

    Attributes:
        measured: see `Recheck`.
        recorded: see `Recheck`.
        furthest: largest difference within each row.
    """

    measured: dict[str, float]
    recorded: dict[str, float]
    furthest: np.ndarray

    def problems(self, field: str, precision: str) -> list[str]:
        """Why the stored rows are not the live ones, as far as rounding may tell."""
        if field != "logits":
            extra = ERROR_TOLERANCE.get(precision, ERROR_TOLERANCE["float32"])
            return self._beyond(field, "error", extra)
        tolerance = TOLERANCE.get(precision, TOLERANCE["float32"])
        problems = [
            text
            for name, extra in zip(("kl_t1_mean", "kl_z_mean"), tolerance, strict=True)
            for text in self._beyond(field, name, extra)
        ]
        if abs(self.measured["spread"] - 1) > SPREAD:
            problems.append(
                f"the stored logits spread {self.measured['spread']:.3f} times as far as the live ones: "
                "they were scaled, or are another teacher's"
            )
        return problems

    def _beyond(self, field: str, name: str, extra: float) -> list[str]:
        measured, recorded = self.measured[name], self.recorded[name]
        most = 2 * recorded + extra
        if measured <= most:
            return []
        return [
            f"{name} between live and stored {field} is {measured:.3g}; the dump measured {recorded:.3g} "
            f"for the encoding, and {most:.3g} is the most that is accepted"
        ]


def _compare(
    field: str, live: np.ndarray, stored: np.ndarray, recorded: Mapping[str, Any]
) -> _Comparison:
    """Compare rows (n, *shape) of a field, of which `describe` gives what the dump recorded."""
    furthest = np.abs(live - stored).reshape(len(live), -1).max(axis=1)
    if field != "logits":
        # Nothing is recorded of floats: what they lose is known.
        error = {"error": relative_error(live, stored)}
        known = {"error": recorded["error"] or 0.0, "head_kl": recorded["head_kl"] or 0.0}
        return _Comparison(error, known, furthest)
    measured = measure(live, stored)
    measured["spread"] = float(stored.std(axis=1).mean() / live.std(axis=1).mean())
    return _Comparison(measured, dict(recorded["fidelity"]), furthest)


def _weights(store: Store, teacher: Teacher) -> list[str]:
    if teacher.weights_sha256 == store.teacher.weights_sha256:
        return []
    return [
        f"the store is of weights {store.teacher.weights_sha256[:16]} "
        f"({store.teacher.architecture}), this teacher has {teacher.weights_sha256[:16]} "
        f"({teacher.architecture})"
    ]
