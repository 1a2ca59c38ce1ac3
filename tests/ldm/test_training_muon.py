import pytest
import torch
from torch import Tensor, nn

from ldm.training.muon import MOMENTUM, RMS, Muon, matrices, orthogonalized


def random_matrix(rows: int, columns: int, smallest: float = 0.1) -> Tensor:
    """With singular values between `smallest` and 1."""
    torch.manual_seed(rows)
    u, _, vh = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    return u * torch.linspace(1, smallest, min(rows, columns)) @ vh


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (16, 90), (90, 16)])
def test_singular_values_come_near_one_and_vectors_stay(rows: int, columns: int) -> None:
    matrix = random_matrix(rows, columns)
    turned = orthogonalized(matrix).float()
    values = torch.linalg.svdvals(turned)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ turned @ vh.T  # diagonal if the singular vectors are the same
    assert (core - core.diag().diag()).abs().max() < 0.02


def test_scale_does_not_matter_and_zeros_stay() -> None:
    matrix = random_matrix(8, 20)
    torch.testing.assert_close(orthogonalized(matrix), orthogonalized(1e-3 * matrix), atol=0.01, rtol=0)
    assert orthogonalized(torch.zeros(3, 4)).abs().max() == 0


def test_a_step_is_the_turned_nesterov_momentum_and_decay() -> None:
    weight = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
    momentum, expected = torch.zeros(4, 6), torch.ones(4, 6)
    for seed in range(3):
        torch.manual_seed(seed)
        weight.grad = torch.randn(4, 6)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * weight.grad
        direction = orthogonalized((1 - MOMENTUM) * weight.grad + MOMENTUM * momentum).float()
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * RMS * 6**0.5 * direction
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, atol=2e-3, rtol=0)
    assert optimizer.step(lambda: 3.0) == 3.0


def test_a_step_has_the_size_of_adamw_s() -> None:
    """The root mean square of U V^T [n,n] is 1 / sqrt(n)."""
    weight = nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1.0, weight_decay=0.0).step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(RMS, rel=0.25)


def test_a_convolution_is_one_row_per_output_in_any_memory_layout() -> None:
    gradient = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    steps = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(torch.zeros(5, 3, 3, 3).to(memory_format=layout))
        weight.grad = gradient.to(memory_format=layout)
        Muon([weight], lr=1.0, weight_decay=0.0).step()
        steps.append(weight.detach())
    assert torch.equal(steps[0], steps[1])
    values = torch.linalg.svdvals(steps[0].flatten(1)) / (RMS * 27**0.5)
    assert 0.6 < values.min() < values.max() < 1.3


def test_what_has_no_gradient_stays() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(weight.detach(), torch.ones(2, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_to_be_taken_changes_nothing(bad: float) -> None:
    """And where it is to be taken, saying so changes nothing either."""
    gradients = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    made = []
    for told in (False, True):
        weight = nn.Parameter(torch.ones(4, 6))
        optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
        for gradient in gradients:
            weight.grad = gradient.clone()
            if told:
                optimizer.found_inf = torch.zeros(())
            optimizer.step()
            if told:
                before, momentum = weight.detach().clone(), optimizer.state[weight]["momentum"].clone()
                weight.grad[1, 2] = bad
                optimizer.found_inf = torch.ones(())
                optimizer.step()
                assert torch.equal(weight.detach(), before)
                assert torch.equal(optimizer.state[weight]["momentum"], momentum)
        made.append(weight.detach())
    torch.testing.assert_close(made[1], made[0])


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[3\] is no matrix: give it to AdamW"):
        Muon([nn.Parameter(torch.ones(3))], lr=0.1, weight_decay=0.0)


def test_matrices_are_the_trainable_weights_of_linear_and_convolution_layers() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Embedding(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    network[4].requires_grad_(False)
    assert [id(m) for m in matrices(network)] == [id(network[0].weight), id(network[3].weight)]
