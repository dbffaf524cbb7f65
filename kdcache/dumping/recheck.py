"""Are a store's logits this teacher's? Some of its rows are computed again and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from kdcache.preprocessing import Preprocessing
from kdcache.teachers import Teacher, load_teacher, mc_dropout
from kdcache.views import ViewPlan, replay
from kdcache_stores import Store, describe
from kdcache_stores.fidelity import measure

#: KL that rounding in other batches, kernels and devices may add, per precision: at T = 1, Z-scored.
TOLERANCE = {"float32": (1e-3, 1e-4), "fp16": (1e-2, 1e-3), "bf16": (3e-2, 3e-3)}

#: How far the spread of stored rows may be from that of live ones; encodings keep it.
SPREAD = 0.03


@dataclass(frozen=True)
class Recheck:
    """What the comparison found.

    Attributes:
        rows: rows computed again.
        problems: why these are not that teacher's logits; empty if they are.
        measured: KL(live || stored) and top-1 agreement, as `kdcache_stores.fidelity.measure`, and
            `spread`, the mean standard deviation of stored rows over that of live ones.
        recorded: the same measures as the dump recorded them for the encoding.
        worst: key, row and view of the row that differs most.
    """

    rows: int
    problems: list[str]
    measured: dict[str, float]
    recorded: dict[str, float]
    worst: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether the logits are the teacher's."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"ok": self.ok}


def load_stored_teacher(
    store: Store,
    spec: str,
    device: torch.device | str,
    shape: tuple[int, int, int] | None,
    allow_code: bool = False,
) -> Teacher:
    """A teacher with the preprocessing, precision, class map and dropout masks that a store names.

    Args:
        spec: as `load_teacher` takes it.
        shape: (C, H, W) of the views.
        allow_code: see `load_teacher`.
    """
    fields = dict(store.teacher.preprocessing)
    class_map, seed = fields.pop("class_map", None), fields.pop("dropout_seed", None)
    channels, size = (shape[0], shape[-1]) if shape else (3, 224)
    teacher = load_teacher(
        spec,
        classes=store.classes,
        channels=channels,
        size=size,
        preprocessing=Preprocessing.from_dict(fields),
        class_map=class_map,
        precision=store.teacher.precision,
        device=device,
        channels_last=bool(store.config.get("channels_last", False)),
        allow_code=allow_code,
    )
    return teacher if seed is None else mc_dropout(teacher, seed)


def recheck(
    store: Store,
    plan: ViewPlan,
    teacher: Teacher,
    rows: int = 256,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Recheck:
    """Run the teacher on a sample of (row, view) pairs, spread over the store, and compare.

    The stored logits may be as far from the live ones as the dump measured for their encoding,
    twice over, and a little further for rounding in batches of another size.

    Args:
        store: a sealed store.
        plan: its plan over the dataset that is here.
        teacher: see `load_stored_teacher`.
        rows: how many pairs.
        batch_size: images per forward.
        device: where the teacher is.

    Raises:
        MismatchError: the views here are not those of the dump (`replay.check`).
    """
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
    live = torch.cat([teacher(batch.images) for batch in stream]).cpu().numpy()
    stored = np.concatenate([store.read(int(v), where[views == v]) for v in np.unique(views)])
    measured = measure(live, stored)
    recorded = describe(store)["fields"]["logits"]["fidelity"]
    measured["spread"] = float(stored.std(axis=1).mean() / live.std(axis=1).mean())
    problems = _problems(store, teacher, measured, recorded)
    row = int(np.abs(live - stored).max(axis=1).argmax())
    worst = {
        "key": plan.samples.keys[int(where[row])],
        "row": int(where[row]),
        "view": int(views[row]),
        "difference": float(np.abs(live[row] - stored[row]).max()),
    }
    return Recheck(count, problems, measured, dict(recorded), worst)


def _problems(
    store: Store,
    teacher: Teacher,
    measured: Mapping[str, float],
    recorded: Mapping[str, float],
) -> list[str]:
    problems = []
    if teacher.weights_sha256 != store.teacher.weights_sha256:
        problems.append(
            f"the store is of weights {store.teacher.weights_sha256[:16]} "
            f"({store.teacher.architecture}), this teacher has {teacher.weights_sha256[:16]} "
            f"({teacher.architecture})"
        )
    tolerance = TOLERANCE.get(store.teacher.precision, TOLERANCE["float32"])
    for name, extra in zip(("kl_t1_mean", "kl_z_mean"), tolerance, strict=True):
        most = 2 * recorded[name] + extra
        if not measured[name] <= most:
            problems.append(
                f"{name} between live and stored logits is {measured[name]:.3g}; the dump measured "
                f"{recorded[name]:.3g} for the encoding, and {most:.3g} is the most that is accepted"
            )
    if abs(measured["spread"] - 1) > SPREAD:
        problems.append(
            f"the stored rows spread {measured['spread']:.3f} times as far as the live ones: they "
            "were scaled, or are another teacher's"
        )
    return problems
