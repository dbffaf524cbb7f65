"""The whole loss of a training step, from the student's fields and the teachers' cached ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.ensembles import (
    MEANS,
    Ensemble,
    choose,
    confidence_weights,
    entropy_weights,
    shares,
)
from kdcache.methods.logits.ce import Mix, ce
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.nets import Nets
from kdcache.methods.record import Method
from kdcache.methods.scaling import full_precision
from kdcache.methods.step import Step
from kdcache.methods.table import METHODS, names_of
from kdcache_stores.errors import DataError, UsageError


def loss_class(method: Method) -> type[Loss]:
    """The loss that a method's record names."""
    assert method.loss is not None
    module, _, name = method.loss.partition(":")
    loss: type[Loss] = getattr(import_module(module), name)
    return loss


class Objective(nn.Module):
    """ce_weight·CE + kd_weight·D, where D is the distillation term of a method; those of others may be added.

    The teachers' logits take one way, in this order: noise per teacher; the teacher's transform
    (none, Z-score or probabilities, by `combine`); the combination; standardization of what is
    still a logit, on both sides; the loss. With `copies` of the noise, D is the mean over them.
    Everything is computed in float32, with autocast off.

    The parameters of a method (CTKD's θ) are parameters of this module: give
    `objective.parameters()` to the optimizer beside the student's, keep `objective.state_dict()` in
    checkpoints, and average their gradients over ranks as the student's.

    Args:
        config: an `ObjectiveConfig`, or nothing and its fields as keywords.
        nets: what is known of the networks, for methods on features that have parts of their own.

    >>> objective = Objective(method="kd", standardize="unbiased")
    >>> objective.config.temperature, objective.config.kd_weight
    (2.0, 9.0)

    Attributes:
        config: the configuration with every published default filled in.
        method: the record of the method.
        loss: the distillation term; None of cross-entropy.
        added: the terms that are added, by the name of their method.
        student_fields: what is read of the student, by stored name, its logits first.
        teacher_fields: what is read of each teacher.
        needs_teacher: whether teachers are used.
        peers: whether other students are, in their place.
        needs_pair: whether logits are (B, 2, K), of a weak and a strong view.
        needs_labels: whether a sample without a label is refused.
        needs_keys: whether `Step.keys` are used (noise, permuted ablation).
    """

    def __init__(
        self, config: ObjectiveConfig | None = None, nets: Nets | None = None, **options: Any
    ) -> None:
        super().__init__()
        if config is not None and options:
            raise UsageError(f"expected a config or options, found both: {', '.join(options)}")
        given = config or ObjectiveConfig(**options)
        self.config = given.resolved()
        self.method = self.config.record
        own, *others = given.parts()
        self.loss = loss_class(self.method)(own) if self.method.loss else None
        self.added = nn.ModuleDict({part.method: loss_class(part.record)(part) for part in others})
        self.weights_added = {part.method: part.kd_weight or 0.0 for part in others}
        student = self.config.student_fields if nets is None else tuple(nets.student)
        self.student_fields = tuple(dict.fromkeys(("logits", *student)))
        self.teacher_fields = self.config.teacher_fields if nets is None else tuple(nets.teacher)
        if nets is not None:
            for loss in self.losses():
                loss.build(nets)
        self.needs_teacher, self.peers = self.config.needs_teacher, self.method.peers
        if self.peers:
            self.teacher_fields = ("logits",)
        self.needs_pair = self.method.pairs
        records = self.config.records
        self.needs_labels = (
            any(record.needs_labels for record in records) or self.config.ablation != "full"
        )
        self.needs_keys = (
            self.config.noise is not None or self.config.ablation == "non-target-permuted"
        )

    def losses(self) -> list[Loss]:
        """The distillation terms: the method's, if it has one, then those that are added."""
        added = cast(Iterable[Loss], self.added.values())
        return [*([] if self.loss is None else [self.loss]), *added]

    def check(self, labels: np.ndarray | Tensor, teachers: int = 1) -> None:
        """Refuse before the first step what no step could use; call it once, with all labels.

        Args:
            labels: (N,) integers, -1 for unlabelled.
            teachers: number of teachers.

        Raises:
            DataError: for unlabelled samples where the method needs labels.
            UsageError: for no teacher, or another number of weights than of teachers.
        """
        labels = np.asarray(labels)
        missing = int((labels < 0).sum())
        if self.needs_labels and missing:
            raise DataError(
                f"{self._name()} needs the label of each sample, found {missing} of {labels.size} "
                f"unlabelled (-1). Leave those out, or use a method without ablation among "
                f"{names_of(m for m in METHODS.values() if not m.needs_labels)}."
            )
        if self.needs_teacher and not teachers:
            raise UsageError(f"{self._name()} needs at least one teacher, found none")
        if self.needs_teacher and not isinstance(self.config.weights, str):
            shares(self.config.weights, teachers)
        alone = [record.name for record in self.config.records if record.one_teacher]
        if alone and teachers > 1:
            raise UsageError(f"{alone[0]} distils one teacher, found {teachers}")
        if teachers > 1:
            self._check_combined(teachers)

    def _check_combined(self, teachers: int) -> None:
        """Refuse to combine by their logits teachers of which other fields are read."""
        reads = f"{self._name()} reads {', '.join(self.teacher_fields)} of each"
        combine, weights = self.config.combine, self.config.weights
        if combine in MEANS and set(self.teacher_fields) - {"logits"}:
            raise UsageError(
                f"--combine {combine} makes one target of {teachers} teachers by their logits, and "
                f"{reads}: --combine mean-losses or --combine random"
            )
        if isinstance(weights, str) and "logits" not in self.teacher_fields:
            raise UsageError(
                f"--teacher-weights {weights} are those of logits, and {reads}: give numbers"
            )

    def forward(
        self,
        student: Fields,
        teachers: Sequence[Fields],
        labels: Tensor,
        step: Step | None = None,
        mix: Mix | None = None,
    ) -> tuple[Tensor, Terms]:
        """The loss and its parts.

        Args:
            student: the student's outputs by field, of any floating dtype: "logits" (B, K), or
                (B, 2, K), weak then strong, for pairs; and the rest of `student_fields`.
            teachers: for each teacher, or of dml each other student, its outputs by field, logits of the
                student's shape; empty where the method has none. Fields that it does not read may be there.
            labels: (B,) int64, -1 for unlabelled.
            step: where in the training this is; seeds noise, permutation and choice, and is the
                clock of DKD's warm-up, CTKD's ramp and the noise's schedule.
            mix: partner labels and lam of mixup or cutmix, when the images are mixed.

        Returns:
            The loss, 0-d, and detached 0-d tensors on its device: "ce", "ce_weighted" and, but for
            ce, "kd" (the distillation term as it enters, warm-up included), "kd_weighted",
            "kd_share" (of the loss), and what else the method's loss gives ("tckd" and "nckd" of
            DKD, "temperature" of CTKD). Those of an added method are named with it, "kd_weighted" of
            dkd "dkd_kd_weighted"; "kd_share" is of all together. A weight of 0 leaves "ce" out of the
            graph, not out of the parts.

        Raises:
            DataError: for absent fields, shapes that do not fit, or labels that are needed and
                absent.
            UsageError: for a wrong number of teachers, a step without keys where noise needs them,
                or an ablation on mixed images.
        """
        step = Step() if step is None else step
        with torch.autocast(labels.device.type, enabled=False):
            student = self._fields(student, self.student_fields, "the student")
            self._check_batch(student["logits"], len(teachers), labels, mix)
            ce_weight, kd_weight = self.config.ce_weight, self.config.kd_weight
            assert ce_weight is not None
            assert kd_weight is not None
            parts: Terms = {"ce": self._cross_entropy(student["logits"], labels, mix)}
            loss = parts["ce_weighted"] = ce_weight * parts["ce"]
            outputs = self._outputs(teachers, student) if self.losses() else []
            if self.loss is not None:
                parts |= self._distillation(self.loss, student, outputs, labels, step, mix)
                parts["kd_weighted"] = kd_weight * parts["kd"]
                loss = loss + parts["kd_weighted"]
            for name, weight in self.weights_added.items():
                added = cast(Loss, self.added[name])
                terms = self._distillation(added, student, outputs, labels, step, mix)
                terms["kd_weighted"] = weight * terms["kd"]
                loss = loss + terms["kd_weighted"]
                prefix = name.replace("-", "_")
                parts |= {f"{prefix}_{part}": term for part, term in terms.items()}
            parts = {name: part.detach() for name, part in parts.items()}
            if self.losses():
                # Of a loss of 0 it is 0: a student equal to its teacher, without labels.
                whole = loss.detach()
                distilled = whole - parts["ce_weighted"] if self.added else parts["kd_weighted"]
                parts["kd_share"] = torch.where(whole == 0, whole, distilled / whole)
            return loss, parts

    def _name(self) -> str:
        ablation = self.config.ablation
        return self.method.name + ("" if ablation == "full" else f" with ablation {ablation!r}")

    def _fields(self, outputs: Fields, wanted: Sequence[str], whose: str) -> dict[str, Tensor]:
        """The fields that the method reads, in float32."""
        for field in wanted:
            if field not in outputs:
                raise DataError(
                    f"{self._name()} reads the field {field!r} of {whose}, found "
                    f"{', '.join(outputs) or 'none'}"
                )
        return {field: full_precision(outputs[field]) for field in wanted}

    def _outputs(self, teachers: Sequence[Fields], student: Fields) -> list[dict[str, Tensor]]:
        """What is read of each teacher, without a gradient."""
        if not self.needs_teacher and not self.peers:
            return []
        if not teachers:
            who = "other student" if self.peers else "teacher"
            raise UsageError(f"{self._name()} needs the outputs of at least one {who}, found none")
        targets = []
        for number, teacher in enumerate(teachers):
            whose = f"teacher {number} (counted from 0)"
            outputs = self._fields(teacher, self.teacher_fields, whose)
            targets.append({field: output.detach() for field, output in outputs.items()})
            shape = student["logits"].shape
            if "logits" in outputs and outputs["logits"].shape != shape:
                raise DataError(
                    f"expected logits of {whose} of the student's shape {tuple(shape)}, found "
                    f"{tuple(outputs['logits'].shape)}"
                )
        return targets

    def _check_batch(self, logits: Tensor, teachers: int, labels: Tensor, mix: Mix | None) -> None:
        expected = 3 if self.needs_pair else 2
        if logits.ndim != expected or len(logits) != len(labels):
            shape = "(samples, 2, classes)" if self.needs_pair else "(samples, classes)"
            raise DataError(
                f"{self._name()} expects student logits {shape} with one label each, found "
                f"{tuple(logits.shape)} and {tuple(labels.shape)} labels"
            )
        if logits.shape[-1] < 2:
            raise DataError(f"expected logits of at least 2 classes, found {logits.shape[-1]}")
        if self.config.ablation != "full" and mix is not None:
            raise UsageError(
                f"the ablation {self.config.ablation!r} needs one label per image, and mixed "
                "images have two: use an augmentation without mixup and cutmix"
            )
        looks = labels.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.needs_labels and looks:
            self.check(labels, teachers)

    def _cross_entropy(self, logits: Tensor, labels: Tensor, mix: Mix | None) -> Tensor:
        views = logits.unbind(1) if self.needs_pair else (logits,)
        smoothing = self.config.label_smoothing
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.ce_weight != 0):
            losses = [ce(view, labels, label_smoothing=smoothing, mix=mix) for view in views]
            return torch.stack(losses).sum()

    def _distillation(
        self,
        loss: Loss,
        student: Fields,
        teachers: Sequence[dict[str, Tensor]],
        labels: Tensor,
        step: Step,
        mix: Mix | None,
    ) -> Terms:
        if not loss.config.record.needs_teacher and not self.peers:
            terms = loss(student, {}, labels, step, mix, **loss.shared(student, step))
            return {name: term.mean() for name, term in terms.items()}
        noise = self.config.noise
        copies = 1 if noise is None else noise.copies
        shared = loss.shared(student, step)
        total: Terms = {}
        for copy in range(copies):
            noisy = [
                outputs if noise is None
                else outputs | {"logits": noise(outputs["logits"], step, teacher, copy)}
                for teacher, outputs in enumerate(teachers)
            ]  # fmt: skip
            for weight, target in self._targets(noisy, labels, step, mix):
                terms = loss(student, target, labels, step, mix, **shared)
                for name, term in terms.items():
                    part = (weight * term).mean() / copies
                    total[name] = total[name] + part if name in total else part
        return total

    def _targets(
        self,
        teachers: Sequence[Mapping[str, Tensor]],
        labels: Tensor,
        step: Step,
        mix: Mix | None,
    ) -> Iterator[tuple[float | Tensor, TargetFields]]:
        """(weight of the loss, what it compares with): one pair, or one per teacher."""
        combine, weights = self.config.combine, self.config.weights
        if self.peers:
            yield from ((1 / len(teachers), teacher) for teacher in teachers)
            return
        if len(teachers) == 1:
            if not isinstance(weights, str):
                shares(weights, 1)
            yield 1.0, teachers[0]
            return
        self._check_combined(len(teachers))
        if isinstance(weights, str):
            logits = [teacher["logits"] for teacher in teachers]
            per_sample = (
                entropy_weights(logits)
                if weights == "entropy"
                else confidence_weights(logits, labels, mix)
            )
            if combine == "mean-losses":
                yield from zip(per_sample, teachers, strict=True)
            else:
                yield 1.0, {"logits": Ensemble(logits, list(per_sample[..., None]), combine)}
        else:
            fixed = shares(weights, len(teachers))
            if combine == "mean-losses":
                yield from zip(fixed, teachers, strict=True)
            elif combine == "random":
                yield 1.0, teachers[choose(fixed, step)]
            else:
                logits = [teacher["logits"] for teacher in teachers]
                yield 1.0, {"logits": Ensemble(logits, fixed, combine)}
