"""The exponential moving average of a network's weights, which is what a training run writes."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """`module` is a copy of a network, whose weights follow that network's: a share `decay` of them stays at an update.

    The share grows to `decay` as updates are counted, so that the first weights, which are random, are soon forgotten.
    The count stays in the host's memory wherever `module` is, for a host that reads it elsewhere has to wait; torch's
    own `AveragedModel` does so at every update.
    """

    n_averaged: Tensor

    def __init__(self, network: nn.Module, decay: float, device: torch.device) -> None:
        super().__init__()
        self.decay = decay
        self.module = deepcopy(network).to(device)
        self.register_buffer("n_averaged", torch.tensor(0))

    @torch.no_grad()
    def update_parameters(self, network: nn.Module) -> None:
        """Go after the network's weights; its buffers are copied."""
        count = int(self.n_averaged)
        share = min(self.decay, (1 + count) / (10 + count)) if count else 0.0
        torch._foreach_lerp_(list(self.module.parameters()), list(network.parameters()), 1 - share)
        for own, theirs in zip(self.module.buffers(), network.buffers(), strict=True):
            own.copy_(theirs)
        self.n_averaged += 1
