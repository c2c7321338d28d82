# SPDX-License-Identifier: Apache-2.0
"""What differs between the classifier of malignancy, the regressors of other features, and one network for several."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_synth.data.semantic import FEATURES, GUIDING_FEATURES, MALIGNANCY
from monai_synth.errors import UserError
from monai_synth.networks.noisy_classifier import feature_columns

logger = logging.getLogger(__name__)


ALL = "all"  # a feature's name that stands for the four that guide, told by one network


def told_features(feature: str) -> list[str]:
    """The features that a classifier tells: the named one, or the four that guide for "all".

    Raises:
        UserError: a feature that LIDC does not rate.
    """
    if feature == ALL:
        return list(GUIDING_FEATURES)
    if feature not in FEATURES:
        raise UserError(f"unknown nodule feature {feature!r}; allowed are {', '.join(FEATURES)}, {ALL}")
    return [feature]


def is_classification(feature: str) -> bool:
    """Malignancy is classified, the other eight features are regressed (LSDM thesis, Sec 3.4.1).

    Raises:
        UserError: a feature that LIDC does not rate.
    """
    return told_features(feature) == [MALIGNANCY]


def num_outputs(feature: str) -> int:
    """Output channels of its classifier: two for malignancy, one for each rating."""
    return max(columns.stop for columns in feature_columns(told_features(feature)).values())


def initial_output(feature: str) -> float | list[float]:
    """What a fresh network answers: undecided for malignancy, the middle of the scale from 1 to 5 for a rating."""
    first = [value for name in told_features(feature) for value in ([0.0, 0.0] if name == MALIGNANCY else [3.0])]
    return first if feature == ALL else first[0]


class FeatureLoss(nn.Module):
    """Cross-entropy for malignancy, mean squared error for the others (Sec 3.4.1), summed over the features told.

    Args:
        features: in the order of :func:`monai_synth.networks.feature_columns`.
    """

    def __init__(self, features: Sequence[str]) -> None:
        super().__init__()
        self.columns = feature_columns(features)

    def forward(self, pred: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Loss of answers (B, C) and one label of each feature, (B, number of features)."""
        losses = [
            nn.functional.cross_entropy(pred[:, columns], label[:, i].long())
            if feature == MALIGNANCY
            else nn.functional.mse_loss(pred[:, columns.start], label[:, i])
            for i, (feature, columns) in enumerate(self.columns.items())
        ]
        return torch.stack(losses).sum()


def classifier_loss(feature: str) -> nn.Module:
    """Cross-entropy for malignancy, mean squared error for the others (Sec 3.4.1)."""
    if feature == ALL:
        return FeatureLoss(told_features(feature))
    return nn.CrossEntropyLoss() if is_classification(feature) else nn.MSELoss()


class ConvergenceReport:
    """Whether a classifier learned its feature from noisy crops (Sec 4.2: four features converge, the others do not).

    Losses on the validation nodules are weighted so that each label counts equally, as training draws them, and
    compared with the best constant prediction. A feature has converged when its loss is below 95 % of that.

    Args:
        evaluator: validator whose outputs hold ``pred`` and ``label``.
        feature: the rated feature, or "all".
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
            ``n``, ``val_loss``, ``constant_loss``, ``converged``, and where several features are told these of each
            in ``features``; only ``n`` = 0 without validation nodules.
        """
        self.evaluator.run()
        if not self.outputs:
            logger.warning(f"no validation nodule: whether {self.feature} converged is unknown")
            return {"n": 0}
        pred = torch.cat([p for p, _ in self.outputs]).double()
        label = torch.cat([y for _, y in self.outputs])
        if self.feature != ALL:
            return _judged(self.feature, pred, label.flatten())
        columns = feature_columns(told_features(self.feature))
        reports = {name: _judged(name, pred[:, c], label[:, i]) for i, (name, c) in enumerate(columns.items())}
        sums = {key: sum(report[key] for report in reports.values()) for key in ("val_loss", "constant_loss")}
        converged = all(report["converged"] for report in reports.values())
        return {"n": len(label), **sums, "converged": converged, "features": reports}


def _judged(feature: str, pred: torch.Tensor, label: torch.Tensor) -> dict[str, Any]:
    """Report of one feature by answers (N, 2) or (N, 1) and labels (N,)."""
    _, inverse, counts = np.unique(label.numpy(), return_inverse=True, return_counts=True)
    weight = torch.from_numpy(1.0 / (len(counts) * counts[inverse]))
    if feature == MALIGNANCY:
        losses = nn.functional.cross_entropy(pred, label.long(), reduction="none")
        # the constant that gives every label that occurs the same probability
        constant = float(np.log(max(len(counts), 2)))
    else:
        losses = (pred[:, 0] - label.double()) ** 2
        mean = (weight * label.double()).sum()
        constant = float((weight * (label.double() - mean) ** 2).sum())
    loss = float((weight * losses).sum())
    report = {"n": len(label), "val_loss": loss, "constant_loss": constant, "converged": loss < 0.95 * constant}
    verdict = "converged" if report["converged"] else "did NOT converge, its guidance will not be meaningful"
    logger.info(f"{feature}: validation loss {loss:.3f}, best constant {constant:.3f}, n {len(label)}: {verdict}")
    return report
