# SPDX-License-Identifier: Apache-2.0
"""The nnU-Net trainer of the experiments, which nnU-Net finds through ``nnUNet_extTrainer`` (this folder).

Its length, rate, seed and starting weights come from environment variables, since nnU-Net makes its trainers itself.
Prediction reads none of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

PREFIX = "MONAI_SYNTH_"
START_FILE = "start.json"


class MonaiSynthTrainer(nnUNetTrainer):
    """nnU-Net's own trainer with another length, and with all weights of another training to start from.

    ``MONAI_SYNTH_EPOCHS``, ``_ITERATIONS``, ``_VAL_ITERATIONS``, ``_LR``, ``_SEED`` and ``_WEIGHTS`` (a checkpoint)
    may each be unset. Unlike ``-pretrained_weights`` of nnU-Net the segmentation heads are loaded too, without which
    a small rate could not train them, and a checkpoint of a GPU can be loaded without one.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(_variable("EPOCHS", self.num_epochs))
        self.num_iterations_per_epoch = int(_variable("ITERATIONS", self.num_iterations_per_epoch))
        self.num_val_iterations_per_epoch = int(_variable("VAL_ITERATIONS", self.num_val_iterations_per_epoch))
        self.initial_lr = float(_variable("LR", self.initial_lr))
        self.seed = int(_variable("SEED", 0))
        self.save_every = max(1, min(50, self.num_epochs // 10))
        self._plot_progress, self.logger.plot_progress_png = self.logger.plot_progress_png, lambda folder: None

    def initialize(self) -> None:
        self._set_seeds()
        super().initialize()

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        self._set_seeds()
        super().on_train_start()
        # A resumed training has its weights already, and is past epoch 0.
        weights = _variable("WEIGHTS", "")
        if self.current_epoch == 0:
            if weights:
                checkpoint = torch.load(weights, map_location=self.device, weights_only=False)
                self._plain_network().load_state_dict(checkpoint["network_weights"])
                self.print_to_log_file("All weights, those of the segmentation heads too, are from", weights)
            start = {"weights": weights or None, "sha256": state_sha256(self._plain_network().state_dict())}
            Path(self.output_folder, START_FILE).write_text(json.dumps(start), encoding="utf-8")

    def on_train_end(self) -> None:
        super().on_train_end()
        self._plot_progress(self.output_folder)

    def save_checkpoint(self, filename: str) -> None:
        """Whole or not at all; nothing reads the best one, and the last one needs no momentum."""
        name = os.path.basename(filename)
        if name == "checkpoint_best.pth":
            return
        part = f"{filename}.part"
        super().save_checkpoint(part)
        if name == "checkpoint_final.pth":
            checkpoint = torch.load(part, map_location="cpu", weights_only=False)
            checkpoint["optimizer_state"]["state"] = {}
            torch.save(checkpoint, part)
        os.replace(part, filename)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Nothing: the experiment scores on test images, and a sliding window over the training set takes long."""

    def _plain_network(self) -> torch.nn.Module:
        return getattr(self.network, "_orig_mod", self.network)

    def _set_seeds(self) -> None:
        seed = (self.seed * 1_000_003 + self.current_epoch) % 2**32
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (nnU-Net's loaders draw from it)
        torch.manual_seed(seed)


def state_sha256(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and values of all weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode("utf-8"))
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _variable(name: str, default: object) -> str:
    return os.environ.get(PREFIX + name, str(default))
