"""A network in training: its loss, its optimizer, its step, and what a checkpoint of it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdcache.data.item import Item
from kdcache.distributed import Ranks
from kdcache.methods.step import Step
from kdcache.models.network import batch_statistics
from kdcache.models.taps import as_fields, tapped
from kdcache.models.weights import load_weights
from kdcache.models.zoo import MODELS
from kdcache.philox import derive_seed
from kdcache.preprocessing import Inputs, autocast, channels_last
from kdcache.pruning.gradual import Pruning
from kdcache.pruning.narrowing import Widths
from kdcache.teachers.teacher import Teacher
from kdcache.teachers.vocabulary import require_ids
from kdcache.training.assembly import (
    assembled,
    blank_inputs,
    build_network,
    nets_of,
    student_shapes,
)
from kdcache.training.learning.explosion import LossWatch
from kdcache.training.learning.gathering import gather_batch
from kdcache.training.settings import Training
from kdcache.views.cached import Batch, CachedViews
from kdcache.views.sizes import InputShape, input_shape
from kdcache_stores import UsageError

#: A loss, 0-d, and its parts by name, 0-d and detached.
Losses = tuple[Tensor, dict[str, Tensor]]


class Learner:
    """One network, and how a batch changes it.

    Args:
        training: what it is to learn.
        views: what it is shown.
        preprocessing: between the views and the network.
        fields: what its loss reads of each teacher, by stored name.
        teachers: those in the loop; without any, the stores of the views have the fields.
        ranks: the processes that divide each batch.

    Attributes:
        model: the network.
        objective: its loss.
        forward: the network as the step calls it: its fields, over all ranks, compiled if asked for.
        average: the moving average of the weights, where there is one.
        pruning: what goes of the network, where anything does.
        static: a faster way to the loss of a full batch, where there is one, see `StaticStep`.
        not_static: why there is none, where one was asked for.
    """

    def __init__(
        self,
        training: Training,
        views: CachedViews,
        preprocessing: Inputs,
        fields: Sequence[str],
        teachers: Sequence[Teacher],
        ranks: Ranks,
    ) -> None:
        self.training, self.preprocessing, self.ranks = training, preprocessing, ranks
        self.device = torch.device(training.device)
        image = input_shape(preprocessing, views.plan)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.model = build_network(training.model, views.dataset.classes, image)
            require_ids(self.model, training.model, views.dataset)
            if training.init_weights:
                load_weights(training.init_weights).apply(self.model, training.model, MODELS)
            student = student_shapes(self.model, training.objective, image)
            nets = nets_of(views, student, fields, teachers)
            self.model, self.objective = assembled(self.model, training.objective, nets)
            self.pruning = None
            if training.pruning is not None:
                self._require_alone(ranks)
                inputs = blank_inputs(image, 2, self.model)
                self.pruning = Pruning(training.pruning, training.model, self.model, inputs)
        self.objective.check(views.labels, len(teachers) or len(views.teachers))
        self.model.to(self.device)
        if training.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.objective.to(self.device)
        self._require_one_view(views.views_per_decode)
        self._require_last_batch(len(views.rows) * views.views_per_decode, image)
        taps = tapped(self.model, self.objective.student_fields)
        self.forward = ranks.wrap(taps, self.device)
        if training.compile:
            self.forward = cast(nn.Module, torch.compile(self.forward))
        self.average = None
        if training.ema:
            rule = get_ema_multi_avg_fn(training.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=rule, use_buffers=True)
        optimization, self.steps = training.optimization, len(views)
        total = self.steps * (optimization.epochs // views.views_per_decode)
        self.batch_size = optimization.batch_size
        self.optimizer = optimization.make_optimizer(self._learned())
        self.scheduler = optimization.make_scheduler(self.optimizer, total)
        # From torch's own 65536 the gradients of a standardized loss overflow in the first steps.
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=2.0**10, enabled=training.precision == "fp16"
        )
        self.losses = LossWatch(total, self.device)
        self.names: list[str] = []
        self.sums = torch.zeros(())
        self.static: Callable[[Batch, int], Losses | None] | None = None
        self.not_static: str | None = None

    def _learned(self) -> list[nn.Parameter]:
        """What the optimizer changes."""
        both = (*self.model.parameters(), *self.objective.parameters())
        return [parameter for parameter in both if parameter.requires_grad]

    def _require_alone(self, ranks: Ranks) -> None:
        """Refuse to prune a network that several processes hold copies of."""
        if ranks.world > 1:
            raise UsageError(
                f"--prune is for a training in a single process, and {ranks.world} divide the batches: start "
                "it without torchrun."
            )

    def _require_one_view(self, views_per_decode: int) -> None:
        """Refuse several views of a sample in a batch where the loss remembers one thing of each."""
        names = [loss.config.method for loss in self.objective.losses() if loss.remembers]
        if names and views_per_decode > 1:
            raise UsageError(
                f"--views-per-decode {views_per_decode}: {names[0]} remembers one row of each sample, and "
                "a batch would have several; leave it out."
            )

    def _require_last_batch(self, samples: int, image: InputShape) -> None:
        """Refuse now, not at the end of an epoch, a last batch too small for batch norm."""
        batch_size = self.training.optimization.batch_size
        last = samples % batch_size or batch_size
        if last // self.ranks.world > 1 or self.objective.needs_pair:
            return
        sample = blank_inputs(image, 1, self.model)
        try:
            with torch.no_grad():
                copy.deepcopy(self.model).train()(sample)
        except ValueError as error:
            raise UsageError(
                f"{samples} images in batches of {batch_size} end with a batch that gives a process a "
                f"single one, and batch norm of {self.training.model} on {_text(image)} needs two: "
                "use another --batch-size, or --train-samples."
            ) from error

    # -- training -------------------------------------------------------------------------------
    def begin_epoch(self, epoch: int, alone: bool = True) -> None:
        """Before the first batch of an epoch, counted from 0.

        Args:
            alone: no other learner takes its steps in between.
        """
        self.forward.train()
        # Layers with randomness of their own (dropout) draw the same after a resume.
        torch.manual_seed(derive_seed(self.training.seed, "layers", epoch, self.ranks.rank))
        self.draws = None if alone else self.generators()
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.names = []

    def generators(self, state: Sequence[Tensor] = ()) -> list[Tensor]:
        """The state of torch's generators that layers draw from, after it was set to one."""
        cuda = self.device.type == "cuda"
        if state:
            torch.set_rng_state(state[0])
            if cuda:
                torch.cuda.set_rng_state(state[1], self.device)
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if cuda else [])]

    def learn(self, batch: Batch, epoch: int, index: int) -> None:
        """One step; what it measured stays on the device until the end of the epoch."""
        if self.draws is not None:
            self.generators(self.draws)
        losses = None
        if index and self.static is not None and batch.total == self.batch_size:
            losses = self.static(batch, epoch)
        loss, parts = losses or self.step(batch, epoch, index)
        self.update(loss)
        if self.draws is not None:
            self.draws = self.generators()
        parts = {"loss": loss.detach()} | parts
        values = torch.stack(list(parts.values())).mul_(batch.total)
        self.losses.add(index, parts["loss"])
        if self.names:
            self.sums += values
        else:
            self.names, self.sums = list(parts), values

    def end_epoch(self, seen: int) -> dict[str, float]:
        """The means over the epoch's ``seen`` samples, and its learning rate."""
        sums = dict(zip(self.names, self.sums.tolist(), strict=True))
        return {f"train_{name}": value / seen for name, value in sums.items()} | {"lr": self.rate}

    def prune(self, epochs: int) -> None:
        """After so many epochs, take out of the network what is due; momentum begins anew then."""
        if self.pruning is not None and self.pruning.end_epoch(epochs):
            self._renew()

    def _renew(self) -> None:
        """Have the optimizer go on with the parameters that the network has now."""
        if self.training.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer.state.clear()
        (group,) = self.optimizer.param_groups
        group["params"] = self._learned()

    def step(self, batch: Batch, epoch: int, index: int) -> Losses:
        """Forward: the loss, with its gradient, and its parts, on the device."""
        pairs = self.objective.needs_pair
        inputs = self.inputs(batch.images.flatten(0, 1) if pairs else batch.images)
        with autocast(self.device, self.training.precision):
            given = self.forward(inputs)
        student, batch = gather_batch(self.ranks, paired(as_fields(given), pairs), batch)
        step = Step(
            epoch=epoch,
            index=index,
            epochs=self.training.optimization.epochs,
            seed=self.training.seed,
            keys=batch.keys,
            views=batch.views,
        )
        targets = batch.teachers, batch.labels, step, batch.mix
        if index == 0:
            self.objective.eval()  # what it remembers and fits is of the student
            with torch.no_grad():
                nothing = {name: torch.zeros_like(values) for name, values in student.items()}
                uniform, _ = self.objective(nothing, *targets)
            self.objective.train()
            self.losses.begin(uniform, self.steps)
        losses: Losses = self.objective(student, *targets)
        return losses

    def update(self, loss: Tensor) -> None:
        """Backward, and what follows of it for the weights."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.pruning is not None:
            self.pruning.observe()
        if self.training.optimization.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.training.optimization.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def how_it_stepped(self) -> dict[str, Any]:
        """For the summary: whether the steps were compiled, and why not; what a pruning left."""
        pruned = {} if self.pruning is None else self.pruning.summary()
        if not self.training.graph:
            return pruned
        return (
            pruned
            | {"graph": self.static is not None}
            | ({} if self.not_static is None else {"graph_not_used": self.not_static})
        )

    def inputs(self, images: Tensor) -> Tensor:
        """What the network sees of uint8 images (B, C, H, W), or of other items."""
        inputs = self.preprocessing(images)
        return channels_last(inputs) if self.training.channels_last else inputs

    @torch.no_grad()  # not inference mode: another student's loss may save these values for backward
    def logits_now(self, images: Tensor) -> Tensor:
        """The logits (B, K) of the network as it trains now, for uint8 images (B, C, H, W).

        Its batch norms use the batch, as in a step of its own, and remember nothing of it.
        """
        inputs = self.inputs(images)
        with batch_statistics(self.model), autocast(self.device, self.training.precision):
            return as_fields(self.model(inputs))["logits"]

    # -- what it has learnt ---------------------------------------------------------------------
    @property
    def widths(self) -> Widths:
        """Of the layers that a pruning makes narrower."""
        return self.pruning.widths if self.pruning is not None else {}

    def finished(self) -> nn.Module:
        """What is saved in the end: `evaluated`, masks of a pruning made part of it."""
        if self.pruning is not None:
            self.pruning.finish()
        return self.evaluated

    @property
    def evaluated(self) -> nn.Module:
        """What is measured and saved: the weights, or their moving average."""
        return self.model if self.average is None else self.average.module

    def logits(self, images: Tensor) -> Tensor:
        """Of `evaluated`, in eval mode, for uint8 images (B, C, H, W): (B, K)."""
        inputs = self.inputs(images)
        with autocast(self.device, self.training.precision):
            return as_fields(self.evaluated(inputs))["logits"]

    def _stateful(self) -> dict[str, Any]:
        parts = {"model": self.model, "objective": self.objective, "optimizer": self.optimizer,
                 "scheduler": self.scheduler, "scaler": self.scaler, "losses": self.losses}  # fmt: skip
        if self.pruning is not None:
            parts |= {"pruning": self.pruning}
        return parts if self.average is None else parts | {"average": self.average}

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on; tensors are those of the training itself."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        parts = self._stateful()
        # First, since the others are of its parameters.
        if self.pruning is not None and parts.pop("pruning").load_state_dict(state["pruning"]):
            self._renew()
        for name, part in parts.items():
            if name != "losses" or name in state:  # checkpoints of 0.1.0 have none
                part.load_state_dict(state[name])


def _text(image: InputShape) -> str:
    return str(image) if isinstance(image, Item) else f"{image[-1]} pixels"


def paired(outputs: Mapping[str, Tensor], pairs: bool) -> dict[str, Tensor]:
    """Fields (2 B, ...) of weak and strong views in turn as (B, 2, ...); others as they are."""
    if not pairs:
        return dict(outputs)
    return {name: values.view(-1, 2, *values.shape[1:]) for name, values in outputs.items()}
