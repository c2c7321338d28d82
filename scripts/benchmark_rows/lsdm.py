# SPDX-License-Identifier: Apache-2.0
"""Rows of LSDM: sampling with and without guidance, against the text's slow form and against MONAI's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark_rows.measure import Goal, Row, Run, compared, rows_of
from benchmark_rows.networks import NO_BF16, has_bf16, in_bf16, randomize
from benchmark_rows.spade import (
    LABELS,
    LATENT,
    SCHEDULE,
    autoencoder,
    equal_spade_networks,
    spade_inputs,
    spade_network,
)
from monai_synth.data.semantic import GUIDING_FEATURES as FEATURES

TEXT_STEPS = 1000
CONFIG = Path(__file__).resolve().parents[2] / "bundles" / "lsdm" / "configs" / "inference.json"
CALLS = json.loads(CONFIG.read_text(encoding="utf-8"))["num_steps"]  # the bundle's default


@dataclass
class Case:
    """What one sampling of LSDM needs.

    Attributes:
        network: SPADE U-Net.
        codec: autoencoder with its conventions.
        label: maps (B, 1, H, W), each with a nodule in its middle.
        nodules: table of each map.
        classifiers: for each feature.
        shared: heads of one classifier of all features.
        crop: side of the classifiers' crop of the latent.
    """

    network: nn.Module
    codec: nn.Module
    label: Tensor
    nodules: list[list[dict[str, Any]]]
    classifiers: dict[str, nn.Module]
    shared: dict[str, nn.Module]
    crop: int

    def denoiser(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The network with its conditions bound, SPADE computed at every call."""
        from monai_synth.data.slices import one_hot
        from monai_synth.networks import pool_semantic

        cond = self.codec.encode_label(self.label)
        seg = pool_semantic(one_hot(self.label, LABELS), cond.shape[2:])
        return lambda x, t: self.network(torch.cat([x, cond], 1), t, seg=seg)


def make_case(
    channels: Sequence[int], hidden: int, ae_channels: Sequence[int], clf_channels: Sequence[int], latent: int,
    batch: int, device: str,
) -> Case:  # fmt: skip
    """Networks with random weights, and maps of a body with two lungs' worth of labels and a nodule."""
    from monai_synth.networks import FeatureHead, NoisyClassifier, feature_columns
    from monai_synth.networks.latent_codec import LatentCodec

    torch.manual_seed(0)
    factor = 2 ** (len(ae_channels) - 1)
    size = latent * factor
    codec = LatentCodec(autoencoder(ae_channels), image_channels=1, factor=factor, num_labels=LABELS).to(device)
    rows, cols = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    radius = ((rows - size / 2) ** 2 + (cols - size / 2) ** 2).sqrt() / size
    label = (radius < 0.45).long() + (radius < 0.3).long() + 3 * (radius < 0.08).long()
    label = label.expand(batch, 1, size, size).clone().to(device)
    nodule = {"center": [size // 2, size // 2], "bbox": [0, 0, size, size], "malignant": 1}
    nodule |= dict.fromkeys(FEATURES[1:], 3.0)

    def classifier(num_outputs: int) -> nn.Module:
        return NoisyClassifier(
            2, 1, num_outputs, clf_channels, num_res_blocks=1, norm_num_groups=min(8, clf_channels[0]),
            attention_levels=(False,) * (len(clf_channels) - 1) + (True,), num_head_channels=clf_channels[0],
        ).to(device)  # fmt: skip

    classifiers = {f: classifier(2 if f == "malignancy" else 1) for f in FEATURES}
    columns = feature_columns(FEATURES)
    whole = classifier(max(c.stop for c in columns.values()))
    shared = {f: FeatureHead(whole, c) for f, c in columns.items()}
    network = randomize(spade_network(channels, hidden, like_monai=False)).to(device).eval()
    return Case(network, codec, label, [[nodule] for _ in range(batch)], classifiers, shared, max(latent // 2, 1))


def our_sampling(case: Case, *, guided: bool, bf16: bool = False, shared: bool = False) -> Callable[[], Tensor]:
    """The bundle's calls of dpm++ with SPADE's modulations cached, label encoded and image decoded, as it samples."""
    from monai_synth.inference.lsdm import LSDMInferer

    network = in_bf16(case.network, case.label.device) if bf16 else case.network
    classifiers = (case.shared if shared else case.classifiers) if guided else None
    inferer = LSDMInferer(case.codec, SCHEDULE, num_steps=CALLS, classifiers=classifiers, crop_size_latent=case.crop)
    nodules = case.nodules if guided else None
    return lambda: inferer(case.label, network, seeds=range(len(case.label)), nodules=nodules)


def slow_sampling(case: Case, steps: int, *, guided: bool) -> Callable[[], Tensor]:
    """Ancestral steps in float32, SPADE computed at each; guided, each classifier decodes the whole map at each."""
    from monai_synth.diffusion import make_sampler
    from monai_synth.inference import initial_noise, make_generators, sample
    from monai_synth.inference.guidance import NoduleGuidance, nodule_requests

    denoiser = case.denoiser()
    guidance = None
    if guided:
        parts = []
        for feature, classifier in case.classifiers.items():
            requests = [
                nodule_requests(label[0].cpu(), table, case.codec.factor, features=[feature])
                for label, table in zip(case.label, case.nodules, strict=True)
            ]
            parts.append(NoduleGuidance(
                case.codec.decode, {feature: classifier}, requests, crop_size_latent=case.crop, decode="decode_first"
            ))  # fmt: skip

        def guidance(x: Tensor, t: int, variance: float) -> Tensor:
            return sum(part(x, t, variance) for part in parts)

    shape = (LATENT, *(s // case.codec.factor for s in case.label.shape[2:]))
    seeds = range(len(case.label))
    generators = make_generators(seeds)
    x_T = initial_noise(shape, generators, case.label.device)
    scheduler = make_sampler("ddpm", SCHEDULE, steps)
    return torch.no_grad()(
        lambda: sample(denoiser, x_T, scheduler, guidance=guidance, generators=make_generators(seeds))
    )


LSDM_FULL = {"channels": (64, 128, 192), "hidden": 128, "ae_channels": (16, 32, 64), "clf_channels": (16, 32, 48)}
LSDM_TINY = {"channels": (8, 16), "hidden": 8, "ae_channels": (4, 8, 8), "clf_channels": (8, 8), "latent": 8}


@rows_of(
    "lsdm-sampling",
    full=LSDM_FULL | {"latent": 32, "batch": 2, "steps": 8, "guided_steps": 4},
    quick=LSDM_FULL | {"latent": 32, "batch": 1, "steps": 5, "guided_steps": 3},
    tiny=LSDM_TINY | {"batch": 1, "steps": 2, "guided_steps": 1},
    gpu={**LSDM_FULL, "channels": (192, 384, 576, 768), "ae_channels": (64, 128, 256), "latent": 128, "batch": 8,
         "steps": 20, "guided_steps": 5},
)  # fmt: skip
def lsdm_sampling(run: Run, *, batch: int, steps: int, guided_steps: int, **shape: Any) -> list[Row]:
    """Sampling of cases, plain and guided by four classifiers, against the text's 1000 steps done naively."""
    rows = []
    bf16 = has_bf16(run.device)
    for guided, limit, timed in ((False, 200, steps), (True, 250, guided_steps)):
        case = make_case(batch=batch, device=run.device, **shape)
        actions = {
            "ours": our_sampling(case, guided=guided),
            "slow": slow_sampling(case, timed, guided=guided),
        }
        if guided:
            actions["shared"] = our_sampling(case, guided=True, bf16=bf16, shared=True)
        if bf16:
            actions["bf16"] = our_sampling(case, guided=guided, bf16=True)
        times = run.time(actions, rounds=max(1, min(run.rounds, 3)))
        name = "guided" if guided else "plain"
        size = case.label.shape[-1]
        work = f"LSDM, 32 cases of {size} x {size}, " + ("all four classifiers" if guided else "without guidance")
        note = (
            f"ours: {CALLS} calls of dpm++ (the bundle's default) with SPADE cache, map encoded and image decoded, "
            f"{batch} cases timed; the slow form: {TEXT_STEPS} ancestral steps in float32 without cache, {timed} of "
            "them timed and scaled, encoding and decoding left out in its favour; that the quality is equal is shown "
            "by the table in the bundle's docs and the solver rows, not here"
        )
        if guided:
            note += "; naive guidance decodes the full map once per classifier and step"
        goal = Goal(limit, at_least=True)
        scales = {"scale": 32 / batch, "peer_scale": 32 / batch * TEXT_STEPS / timed}
        rows.append(compared(
            f"lsdm-sampling/{name}/fp32", f"{work}, float32", times, "slow", peer_name="1000 ancestral steps",
            times_faster=True, goal=goal, note=note, **scales,
        ))  # fmt: skip
        label = f"{work}, U-Net in bfloat16"
        if bf16:
            rows.append(compared(
                f"lsdm-sampling/{name}/bf16", label, times, "slow", ours="bf16", peer_name="1000 ancestral steps",
                times_faster=True, goal=goal, note=note, **scales,
            ))  # fmt: skip
        else:
            rows.append(Row(f"lsdm-sampling/{name}/bf16", label, "1000 ancestral steps", skipped=NO_BF16))
        if guided:
            work = f"{label if bf16 else work}, one classifier of all features"
            rows.append(compared(
                "lsdm-sampling/guided/shared", work, times, "slow",
                ours="shared", peer_name="1000 ancestral steps", times_faster=True, goal=goal, note=note, **scales,
            ))  # fmt: skip
    return rows


@rows_of(
    "lsdm-monai",
    full={"channels": (64, 128, 192), "hidden": 128, "latent": 32, "batch": 2, "steps": 8},
    quick={"channels": (64, 128, 192), "hidden": 128, "latent": 32, "batch": 1, "steps": 5},
    tiny={"channels": (8, 16), "hidden": 8, "latent": 8, "batch": 1, "steps": 2},
    gpu={"channels": (192, 384, 576, 768), "hidden": 128, "latent": 128, "batch": 8, "steps": 20},
)
def lsdm_monai(run: Run, *, channels: Sequence[int], hidden: int, latent: int, batch: int, steps: int) -> list[Row]:
    """The same latents by MONAI's inferer, network and scheduler in their default form; equal weights."""
    from monai.inferers import DiffusionInferer
    from monai.networks.schedulers import DDPMScheduler

    from monai_synth.diffusion import make_sampler
    from monai_synth.inference import initial_noise, make_generators, sample

    ours, theirs = equal_spade_networks(channels, hidden, run.device)
    seg, cond, noise = spade_inputs(latent, batch, run.device)
    scheduler = DDPMScheduler(num_train_timesteps=1000, schedule="scaled_linear_beta", clip_sample=False)
    scheduler.set_timesteps(steps)
    inferer = DiffusionInferer(scheduler)

    @torch.no_grad()
    def own() -> None:
        modulations = ours.modulations(seg, (latent, latent))
        x_T = initial_noise(noise.shape[1:], make_generators(range(batch)), run.device)
        sample(
            lambda x, t: ours(torch.cat([x, cond], 1), t, modulations=modulations),
            x_T, make_sampler("dpm++", SCHEDULE, CALLS),
        )  # fmt: skip

    def peer() -> None:
        inferer.sample(noise, theirs, scheduler, conditioning=cond, mode="concat", verbose=False, seg=seg)

    times = run.time({"ours": own, "MONAI": peer}, rounds=max(1, min(run.rounds, 3)))
    return [compared(
        "lsdm-monai", f"LSDM latents of {latent} x {latent}, batch {batch}, float32", times, "MONAI",
        peer_name="MONAI LatentDiffusionInferer's sampling, DDPM, 1000 steps",
        peer_scale=TEXT_STEPS / steps, times_faster=True,
        note=f"both start and end at latents; {steps} of MONAI's steps timed and scaled; same weights; SPADE on the "
        "way up only, as there",
    )]  # fmt: skip
