# SPDX-License-Identifier: Apache-2.0
"""In which precision networks compute, and what a device has units for.

Sampling converts the denoiser alone: its weights are bfloat16 and channels last, while what goes in and comes out of
it, and with that schedulers, noise, guidance and decoder, stays float32. Training keeps float32 weights and lets torch
choose by operation (autocast).
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from monai_synth.errors import UserError

logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16", "auto")
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes

# Where torch's GroupNorm of channels-last data on a CPU has less than this many positions it goes through them one by
# one, and vectors shorter than this, the channels of a group, are then slow: 9 to 330 times, measured. Elsewhere
# channels last is the faster layout.
_FEW_POSITIONS = 1024
_SHORT_VECTOR = 16


def has_bfloat16_units(device: str | torch.device) -> bool:
    """Whether the device multiplies matrices of bfloat16 in units of its own: GPUs since Ampere, CPUs with AMX."""
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_has_amx_bfloat16()


@functools.cache
def _cpu_has_amx_bfloat16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # of newer torch
    if capabilities is not None:
        return bool(capabilities().get("amx_bf16", False))
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


# Sampling


def sampling_precision(precision: str, device: str | torch.device) -> str:
    """Give "float32" or "bfloat16".

    Args:
        precision: one of them, or "auto", which is bfloat16 where the device has units for it.
        device: where to sample.

    Raises:
        UserError: another word.
    """
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; allowed are {', '.join(PRECISIONS)}, give --precision auto, say")
    if precision == "auto":
        return "bfloat16" if has_bfloat16_units(device) else "float32"
    return precision


def for_sampling(
    network: nn.Module, *, precision: str, device: str | torch.device, compile: bool = False
) -> tuple[nn.Module, str]:
    """A denoiser that is ready to be sampled from, and what it computes in.

    It takes and gives float32 whatever it computes in. Timesteps are not rounded, and gradients with respect to the
    input are float32.

    Args:
        network: the denoiser, with float32 weights; it is changed.
        precision: see :func:`sampling_precision`.
        device: where to sample.
        compile: let ``torch.compile`` write its kernels; the first batch takes a minute or more.

    Returns:
        The network, and "float32" or "bfloat16", with " compiled" behind where it is, for the provenance.

    Raises:
        UserError: see :func:`sampling_precision`; or ``compile`` is neither true nor false.
    """
    used = sampling_precision(precision, device)
    check_compile(compile)
    network = network.to(device)
    if used == "bfloat16":
        if not has_bfloat16_units(device):
            logger.warning(
                f"{device} has no units for bfloat16, which can be slower than float32; see --precision auto"
            )
        _to_bfloat16(network, device)
    if compile:
        network.compile()
        used += " compiled"
    return network, used


def check_compile(compile: bool) -> bool:
    """The switch itself.

    Raises:
        UserError: it is neither true nor false.
    """
    if not isinstance(compile, bool):
        raise UserError(f"compile is {compile!r}; allowed are True and False")
    return compile


def _to_bfloat16(network: nn.Module, device: str | torch.device) -> None:
    network.to(torch.bfloat16)
    for weight in network.parameters():
        if weight.ndim in _LAYOUTS:
            weight.data = weight.data.contiguous(memory_format=_LAYOUTS[weight.ndim])
    if torch.device(device).type == "cpu":
        for layer in network.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.register_forward_pre_hook(_shun_slow_layout)
    network.register_forward_pre_hook(_round_inputs, with_kwargs=True)
    network.register_forward_hook(_widen_output)


def _round_inputs(network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return tuple(map(_rounded, args)), {name: _rounded(value) for name, value in kwargs.items()}


def _rounded(value: Any) -> Any:
    """Images and maps (B, C, *S) in bfloat16 and channels last; timesteps and everything else as they are."""
    if not isinstance(value, Tensor) or value.ndim not in _LAYOUTS or not value.is_floating_point():
        return value
    return value.to(torch.bfloat16).contiguous(memory_format=_LAYOUTS[value.ndim])


def _widen_output(network: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.float().contiguous()


def _shun_slow_layout(norm: nn.GroupNorm, args: tuple[Tensor]) -> tuple[Tensor] | None:
    (x,) = args
    is_slow = norm.num_channels // norm.num_groups < _SHORT_VECTOR and x[0, 0].numel() < _FEW_POSITIONS
    return (x.contiguous(),) if is_slow else None


# Training


def training_precision(amp: bool | str, device: str | torch.device, *, float16: bool = True) -> str:
    """What autocast computes in: "float32" (without it), "bfloat16" or "float16".

    Args:
        amp: False is float32; True is mixed precision on any device: bfloat16, or float16 on GPUs that have no units
            for it; "auto" is bfloat16 where the device has units for it, else float32.
        device: where to train.
        float16: whether the trainer scales gradients, without which float16 loses them; else such GPUs get float32.

    Raises:
        UserError: another value.
    """
    if amp != "auto" and not isinstance(amp, bool):
        raise UserError(f"amp is {amp!r}; allowed are True, False and 'auto'")
    if amp is False:
        return "float32"
    has_units = has_bfloat16_units(device)
    if amp == "auto" and not has_units:
        return "float32"
    if has_units or torch.device(device).type == "cpu":
        return "bfloat16"
    return "float16" if float16 and torch.device(device).type == "cuda" else "float32"
