"""From a network to a denoiser: what samplers call, whatever the network predicts and in whatever precision it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm import prediction as predictions
from ldm.layers import as_many
from ldm.prediction import Prediction
from ldm.schedule import ForwardProcess
from ldm.transformer import Context, Reading

Network = Callable[[Tensor, Tensor, Any], Tensor]
"""(x_t [B, ...], t [B], context [B, L, D]) -> output, like x_t. If it has a method `read`, it takes `read(context)` in
the context's place too, and that of several contexts for each of x_t (`ldm.unet.UNet`)."""


@dataclass(frozen=True)
class Estimate:
    """What a denoiser knows of the clean signal: `x0` like x_t, in float32 or wider, and the output `v` [B, ...] of a
    learned variance, where the network has one (Nichol and Dhariwal 2021, eq. 15; it is no v-prediction)."""

    x0: Tensor
    v: Tensor | None = None


Denoiser = Callable[[Tensor, Tensor], Estimate]
"""(x_t [B, ...], t [B] or 0-d) -> Estimate."""


@dataclass(frozen=True)
class ConditionalDenoiser:
    """Estimates x0 from x_t, its time and its context; made by `make_denoiser`.

    Raises:
        ValueError: unknown prediction, or one of eps or the score under zero terminal SNR.
    """

    network: Network
    schedule: ForwardProcess
    prediction: Prediction

    def __post_init__(self) -> None:
        predictions.check(self.prediction, self.schedule.zero_terminal_snr)

    def read(self, context: Tensor) -> Context:
        """What stands for context [B, L, D] in any number of calls, as long as the network stays as it is."""
        like = _first_parameter(self.network)
        return read(self.network, context if like is None else context.to(like))

    def __call__(self, x_t: Tensor, t: Tensor, context: Context) -> Estimate:
        """Run the network, in its own dtype and on its own device.

        x_t is [B, C, ...], t [B] or 0-d, context [B, L, D], or what `read` made of it. Of k contexts for each of x_t,
        [kB, L, D], all the first ones before all the second, the estimate is [kB, C, ...]; a network that reads makes
        what does not depend on them but once. The estimate is float32, or x_t's wider dtype, on x_t's device. Where
        the network has twice the channels of x_t, the second half is a learned variance and passed on as `v`.

        Raises:
            ValueError: t out of the schedule's range, or shapes of t, context or output that do not fit x_t's.
        """
        alpha, sigma = self.schedule.coefficients(t, like=x_t)  # refuses a wrong t before the network runs
        few = len(x_t)
        if len(context) == 0 or len(context) % few:
            raise ValueError(f"context has a batch of {len(context)}, but x_t one of {few}: give one each, or several")
        alpha, sigma, x_t, t = (as_many(each, context) for each in (alpha, sigma, x_t, t.expand(few)))
        shown = slice(few if isinstance(context, Reading) else None)
        like = _first_parameter(self.network)
        if like is None:
            like = x_t
        if isinstance(context, Tensor):
            context = context.to(like)
        if like.device.type == "mps":
            t = t.float()  # it has no float64
        output = self.network(x_t[shown].to(like), t[shown].to(like.device), context).to(x_t.device)
        v = None
        if output.shape == (len(x_t), 2 * x_t.shape[1], *x_t.shape[2:]):
            output, v = output.chunk(2, dim=1)
            v = v.to(alpha.dtype)
        if output.shape != x_t.shape:
            raise ValueError(
                f"the network's output is {tuple(output.shape)}, which does not fit x_t {tuple(x_t.shape)}"
            )
        x0 = predictions.to_x0(self.prediction, output.to(alpha.dtype), x_t.to(alpha.dtype), alpha, sigma)
        return Estimate(x0, v)

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of x0 that the network's `output` at x_t stands for; float32 or x_t's wider dtype.

        Raises:
            ValueError: t out of the schedule's range.
        """
        alpha, sigma = self.schedule.coefficients(t, like=x_t)
        return predictions.to_x0(self.prediction, output.to(alpha.dtype), x_t.to(alpha.dtype), alpha, sigma)

    def to_output(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output that the estimate `x0` at x_t stands for; float32 or x_t's wider dtype.

        Raises:
            ValueError: t out of the schedule's range, or clean for a network that does not predict x0.
        """
        alpha, sigma = self.schedule.coefficients(t, like=x_t)
        return predictions.from_x0(self.prediction, x0.to(alpha.dtype), x_t.to(alpha.dtype), alpha, sigma)


def make_denoiser(network: Network, schedule: ForwardProcess, prediction: Prediction) -> ConditionalDenoiser:
    """The denoiser (x_t, t, context) -> Estimate of a network that was trained on `schedule` to predict `prediction`.

    Raises:
        ValueError: unknown prediction, or one of eps or the score under zero terminal SNR.
    """
    return ConditionalDenoiser(network, schedule, prediction)


def read(reader: object, context: Tensor) -> Context:
    """What a network or a denoiser makes of context [B, L, D] by itself, once for many calls; if it can `read`, that
    is, else the context as it is.
    """
    method = getattr(reader, "read", None)
    reading: Context = context if method is None else method(context)
    return reading


def in_turn(denoisers: Sequence[Denoiser], sizes: list[int]) -> Denoiser:
    """One denoiser for a big batch from one for each part of it, of these sizes, so that memory stays bounded while
    a sampler, and so its noise, sees all pictures at once.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Estimate:
        parts = zip(denoisers, torch.split(x_t, sizes), torch.split(t.expand(len(x_t)), sizes), strict=True)
        estimates = [one(some_x, some_t) for one, some_x, some_t in parts]
        variances = [estimate.v for estimate in estimates if estimate.v is not None]
        return Estimate(torch.cat([estimate.x0 for estimate in estimates]), torch.cat(variances) if variances else None)

    return denoise


def _first_parameter(network: Network) -> torch.Tensor | None:
    return next(network.parameters(), None) if isinstance(network, nn.Module) else None
