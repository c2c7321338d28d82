# SPDX-License-Identifier: Apache-2.0
"""Steps of the optimiser: in which precision they are computed, of how many batches, and what follows each of them.

A trainer's iteration is one batch. Where gradients are accumulated the optimiser steps after every so many of them, and
so do the moving average and a learning rate that changes by steps.
"""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.handlers import LrScheduleHandler
from monai.inferers import SimpleInferer
from torch import Tensor, nn

STEP = Events.ITERATION_COMPLETED(event_filter=lambda engine, _: made_step(engine))


def made_step(engine: Engine) -> bool:
    """Whether the optimiser steps in this iteration: after every ``accumulation_steps``, and at an epoch's end.

    As in MONAI's ``SupervisedTrainer``, which accumulates.
    """
    every, length = getattr(engine, "accumulation_steps", 1), engine.state.epoch_length
    number = (engine.state.iteration - 1) % length + 1  # within the epoch, from 1
    return number % every == 0 or number == length


def steps_done(engine: Engine) -> int:
    """Steps of the optimiser in the epochs that are done, between two epochs."""
    every, length = getattr(engine, "accumulation_steps", 1), engine.state.epoch_length
    return engine.state.epoch * -(-length // every)


class EMA(EMAHandler):
    """Ignite's exponential moving average, whose warm-up goes on where a resumed training left it.

    Thesis Eq 4.1 with ``gamma = 1 - momentum``; save ``ema_model`` with the training. It reads the weights after each
    step of the optimiser and runs no network.

    Args:
        model: the network; the average leaves a wrapper for distributed training aside.
        decay: gamma.
        warmup_iters: steps in which the momentum falls from one half to ``1 - decay``, so that the average does not
            remember the fresh network.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup_iters: int) -> None:
        super().__init__(model, momentum=1.0 - decay, momentum_warmup=0.5, warmup_iters=warmup_iters)

    def attach(self, engine: Engine) -> None:  # type: ignore[override]
        super().attach(engine, event=STEP)
        engine.add_event_handler(Events.STARTED, self._go_on)

    def _go_on(self, engine: Engine) -> None:
        self.momentum_scheduler.event_index = steps_done(engine)


class LrSchedule(LrScheduleHandler):
    """MONAI's handler of a learning rate that changes with each step of the optimiser."""

    def __init__(self, lr_scheduler: Any) -> None:
        super().__init__(lr_scheduler, print_lr=False, epoch_level=False)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(STEP, self)


class MixedPrecisionInferer(SimpleInferer):
    """Runs the network under autocast in bfloat16, and hands what it gives to the loss in float32.

    bfloat16 has the range of float32, so that no gradient has to be scaled. float16 has not, and is left to MONAI's
    trainer, which scales.

    Args:
        precision: see :func:`monai_synth.precision.training_precision`.
        device: where to train.
    """

    def __init__(self, precision: str, device: str | torch.device) -> None:
        super().__init__()
        self.enabled, self.device_type = precision == "bfloat16", torch.device(device).type

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return super().__call__(inputs, network, *args, **kwargs)
        with torch.autocast(self.device_type, dtype=torch.bfloat16):
            output = super().__call__(inputs, network, *args, **kwargs)
        return _widened(output)


def _widened(output: Any) -> Any:
    """A tensor, or each of a named tuple, in float32."""
    if isinstance(output, tuple):
        return type(output)(*map(_widened, output))
    return output.float() if isinstance(output, Tensor) and output.is_floating_point() else output
