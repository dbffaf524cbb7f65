"""PS-KD: the student's own predictions of the last epoch are mixed into its labels, more and more."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.methods.logits.ce import Mix
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.nets import Nets
from kdcache.methods.samples import Places
from kdcache.methods.scaling import Reduction, full_precision, reduced
from kdcache.methods.step import Step
from kdcache.methods.target import check_labels
from kdcache_stores.errors import UsageError


def ps_kd(
    student: Tensor,
    labels: Tensor,
    earlier: Tensor,
    *,
    share: float,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy with (1 - share) of the label and `share` of an earlier prediction.

    Args:
        student: (B, K) logits, any floating dtype.
        labels: (B,) int64, all of them known.
        earlier: (B, K) probabilities.
        share: of the earlier prediction, 0 to 1.
        reduction: "mean", or "none" for one value per sample.

    Returns:
        A 0-d tensor, or (B,) with reduction "none", in nats.

    Source: Kim et al., Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021.
    """
    labels = check_labels(labels, "PS-KD")
    logs = full_precision(student).log_softmax(-1)
    target = (1 - share) * F.one_hot(labels, student.shape[-1]) + share * earlier
    return reduced(-(target * logs).sum(-1), reduction)


class PSKD(Loss):
    """`ps_kd` with the prediction that each sample had in the epoch before, when it was trained on.

    The share grows linearly to `alpha` at the last epoch. A sample without an earlier prediction has its
    label instead. The predictions, (N, K), are part of the checkpoint.
    """

    remembers = True
    predictions: Tensor

    def build(self, nets: Nets) -> None:
        """Room for a prediction of every sample; NaN where there is none yet."""
        self.places = Places(nets, "ps-kd")
        (classes,) = nets.student["logits"]
        self.register_buffer("predictions", torch.full((len(self.places), classes), torch.nan))

    def forward(
        self,
        student: Fields,
        target: TargetFields,
        labels: Tensor,
        step: Step,
        mix: Mix | None,
        **shared: Any,
    ) -> Terms:
        """The term "kd", (B,). In training mode the predictions are kept."""
        if mix is not None:
            raise UsageError(
                "ps-kd keeps a prediction of each image, and a mixed one is another every epoch: use an "
                "augmentation without mixup and cutmix"
            )
        logits, places = student["logits"], self.places.of(step)
        earlier = self.predictions[places].to(logits.dtype)
        known = F.one_hot(check_labels(labels, "ps-kd"), logits.shape[-1]).to(logits.dtype)
        earlier = torch.where(earlier.isnan(), known, earlier)
        share = self.config.options["alpha"] * (step.epoch + 1) / max(step.epochs, 1)
        if self.training:
            with torch.no_grad():
                now = logits.softmax(-1).to(self.predictions.dtype)
                self.predictions.index_copy_(0, places, now)
        return {"kd": ps_kd(logits, labels, earlier, share=share, reduction="none")}
