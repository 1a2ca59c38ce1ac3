"""Whitening of contexts: training on contexts that vary alike in all directions, for a model that takes them raw.

A text encoder's tokens often lie near a few directions: what tells a boat from a car may be a thousandth of their
variance. Keys and values that read it must grow large, and so it is learned last. Latents are whitened for the same
reason, by the autoencoder (`autoencoder/model.py`).
"""

import copy
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn

from ldm.unet import UNet

FLOOR = 0.005
"""Variance, as a share of its mean over directions, that is added to each: what is narrower yet may be rounding."""


class Whitening(nn.Module):
    """Contexts [..., D] -> (context - mean) (covariance + floor)^(-1/2), [..., D] in float32."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        """mean [D], matrix [D,D], symmetric and invertible."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)

    @classmethod
    def of(cls, tokens: Tensor) -> Self:
        """That of tokens [N,D], which must not all be equal."""
        tokens = tokens.double()
        mean = tokens.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov(tokens.T, correction=0))
        matrix = directions * (variances + FLOOR * variances.mean()).rsqrt() @ directions.T
        return cls(mean.float(), matrix.float())

    def forward(self, context: Tensor) -> Tensor:
        with torch.autocast(context.device.type, enabled=False):
            return (context.float() - self.mean) @ self.matrix

    @torch.no_grad()
    def folded(self, unet: UNet) -> UNet:
        """A U-Net that does with raw contexts what this one does with whitened ones.

        The mean adds the same to a query's score with every key, which the softmax takes away, and the same to
        every value, so to their weighted mean: the bias of the layer after it gives that back.
        """
        unet = copy.deepcopy(unet)
        for keys, values, output in _weights(unet):
            for weight in (keys, values):
                weight.copy_(weight @ self.matrix)
            output.bias.sub_(output.weight @ (values @ self.mean))
        return unet

    @torch.no_grad()
    def unfolded(self, unet: UNet) -> UNet:
        """A U-Net that does with whitened contexts what this one does with raw ones: the inverse of `folded`."""
        unet = copy.deepcopy(unet)
        inverse = torch.linalg.inv(self.matrix.double()).float()
        for keys, values, output in _weights(unet):
            output.bias.add_(output.weight @ (values @ self.mean))
            for weight in (keys, values):
                weight.copy_(weight @ inverse)
        return unet


def _weights(unet: UNet) -> Iterator[tuple[Tensor, Tensor, nn.Linear]]:
    """Weights of the keys and of the values [C,D], and the layer after them, of each attention to the context."""
    for attention in unet.cross_attentions():
        output = attention.to_out[0]
        assert isinstance(output, nn.Linear)
        yield attention.to_k.weight, attention.to_v.weight, output
