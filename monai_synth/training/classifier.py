# SPDX-License-Identifier: Apache-2.0
"""What differs between the classifier of binary malignancy and the regressors of the other features."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_synth.data.semantic import FEATURES
from monai_synth.errors import UserError

logger = logging.getLogger(__name__)


def is_classification(feature: str) -> bool:
    """Malignancy is classified, the other eight features are regressed (LSDM thesis, Sec 3.4.1).

    Raises:
        UserError: a feature that LIDC does not rate.
    """
    if feature not in FEATURES:
        raise UserError(f"unknown nodule feature {feature!r}; allowed are {', '.join(FEATURES)}")
    return feature == "malignancy"


def initial_output(feature: str) -> float:
    """What a fresh network answers: undecided for malignancy, the middle of the scale from 1 to 5 for a rating."""
    return 0.0 if is_classification(feature) else 3.0


def classifier_loss(feature: str) -> nn.Module:
    """Cross-entropy for malignancy, mean squared error for the others (Sec 3.4.1)."""
    return nn.CrossEntropyLoss() if is_classification(feature) else nn.MSELoss()


class ConvergenceReport:
    """Whether a classifier learned its feature from noisy crops (Sec 4.2: four features converge, the others do not).

    Losses on the validation nodules are weighted so that each label counts equally, as training draws them, and
    compared with the best constant prediction. A feature has converged when its loss is below 95 % of that.

    Args:
        evaluator: validator whose outputs hold ``pred`` and ``label``.
        feature: the rated feature.
    """

    def __init__(self, evaluator: Engine, feature: str) -> None:
        self.evaluator = evaluator
        self.feature = feature
        self.outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        evaluator.add_event_handler(Events.STARTED, lambda _: self.outputs.clear())
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._collect)

    def _collect(self, engine: Engine) -> None:
        output = engine.state.output
        self.outputs.append((output["pred"].detach().cpu(), output["label"].detach().cpu()))

    def __call__(self) -> Mapping[str, Any]:
        """Validate once more and judge.

        Returns:
            ``n``, ``val_loss``, ``constant_loss``, ``converged``; only ``n`` = 0 without validation nodules.
        """
        self.evaluator.run()
        if not self.outputs:
            logger.warning(f"no validation nodule: whether {self.feature} converged is unknown")
            return {"n": 0}
        pred = torch.cat([p for p, _ in self.outputs]).double()
        label = torch.cat([y for _, y in self.outputs])
        _, inverse, counts = np.unique(label.flatten().numpy(), return_inverse=True, return_counts=True)
        weight = torch.from_numpy(1.0 / (len(counts) * counts[inverse]))
        if is_classification(self.feature):
            losses = nn.functional.cross_entropy(pred, label, reduction="none")
            # the constant that gives every label that occurs the same probability
            constant = float(np.log(max(len(counts), 2)))
        else:
            losses = (pred[:, 0] - label[:, 0].double()) ** 2
            mean = (weight * label[:, 0].double()).sum()
            constant = float((weight * (label[:, 0].double() - mean) ** 2).sum())
        loss = float((weight * losses).sum())
        report = {
            "n": len(label),
            "val_loss": loss,
            "constant_loss": constant,
            "converged": loss < 0.95 * constant,
        }
        verdict = "converged" if report["converged"] else "did NOT converge, its guidance will not be meaningful"
        logger.info(
            f"{self.feature}: validation loss {loss:.3f}, best constant {constant:.3f}, n {len(label)}: {verdict}"
        )
        return report
