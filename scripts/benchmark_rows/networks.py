# SPDX-License-Identifier: Apache-2.0
"""U-Nets of one shape from this project and from its peers, each built and called as its own library would.

Ours without scale and shift, MONAI's ``DiffusionModelUNet`` and diffusers' ``UNet2DModel`` have equal parameters and do
equal work. That of denoising-diffusion-pytorch is another architecture; its parameters are told beside its figures.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

PEERS = ("diffusers", "MONAI", "denoising-diffusion-pytorch")
INSTALL = "pip install denoising-diffusion-pytorch"


def has_bf16(device: str) -> bool:
    """Whether a device has instructions for bfloat16; without them it is emulated, and slow.

    The package's "auto" asks for more of a CPU, AMX; a row may as well show what AVX512's instructions bring.
    """
    if device != "cpu":
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16"))


NO_BF16 = "this processor has no instructions for bfloat16 (AMX or AVX512)"


def has_lucidrains() -> bool:
    """Whether denoising-diffusion-pytorch is installed."""
    return importlib.util.find_spec("denoising_diffusion_pytorch") is not None


def parameters_of(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in network.parameters())


def unet(
    library: str, *, base: int, mult: Sequence[int], size: int, attention: Sequence[int], in_channels: int,
    out_channels: int, res_blocks: int = 2, groups: int = 32, num_heads: int = 4, checkpoint: bool = False,
) -> nn.Module:  # fmt: skip
    """A U-Net of one shape.

    Args:
        library: "ours", "MONAI" (its default form), "diffusers" or "denoising-diffusion-pytorch".
        base: channels of the first level.
        mult: factor for each level.
        size: side of the input.
        attention: sizes of the map at which there is attention.
        in_channels: of the input.
        out_channels: of the prediction.
        res_blocks: residual blocks of each level.
        groups: of the normalisations.
        num_heads: attention heads; denoising-diffusion-pytorch keeps its own heads and places.
        checkpoint: ours with per-block checkpointing.
    """
    channels = [base * m for m in mult]
    levels = [size // 2**i in attention for i in range(len(mult))]
    if library == "ours":
        from monai_synth.networks import SPADEUNet

        return SPADEUNet(
            2, in_channels, out_channels, 0, channels, num_res_blocks=res_blocks, attention_levels=levels,
            num_head_channels=[c // num_heads for c in channels], norm_num_groups=groups, norm_eps=1e-5, spade_in=(),
            time_scale_shift=False, use_checkpoint=checkpoint,
        )  # fmt: skip
    if library == "MONAI":
        from monai.networks.nets import DiffusionModelUNet

        return DiffusionModelUNet(
            2, in_channels, out_channels, res_blocks, channels, levels, norm_num_groups=groups, norm_eps=1e-5,
            num_head_channels=[c // num_heads for c in channels],
        )  # fmt: skip
    if library == "diffusers":
        from diffusers import UNet2DModel

        down = ["AttnDownBlock2D" if level else "DownBlock2D" for level in levels]
        return UNet2DModel(
            sample_size=size, in_channels=in_channels, out_channels=out_channels, layers_per_block=res_blocks,
            block_out_channels=channels, down_block_types=down, norm_num_groups=groups, norm_eps=1e-5,
            up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
            attention_head_dim=channels[-1] // num_heads,
        )  # fmt: skip
    from denoising_diffusion_pytorch import Unet

    return Unet(base, out_dim=out_channels, dim_mults=tuple(mult), channels=in_channels)


def call(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """A network's prediction, whichever library it is of."""
    out = network(x, t)
    return out if isinstance(out, Tensor) else out.sample


def randomize(network: nn.Module, std: float = 0.02) -> nn.Module:
    """Normal weights everywhere, so that no layer that starts at zero hides a difference."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)
    return network


def autocast(device: str, enabled: bool) -> contextlib.AbstractContextManager:
    """bfloat16 autocast, or nothing."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if enabled else contextlib.nullcontext()


def training_step(
    network: nn.Module, x: Tensor, *, fused: bool, bf16: bool = False, device: str = "cpu"
) -> Callable[[], None]:
    """A step that predicts noise: forward, squared error, backward, AdamW.

    Args:
        network: any of :func:`unet`.
        x: noisy batch; the target is zeros.
        fused: torch's fused optimizer, as the configs of our bundles ask for; else its default.
        bf16: forward pass under autocast.
        device: where both are.
    """
    options = {"fused": True} if fused else {}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, **options)
    t = torch.arange(len(x), device=x.device) * 100 % 1000

    def step() -> None:
        with autocast(device, bf16):
            prediction = call(network, x, t)
        prediction.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling_call(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """One call of a denoiser without gradients."""
    t = torch.full((len(x),), 500, device=x.device)

    @torch.no_grad()
    def predict() -> Tensor:
        return call(network, x, t)

    return predict


def in_bf16(network: nn.Module, device: str) -> nn.Module:
    """A copy of a network as the package samples from it in bfloat16; it takes and gives float32."""
    from monai_synth.precision import for_sampling

    return for_sampling(copy.deepcopy(network).eval(), precision="bfloat16", device=device)[0]
