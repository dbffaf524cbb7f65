"""The costly part of a training step as one function of tensors, for a library to compile and capture.

It computes what `Learner.step` defines, from normalisation to loss; backward follows from it, and the
update is one fused operation. What changes from step to step comes in tensors, and so does what follows
from the epoch (warm-ups, ramps, the seeds of noise), so that one compiled graph serves the whole training
and the host only starts it. The first batch of an epoch, and a smaller last one, go by `Learner.step`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from kdcache.methods.step import Clock, Step
from kdcache.models.taps import as_fields
from kdcache.preprocessing import autocast
from kdcache.training.learning.learner import Learner, Losses, paired
from kdcache.views.cached import Batch

Function = Callable[..., Losses]


def captured(function: Function) -> Function:
    """The function compiled, and on a GPU its launches captured in CUDA graphs."""
    compiled: Function = torch.compile(function, mode="reduce-overhead", dynamic=False)
    return compiled


def needs_eager(learner: Learner) -> str | None:
    """Why the steps of a learner cannot be static; None where they can, as far as can be told."""
    if learner.ranks.world > 1:
        return "several processes divide each batch"
    if learner.training.precision == "fp16":
        return "fp16 decides at each step whether its gradients overflowed"
    if learner.training.objective.combine == "random":
        return "a teacher is drawn at each step"
    if any(loss.remembers for loss in learner.objective.losses()):
        return "its loss remembers something of each sample"
    return None


def _copied(method: Callable[..., Any]) -> Function:
    """The method with code of its own, by which a compiler tells apart what it has compiled.

    What it compiles for one piece of code is limited to eight variants, and each learner is one.
    """
    function: Any = method.__func__  # type: ignore[attr-defined]
    code, names = function.__code__.replace(), function.__globals__
    copied = FunctionType(code, names, function.__name__, closure=function.__closure__)
    return MethodType(copied, method.__self__)  # type: ignore[attr-defined]


class StaticStep:
    """Losses of a learner for full batches.

    The first batch is tried on the side. If that cannot be compiled, or layers draw random numbers, the
    learner keeps to its eager step, and that is said.

    Args:
        learner: whose network and objective are used.
        say: told why the learner keeps to its eager step.
        compile: from the function to its compiled form.
    """

    def __init__(
        self,
        learner: Learner,
        say: Callable[[str], None],
        compile: Callable[[Function], Function] = captured,
    ) -> None:
        self.learner, self.say, self.compile = learner, say, compile
        epochs = learner.training.optimization.epochs
        self.clock = Clock(learner.training.seed, epochs, learner.device)
        self.compiled: Function | None = None

    def __call__(self, batch: Batch, epoch: int) -> Losses | None:
        """The loss, with its gradient, and its parts; None where the learner shall take its own way."""
        if epoch != self.clock.epoch:
            self.clock.set(epoch)
        inputs = batch.images, batch.labels, batch.teachers, batch.keys, batch.views, batch.mix
        if self.compiled is None:
            compiled = self.compile(_copied(self._function))
            if reason := self._tried(compiled, inputs):
                self.learner.static, self.learner.not_static = None, reason
                self.say(f"--graph: the step runs eagerly, since {reason}")
                return None
            self.compiled = compiled
        return self._begun(self.compiled, inputs)

    def _begun(self, function: Function, inputs: Sequence[Any]) -> Losses:
        # The gradients of the step before lie in the memory of its graph.
        self.learner.optimizer.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        return function(*inputs)

    def _tried(self, compiled: Function, inputs: Sequence[Any]) -> str | None:
        """Why the function cannot be used; what trying changes is undone."""
        from torch._dynamo.exc import TorchDynamoException

        learner = self.learner
        parts = learner.model, learner.objective
        states = [copy.deepcopy(part.state_dict()) for part in parts]
        drawn = learner.generators()
        try:
            self._function(*inputs)  # as it is: it makes the tensors that the compiled one reads
            if not all(map(torch.equal, drawn, learner.generators())):
                return "its layers draw random numbers, which a compiler would draw otherwise"
            loss, _ = self._begun(compiled, inputs)
            loss.backward()
        except TorchDynamoException as error:
            why = " ".join(str(error).splitlines()[:2])
            return f"it could not be compiled ({why})"
        finally:
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
            learner.generators(drawn)
        return None

    def _function(
        self,
        images: Tensor,
        labels: Tensor,
        teachers: tuple[Mapping[str, Tensor], ...],
        keys: Tensor,
        views: Tensor,
        mix: tuple[Tensor, Tensor] | None,
    ) -> Losses:
        learner = self.learner
        pairs = learner.objective.needs_pair
        inputs = learner.inputs(images.flatten(0, 1) if pairs else images)
        with autocast(learner.device, learner.training.precision):
            given = learner.forward(inputs)
        student = paired(as_fields(given), pairs)
        step = Step(keys=keys, views=views, clock=self.clock)
        return learner.objective(student, teachers, labels, step, mix)  # type: ignore[no-any-return]
