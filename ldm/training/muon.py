"""Muon: momentum whose matrices are made orthogonal before each step.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the scale of Liu et al. 2025 (arXiv 2502.16982,
equation 4), so that learning rate and weight decay mean what they mean to AdamW.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ITERATIONS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic: steep at zero, so that few iterations bring all singular values to between about 0.7 and 1.2."""
MOMENTUM = 0.95
RMS = 0.2
"""Root mean square of a step at learning rate 1, as AdamW's mostly is."""


def matrices(model: nn.Module) -> list[Tensor]:
    """What Muon is meant for: trainable weights of linear and convolution layers. Embeddings and norms are not."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return [layer.weight for layer in layers if layer.weight.requires_grad]


def orthogonalized(matrix: Tensor) -> Tensor:
    """U V^T, nearly, of matrix = U S V^T [N,M], by Newton-Schulz iterations. Returns float32 [N,M].

    Singular values below about a hundredth of the matrix's norm are not brought up all the way; zeros stay zeros.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).float()
    x = x / x.norm().clamp(min=1e-7)
    # Each iteration is X <- P X with P a polynomial of X X^T. All P and X X^T commute, so that the iterations can be
    # done on the small square matrices, and on X but once.
    gram, product = x @ x.T, None
    for _ in range(ITERATIONS):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial if product is None else polynomial @ product
        gram = polynomial @ gram @ polynomial
    assert product is not None
    turned: Tensor = product @ x
    return turned.T if tall else turned


class Muon(Optimizer):
    """Steps along the orthogonalized Nesterov momentum of parameters of two or more dimensions.

    A parameter is a matrix of one row for each of its first dimension. Where `found_inf`, a tensor that
    `torch.amp.GradScaler` or a loop may set, is 1, the gradient is not finite and a step changes nothing.

    Raises:
        ValueError: a parameter of one dimension.
    """

    _step_supports_amp_scaling = True  # so that GradScaler sets `found_inf`, and the host need not wait to read it
    found_inf: Tensor | None = None

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim < 2:
                raise ValueError(f"a parameter of shape {list(parameter.shape)} is no matrix: give it to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken: float | Tensor = 1.0 if self.found_inf is None else 1 - self.found_inf
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self._update(parameter, taken)
                    rate = group["lr"] * taken
                    parameter.mul_(1 - rate * group["weight_decay"]).sub_(update * rate)
        return loss

    def _update(self, parameter: Tensor, taken: float | Tensor) -> Tensor:
        """The step at learning rate 1, like the parameter; `taken` is 0 where it will not be taken, else 1."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if self.found_inf is not None:
            gradient = gradient.nan_to_num(0, 0, 0)  # of a step that is not taken: else 0 times it were not 0
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"].lerp_(gradient, (1 - MOMENTUM) * taken)
        matrix = gradient.lerp(momentum, MOMENTUM).flatten(1)
        return orthogonalized(matrix).reshape(parameter.shape) * (RMS * math.sqrt(max(matrix.shape)))
