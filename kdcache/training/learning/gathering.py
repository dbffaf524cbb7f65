"""Each rank forwards its part of a batch, and each loss sees all of it.

Losses are not always means over samples (CE leaves out unlabelled ones, MLKD compares whole batches), so
averaging what the ranks computed alone would change them. Here the ranks exchange outputs, a few kilobytes
per step, and every one computes the loss of the whole batch; a rank's own outputs carry the gradient.
The sum of the ranks' gradients is then that of one process, for any batch that can be divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kdcache.distributed import Ranks
from kdcache.views.cached import Batch


def gather_batch(
    ranks: Ranks, student: Mapping[str, Tensor], batch: Batch
) -> tuple[dict[str, Tensor], Batch]:
    """The student's outputs for the whole batch, and the batch whole but for its images.

    Backward gives the part of this rank ``world`` times its gradient, since
    DistributedDataParallel divides the sum over ranks by ``world``.

    Args:
        student: (samples of this rank, ...) by field.
        batch: this rank's part.
    """
    if ranks.world == 1:
        return dict(student), batch
    # A field may be made of another one, as logits are of the pooled vector: the gradient that is multiplied
    # is that of the loss alone, not what comes back through the network.
    student = {name: values.view_as(values) for name, values in student.items()}
    for values in student.values():
        values.register_hook(lambda gradient: gradient * ranks.world)
    mix = batch.mix or ()
    targets = [values for teacher in batch.teachers for values in teacher.values()]
    gathered = iter(
        ranks.gather(
            [*student.values(), batch.labels, batch.keys, batch.views, *targets, *mix], batch.total
        )
    )
    part = ranks.part(batch.total)
    whole = {}
    for name, values in student.items():
        others = next(gathered)
        whole[name] = torch.cat([others[: part.start], values, others[part.stop :]])
    labels, keys, views = (next(gathered) for _ in range(3))
    teachers = tuple({name: next(gathered) for name in teacher} for teacher in batch.teachers)
    mixed = None if batch.mix is None else (next(gathered), next(gathered))
    return whole, replace(
        batch, labels=labels, keys=keys, views=views, teachers=teachers, mix=mixed
    )
