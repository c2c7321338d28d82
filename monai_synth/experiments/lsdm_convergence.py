# SPDX-License-Identifier: Apache-2.0
"""Which of LIDC's nine nodule features can be read from noisy crops (lung CT text, Sec 4.2)?

The text says that classifiers of four features converge and leaves out how that was judged. Here each feature gets
one short training of the same network on the training split, and is judged on the test split's nodules, which took no
part, in four bands of timesteps: the loss over that of the best constant answer, labels weighted equally.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils.data import default_collate

from monai_synth.atomic import write_bytes
from monai_synth.checkpoint import build_network, classifier_file, load_file, sha256_of
from monai_synth.data.semantic import FEATURES
from monai_synth.diffusion import add_noise, alphas_cumprod
from monai_synth.errors import UserError
from monai_synth.experiments.lsdm_scores import Patients
from monai_synth.experiments.lsdm_source import Cases, Model
from monai_synth.inference.sampler import initial_noise, make_generators
from monai_synth.networks.latent_codec import LatentCodec
from monai_synth.training import LatentCache, NoduleCropDataset, NoisyCropPrepareBatch, initial_output
from monai_synth.training.classifier import classifier_loss, is_classification

TEXT_CONVERGED = ("malignancy", "lobulation", "spiculation", "texture")  # Sec 4.2
NUM_BANDS = 4
DRAWS = 2  # timesteps and noises of each held-out nodule in a band
LEARNING_RATE, WEIGHT_DECAY, BATCH = 2e-3, 0.05, 32
SEED = 0
_SMALL = {
    "channels": [16, 32, 48],
    "num_res_blocks": 1,
    "attention_levels": [False, False, True],
    "num_head_channels": 16,
    "norm_num_groups": 8,
}  # the demo preset of bundle lsdm


class Convergence:
    """Trains and judges a classifier of each feature; what is done is kept.

    Args:
        model: whose latents, schedule and crops count.
        cases: gives the dataset.
        folder: of predictions and latents.
        steps: of each training.
        codec: the model's autoencoder with its scale.
        device: "cpu" or "cuda".
    """

    def __init__(
        self, model: Model, cases: Cases, folder: Path, *, steps: int, codec: LatentCodec, device: str
    ) -> None:
        self.codec = codec
        self.model, self.cases, self.folder, self.steps, self.device = model, cases, folder, steps, device
        self.schedule = model.contract["schedule"]
        self.bands = bands_of(int(self.schedule["num_train_timesteps"]))
        path = model.path.parent / classifier_file("malignancy", self.schedule)
        content = load_file(path, stage="classifier") if path.is_file() else None
        self.arch = dict(content["arch"]["args"]) if content else {"spatial_dims": 2, "in_channels": 1, **_SMALL}
        side = min(model.image_size) // int(model.contract["factor"])
        self.crop = int(content["contract"]["crop_size_latent"]) if content else min(16, side)

    def run(self, report: Callable[[str], None]) -> dict[str, Any]:
        """Results by feature.

        Raises:
            UserError: no nodule to learn from.
        """
        missing = [f for f in FEATURES if not self._path(f).is_file()]
        if missing:
            codec = self.codec
            caches = {split: self._cache(split, codec) for split in ("training", "test")}
            for feature in missing:
                report(f"  convergence: {feature}, {self.steps} steps")
                self._train_and_predict(feature, caches, codec)
        found = {}
        for feature in FEATURES:
            try:
                with np.load(self._path(feature), allow_pickle=False) as file:
                    found[feature] = judge(feature, file["outputs"], file["targets"], file["patients"].tolist())
            except (OSError, ValueError, KeyError) as error:
                msg = f"{self._path(feature)} cannot be read ({error}); delete it and run the same command again"
                raise UserError(msg) from error
        return {"steps": self.steps, "bands": self.bands, "crop": self.crop, "features": found}

    def is_done(self) -> bool:
        return all(self._path(feature).is_file() for feature in FEATURES)

    def _path(self, feature: str) -> Path:
        record = {
            "files": self.model.files(), "steps": self.steps, "arch": self.arch, "crop": self.crop,
            "dataset": self.cases.dataset.fingerprint, "draws": DRAWS, "rate": LEARNING_RATE, "seed": SEED,
        }  # fmt: skip
        key = _key(record)
        return self.folder / f"{feature}-{key}.npz"

    def _cache(self, split: str, codec: LatentCodec) -> LatentCache:
        return LatentCache(
            self.cases.dataset.root,
            split,
            codec,
            autoencoder_sha256=sha256_of(self.model.path.parent / "autoencoder.pt"),
            cache_dir=self.folder / "latents",
            image_size=self.model.image_size,
            semantic_downsample=self.model.contract["semantic_downsample"],
            collapse_nodule_labels=self.model.contract["collapse_nodule_labels"],
            device=self.device,
        )

    def _train_and_predict(self, feature: str, caches: Mapping[str, LatentCache], codec: LatentCodec) -> None:
        data = NoduleCropDataset(caches["training"], feature, crop_size=self.crop, jitter=1)
        network = train(feature, data, codec, self.schedule, self.arch, steps=self.steps, device=self.device)
        held_out = NoduleCropDataset(caches["test"], feature, crop_size=self.crop)
        outputs = predict(network, held_out, codec, self.schedule, self.bands, device=self.device)
        patients = [str(held_out.data[item[0]].get("patient_id", item[0])) for item in held_out.items]
        buffer = io.BytesIO()
        np.savez(buffer, outputs=outputs, targets=held_out.targets, patients=np.asarray(patients))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self._path(feature), buffer.getvalue())


def _key(record: Mapping[str, Any]) -> str:
    """Names what decides a result."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def bands_of(num_timesteps: int) -> list[list[int]]:
    """(first, last) timestep of equally wide bands."""
    edges = np.linspace(0, num_timesteps, NUM_BANDS + 1).round().astype(int)
    return [[int(a), int(b) - 1] for a, b in itertools.pairwise(edges)]


def train(
    feature: str,
    data: NoduleCropDataset,
    codec: LatentCodec,
    schedule: Mapping[str, Any],
    arch: Mapping[str, Any],
    *,
    steps: int,
    device: str,
) -> nn.Module:
    """A noisy classifier as bundle lsdm makes it, for so many steps with a cosine schedule; labels drawn equally."""
    prepare = NoisyCropPrepareBatch(schedule, codec=codec, classification=is_classification(feature))
    args = dict(arch, out_channels=2 if is_classification(feature) else 1, output_bias=initial_output(feature))
    weights = torch.tensor(data.balanced_weights(), dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = build_network({"target": "monai_synth.networks.NoisyClassifier", "args": args}).to(device).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        loss_of = classifier_loss(feature)
        for _ in range(steps):
            chosen = torch.multinomial(weights, BATCH, replacement=True).tolist()
            x_t, target, _, extra = prepare(default_collate([data[i] for i in chosen]), device)
            optimizer.zero_grad()
            loss_of(network(x_t, extra["timesteps"]), target).backward()
            optimizer.step()
            scheduler.step()
    return network.eval()


@torch.no_grad()
def predict(
    network: nn.Module,
    data: NoduleCropDataset,
    codec: LatentCodec,
    schedule: Mapping[str, Any],
    bands: Sequence[Sequence[int]],
    *,
    device: str,
) -> np.ndarray:
    """What a classifier says of held-out nodules, (N, bands, draws, outputs); t and noise depend on the nodule only."""
    table = alphas_cumprod(schedule)
    rows = []
    for number in range(len(data)):
        mean = data[number]["mean"][None].to(device) * codec.scale_factor
        rng = np.random.default_rng([SEED, number])
        row = []
        for first, last in bands:
            t = torch.from_numpy(rng.integers(first, last + 1, DRAWS)).to(device)
            seeds = rng.integers(0, 2**31, DRAWS).tolist()
            noise = initial_noise(tuple(mean.shape[1:]), make_generators(seeds), device)
            z_t = add_noise(schedule, mean.expand(DRAWS, -1, -1, -1), noise, t, table=table)
            row.append(network(codec.decode(z_t), t).float().cpu().numpy())
        rows.append(row)
    return np.asarray(rows, np.float64).reshape(len(data), len(bands), DRAWS, -1)


def judge(feature: str, outputs: np.ndarray, targets: np.ndarray, patients: Sequence[str]) -> dict[str, Any]:
    """Skill by band and over all: 1 minus the loss over that of the best constant; 0 is chance, 1 is perfect.

    Args:
        feature: of LIDC.
        outputs: (N, bands, draws, 2 logits or 1 rating).
        targets: (N,).
        patients: (N,).
    """
    n = len(targets)
    values, counts = (np.unique(targets, return_counts=True)) if n else (np.zeros(0), np.zeros(0))
    head = {"n": n, "labels": {f"{v:g}": int(c) for v, c in zip(values, counts, strict=True)}}
    if len(values) < 2:
        why = "all held-out nodules have the same value" if n else "there is no held-out nodule"
        return head | {"skill": None, "bands": [], "learned": None, "why": why}
    losses = _losses(feature, outputs, targets)  # (N, bands, draws)
    constants = _losses(feature, _best_constant(feature, targets), targets)[:, 0, 0]
    groups = Patients(patients)

    def skill(part: np.ndarray) -> dict[str, Any]:
        def of(mask: np.ndarray) -> float:
            weight = _balance(targets[mask])
            best = _losses(feature, _best_constant(feature, targets[mask]), targets[mask])[:, 0, 0]
            chance = float(weight @ best)
            return 1 - float(weight @ part[mask]) / chance if chance > 1e-9 else np.nan

        return groups.result(groups.values(of), n)

    answer = outputs[..., 1] - outputs[..., 0] if is_classification(feature) else outputs[..., 0]
    rank = [float(np.nan_to_num(stats.spearmanr(answer[:, b].mean(1), targets)[0])) for b in range(outputs.shape[1])]
    whole = skill(losses.mean((1, 2)))
    bands = [{"skill": skill(losses[:, b].mean(1)), "rank_correlation": rank[b]} for b in range(outputs.shape[1])]
    return head | {
        "skill": whole, "bands": bands, "learned": learned(whole), "chance_loss": float(_balance(targets) @ constants),
    }  # fmt: skip


def learned(skill: Mapping[str, Any]) -> bool | None:
    """Better than chance beyond its interval; without one by more than 5 %, as the training's own report has it."""
    if skill["value"] is None:
        return None
    return bool(skill["ci"][0] > 0 if skill["ci"] else skill["value"] > 0.05)


def _losses(feature: str, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    if not is_classification(feature):
        return (outputs[..., 0] - targets[:, None, None]) ** 2
    logits = torch.from_numpy(outputs)
    wanted = torch.from_numpy(targets.astype(np.int64))[:, None, None].expand(logits.shape[:3])
    return F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").reshape(wanted.shape).numpy()


def _best_constant(feature: str, targets: np.ndarray) -> np.ndarray:
    """The answer (N, 1, 1, C) that is best where every label counts equally."""
    if is_classification(feature):
        return np.zeros((len(targets), 1, 1, 2))
    return np.full((len(targets), 1, 1, 1), float(np.unique(targets).mean()))


def _balance(targets: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(targets, return_inverse=True, return_counts=True)
    return 1.0 / (len(counts) * counts[inverse])
