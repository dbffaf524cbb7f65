"""The price of a teacher: seconds per epoch from the cache, by labels alone, and with it in the loop."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdcache.data.item import Item
from kdcache.methods.config import ObjectiveConfig
from kdcache.training.loop import Loop
from kdcache.training.preparation import prepared
from kdcache.training.settings import Training
from kdcache.views.cached import Batch
from kdcache.views.sizes import view_shape


def bench_train(
    training: Training,
    teacher: str | None,
    rounds: int = 7,
    others: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Epochs of the same training several ways, in turns, so that what else the machine does hits all.

    "ce" learns from labels alone, "cached" from the store, "online" with the teacher in the loop. All
    see the same samples in the same order and the same views; one round before those counted
    warms up. Nothing is evaluated or saved in between. Beside them, on batches that lie ready, run what
    no epoch can do without: "step", the student's steps, and "forward", the teacher's passes.

    Args:
        training: of the "cached" way: a method other than ce, from one store.
        teacher: the store's, as `load_teacher` takes it; None leaves "online" out.
        rounds: epochs counted of each way.
        others: more stores of the same views, by the name of the way that trains from each.

    Returns:
        Per way: seconds (of each round), cpu_seconds (of the process, its reading thread included; what
        others do on the machine disturbs it least), median, p25 and p75 of the seconds, data_wait
        (the share of the time spent waiting for data). cached_over_ce, cached_over_ce_cpu,
        online_over_cached, cached_over_step and online_over_parts (step and forward together): median,
        p25 and p75 of the ratios within a round; the last two, of processor seconds on a CPU, are 1 where
        nothing is spent on data, and their inverse is the share of the bound that is reached. macs: student and
        teacher, of one image; with them online_over_ce_by_macs, 1 + teacher / (3 student): a step
        costs the student three forward passes, backward included.
    """
    ways = {
        "ce": replace(training, objective=ObjectiveConfig(method="ce")),
        "cached": training,
    }
    if teacher is not None:
        ways["online"] = replace(training, online=(teacher,))
    ways |= {name: replace(training, stores=(store,)) for name, store in others.items()}
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        loops = {
            name: opened.enter_context(prepared(way, folder / name)) for name, way in ways.items()
        }
        alone = {"step": partial(_steps, loops["cached"], list(loops["cached"].views.epoch(0)))}
        if teacher is not None:
            alone["forward"] = partial(
                _forwards, loops["online"], list(loops["online"].views.epoch(0))
            )
        contenders = {name: partial(_epoch, loop) for name, loop in loops.items()} | alone
        records: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        for epoch in range(rounds + 1):
            # Each round begins with another way, so that none is always first.
            turn = epoch % len(contenders)
            for name in [*contenders][turn:] + [*contenders][:turn]:
                begun = time.process_time()
                record = contenders[name](epoch)
                records[name].append(record | {"cpu_seconds": time.process_time() - begun})
        bounded_by = "cpu_seconds" if training.device == "cpu" else "seconds"
        times = {name: _times(kept[1:]) for name, kept in records.items()}
        result: dict[str, Any] = times | {
            "cached_over_ce": _ratio(times["cached"], times["ce"]),
            "cached_over_ce_cpu": _ratio(times["cached"], times["ce"], "cpu_seconds"),
            "cached_over_step": _ratio(times["cached"], times["step"], bounded_by),
            "images_per_epoch": len(loops["cached"].views.rows),
            "batch_size": training.optimization.batch_size,
            "rounds": rounds,
            "torch_threads": torch.get_num_threads(),
            "device": training.device,
        }
        if teacher is not None:
            student, online = _macs(loops["online"])
            by_macs = 1 + online / (3 * student)
            ratio = _ratio(times["online"], times["cached"])
            parts = zip(*(times[name][bounded_by] for name in alone), strict=True)
            result |= {
                "online_over_cached": ratio,
                "online_over_parts": _ratio(
                    times["online"], {bounded_by: [sum(pair) for pair in parts]}, bounded_by
                ),
                "macs": {"student": student, "teacher": online},
                "online_over_ce_by_macs": by_macs,
                "of_what_macs_allow": ratio["median"] / by_macs,
            }
    return result


def bench_graph(training: Training, rounds: int = 5) -> dict[str, Any]:
    """The student's steps of an epoch as the loop takes them, and captured, in turns.

    Both take the batches of the same epoch, which lie ready; one round before those counted compiles.

    Returns:
        "eager" and "graph": `seconds` (of each round), `cpu_seconds`, median, p25, p75; `steps` of an
        epoch; `not_used`, why nothing was captured, or None.
    """
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        loops = {
            name: opened.enter_context(prepared(replace(training, graph=graph), folder / name))
            for name, graph in (("eager", False), ("graph", True))
        }
        ready = list(loops["eager"].views.epoch(0))
        records: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
        for epoch in range(rounds + 1):
            for name in [*loops] if epoch % 2 else [*loops][::-1]:
                begun = time.process_time()
                record = _steps(loops[name], ready, epoch)
                records[name].append(record | {"cpu_seconds": time.process_time() - begun})
        times = {name: _times(kept[1:]) for name, kept in records.items()}
        reason = loops["graph"].courses[0].learner.not_static
        return {"steps": len(ready), "not_used": reason, **times}


def _epoch(loop: Loop, epoch: int) -> dict[str, float]:
    return loop.train_epoch(epoch)[0]


def _steps(loop: Loop, ready: Sequence[Batch], epoch: int) -> dict[str, float]:
    """The student's steps of an epoch, on batches that lie ready."""
    begun, learner = time.perf_counter(), loop.courses[0].learner
    learner.begin_epoch(epoch)
    for index, batch in enumerate(ready):
        learner.learn(batch, epoch, index)
    learner.end_epoch(sum(batch.total for batch in ready))
    return {"seconds": time.perf_counter() - begun, "data_wait_seconds": 0.0}


def _forwards(loop: Loop, ready: Sequence[Batch], epoch: int) -> dict[str, float]:
    """The teachers' passes of an epoch, on batches that lie ready."""
    begun = time.perf_counter()
    outputs = [teacher(batch.images) for batch in ready for teacher in loop.teachers]
    torch.stack([next(iter(fields.values())).sum() for fields in outputs]).cpu()
    return {"seconds": time.perf_counter() - begun, "data_wait_seconds": 0.0}


def _times(records: Sequence[dict[str, float]]) -> dict[str, Any]:
    seconds = [record["seconds"] for record in records]
    waited = sum(record["data_wait_seconds"] for record in records) / sum(seconds)
    cpu = [record["cpu_seconds"] for record in records]
    return {"seconds": seconds, "cpu_seconds": cpu, "data_wait": waited} | _spread(seconds)


def _ratio(times: dict[str, Any], other: dict[str, Any], of: str = "seconds") -> dict[str, float]:
    return _spread([a / b for a, b in zip(times[of], other[of], strict=True)])


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "p25": float(low), "p75": float(high)}


def _macs(loop: Loop) -> tuple[int, int]:
    """Multiply-adds of one image: of the student, and of its teachers together."""
    shape = view_shape(loop.views.plan)
    assert not isinstance(shape, Item)  # the bench's own data are images
    view = torch.zeros((1, *shape), dtype=torch.uint8, device=loop.device)
    counts = []
    model = loop.courses[0].learner.model.eval()
    for run in (
        lambda: model(loop.preprocessing(view)),
        lambda: [teacher.module(teacher.preprocessing(view)) for teacher in loop.teachers],
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        counts.append(int(counter.get_total_flops()) // 2)
    return counts[0], counts[1]
