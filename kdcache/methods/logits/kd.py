"""KD: the Kullback-Leibler divergence of two softmaxes at a temperature."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdcache.methods.ablations import ablate, permutation
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.logits.ce import Mix, ce
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.scaling import (
    Reduction,
    SoftmaxTarget,
    Standardize,
    Temperature,
    check_shapes,
    divergence,
    reduced,
    scaled,
)
from kdcache.methods.step import Step
from kdcache_stores.errors import UsageError


def kd(
    student: Tensor,
    teacher: Tensor | SoftmaxTarget,
    *,
    temperature: Temperature = 4.0,
    teacher_temperature: Temperature | None = None,
    student_temperature: Temperature | None = None,
    standardize: Standardize = False,
    reverse: bool = False,
    ablation: str = "full",
    labels: Tensor | None = None,
    order: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Knowledge distillation: T²·KL(softmax(z/T) ‖ softmax(v/T)), mean over the batch.

    T² keeps the size of the gradient as T grows. With two temperatures it becomes the product of
    both (a choice of kdcache; equal ones give T²).

    Args:
        student: (B, K) logits v, any floating dtype.
        teacher: (B, K) logits z, or several teachers as an `Ensemble`.
        temperature: T; τ when standardized. A tensor takes part in the gradient.
        teacher_temperature: instead of `temperature` on the teacher's side.
        student_temperature: instead of `temperature` on the student's side.
        standardize: Z-score both sides first, "unbiased" or "biased".
        reverse: KL(student ‖ teacher) instead.
        ablation: what of the teacher's targets is kept, see `ablate`.
        labels: (B,) int64, for ablations only.
        order: (B, K - 1) int64, for the permuted ablation only.
        reduction: "mean", or "none" for one value per sample.

    Returns:
        A 0-d tensor, or (B,) with reduction "none", in nats.

    Raises:
        DataError: if the shapes differ, or an ablation lacks labels.

    Source: Hinton et al. 2015, section 2; standardized: Sun et al., CVPR 2024, Algorithm 1.
    """
    check_shapes(student, teacher)
    if teacher_temperature is None:
        teacher_temperature = temperature
    if student_temperature is None:
        student_temperature = temperature
    v = scaled(student, student_temperature, standardize)
    z = scaled(teacher, teacher_temperature, standardize)
    v, z = ablate(v, z, labels, ablation, order)
    loss = divergence(z, v) if reverse else divergence(v, z)
    return reduced(teacher_temperature * student_temperature * loss, reduction)


def hard_kd(student: Tensor, teacher: Tensor | SoftmaxTarget) -> Tensor:
    """Cross-entropy with the teacher's largest class, per sample: (B, K) logits each -> (B,).

    Source: Touvron et al., Training Data-Efficient Image Transformers, ICML 2021, eq. 3.
    """
    check_shapes(student, teacher)
    return ce(student, scaled(teacher, 1.0).argmax(-1), reduction="none")


class KD(Loss):
    """`kd` with the objective's temperatures, standardization, direction and ablation."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        names = ("temperature", "teacher_temperature", "student_temperature")
        self.options = {
            name: getattr(config, name) for name in (*names, "standardize", "reverse", "ablation")
        }
        self.hard = config.options.get("target") == "hard"
        if self.hard and any(value not in (None, False, "full") for value in self.options.values()):
            raise UsageError(
                "the teacher's largest class as a label knows no temperature, standardization, ablation "
                "or direction: leave them out, or take the target soft"
            )

    def shared(self, student: Fields, step: Step) -> dict[str, Any]:
        """The order of the permuted ablation: one for all copies of the noise and all teachers."""
        if self.config.ablation != "non-target-permuted":
            return {}
        return {"order": permutation(step, student["logits"].shape[-1])}

    def forward(
        self,
        student: Fields,
        target: TargetFields,
        labels: Tensor,
        step: Step,
        mix: Mix | None,
        **shared: Any,
    ) -> Terms:
        """The term "kd", (B,)."""
        options = self.options | shared
        v, z = student["logits"], target["logits"]
        if self.hard:
            return {"kd": hard_kd(v, z)}
        return {"kd": kd(v, z, labels=labels, reduction="none", **options)}
