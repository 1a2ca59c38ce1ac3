import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ldm import posterior, prediction
from ldm.denoiser import Estimate, make_denoiser
from ldm.guidance import classifier_free
from ldm.loss import bound_term, diffusion_loss, distillation_loss, eps_weight, hybrid_loss, variational_bound
from ldm.schedule import VPSDE, NoiseSchedule

SCHEDULE = NoiseSchedule("scaled_linear")
COSINE = NoiseSchedule("cosine")
ZERO_SNR = NoiseSchedule("scaled_linear", zero_terminal_snr=True)
T = torch.tensor([0, 200, 600, 999])
CONTEXT = torch.zeros(4, 1, 1)


@pytest.fixture
def data():
    """x0 and eps."""
    return torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def zero_network(x_t, t, context):
    return torch.zeros_like(x_t)


def mean_square(x):
    return x.square().mean((1, 2, 3))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loss_is_the_mean_squared_error_per_sample(prediction, data):
    x0, eps = data
    alpha, sigma = (value.float().reshape(4, 1, 1, 1) for value in SCHEDULE.at(T))
    target = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction]
    loss = diffusion_loss(zero_network, x0, eps, T, CONTEXT, SCHEDULE, prediction)
    assert loss.shape == (4,)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mean_square(target), rtol=1e-6, atol=1e-7)


def test_the_network_sees_the_noisy_sample_its_time_and_its_context(data):
    x0, eps = data
    seen = []

    def network(*arguments):
        seen.extend(arguments)
        return eps

    loss = diffusion_loss(network, x0, eps, T, CONTEXT, SCHEDULE, "eps")
    assert (loss == 0).all()
    x_t, t, context = seen
    assert torch.equal(x_t, SCHEDULE.add_noise(x0, eps, T))
    assert t is T
    assert context is CONTEXT


def test_half_precision_inputs_give_a_float32_loss(data):
    x0, eps = data.bfloat16()
    loss = diffusion_loss(zero_network, x0, eps, T, CONTEXT, SCHEDULE, "v")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, diffusion_loss(zero_network, x0.float(), eps.float(), T, CONTEXT, SCHEDULE, "v"), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr_weights_are_those_of_the_paper_and_of_diffusers(prediction, gamma, data):
    x0, eps = data
    reference = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    snr = compute_snr(reference, T)
    torch.testing.assert_close(SCHEDULE.snr(T).float(), snr, rtol=1e-4, atol=0)
    clamped = snr.clamp(max=gamma)
    weight = {"eps": clamped / snr, "x0": clamped, "v": clamped / (snr + 1)}[prediction]
    plain = diffusion_loss(zero_network, x0, eps, T, CONTEXT, SCHEDULE, prediction)
    weighted = diffusion_loss(zero_network, x0, eps, T, CONTEXT, SCHEDULE, prediction, min_snr_gamma=gamma)
    assert weighted.dtype == torch.float32
    torch.testing.assert_close(weighted, weight * plain, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_weights_are_finite_where_no_signal_is_left(prediction, data):
    x0, eps = data
    loss = diffusion_loss(zero_network, x0, eps, T, CONTEXT, ZERO_SNR, prediction, min_snr_gamma=5.0)
    assert loss.isfinite().all()
    assert loss[-1] == 0


def test_gradients_reach_the_network(data):
    x0, eps = data
    gain = torch.zeros(1, requires_grad=True)
    diffusion_loss(lambda x_t, t, context: gain * x_t, x0, eps, T, CONTEXT, SCHEDULE, "v", 5.0).mean().backward()
    assert gain.grad is not None
    assert gain.grad != 0


def test_eps_is_refused_under_zero_terminal_snr(data):
    with pytest.raises(ValueError, match="use v with zero terminal SNR"):
        diffusion_loss(zero_network, *data, T, CONTEXT, ZERO_SNR, "eps")


def test_an_unknown_prediction_is_refused(data):
    with pytest.raises(ValueError, match="prediction is 'epsilon'"):
        diffusion_loss(zero_network, *data, T, CONTEXT, SCHEDULE, "epsilon")


@pytest.mark.parametrize("gamma", [0.0, -1.0])
def test_a_gamma_that_is_not_positive_is_refused(gamma, data):
    with pytest.raises(ValueError, match="min_snr_gamma is"):
        diffusion_loss(zero_network, *data, T, CONTEXT, SCHEDULE, "v", min_snr_gamma=gamma)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_student_is_held_to_what_its_teacher_makes_of_the_noisy_sample(prediction, data):
    x0, eps = data
    alpha, sigma = (value.float().reshape(4, 1, 1, 1) for value in SCHEDULE.at(T))
    x_t, taught = SCHEDULE.add_noise(x0, eps, T), x0.flip(0) / 2
    target = {"eps": (x_t - alpha * taught) / sigma, "x0": taught, "v": (alpha * x_t - taught) / sigma}[prediction]
    seen = []

    def teacher(x_t, t):
        seen.append((x_t, t, torch.is_grad_enabled()))
        return Estimate(taught)

    loss = distillation_loss(zero_network, teacher, x0, eps, T, CONTEXT, SCHEDULE, prediction)
    torch.testing.assert_close(loss, mean_square(target), rtol=1e-4, atol=1e-6)
    assert torch.equal(seen[0][0], x_t)
    assert (seen[0][1] is T, seen[0][2]) == (True, False)


def test_a_student_of_a_guided_teacher_needs_no_guidance(data):
    """v is linear in x0, so that what guidance makes of two outputs is an output."""
    x0, eps = data
    cond, uncond = torch.full((4, 1, 1), 2.0), torch.full((4, 1, 1), 0.5)

    def network(x_t, t, context):
        return context[..., None].tanh() * x_t

    teacher = classifier_free(make_denoiser(network, ZERO_SNR, "v"), cond, uncond, scale=3.0)

    def student(x_t, t, context):
        return (3 * math.tanh(2.0) - 2 * math.tanh(0.5)) * x_t

    loss = distillation_loss(student, teacher, x0, eps, T, cond, ZERO_SNR, "v")
    torch.testing.assert_close(loss, torch.zeros(4), rtol=0, atol=1e-6)
    untaught = distillation_loss(network, teacher, x0, eps, T, cond, ZERO_SNR, "v")
    gap = 2 * (math.tanh(2.0) - math.tanh(0.5))
    torch.testing.assert_close(untaught, gap**2 * mean_square(ZERO_SNR.add_noise(x0, eps, T)), rtol=1e-4, atol=0)


def test_distillation_refuses_what_the_squared_error_refuses(data):
    def teacher(x_t, t):
        return Estimate(x_t)

    with pytest.raises(ValueError, match="use v with zero terminal SNR"):
        distillation_loss(zero_network, teacher, *data, T, CONTEXT, ZERO_SNR, "eps")
    with pytest.raises(ValueError, match=r"learned variance, .*: distil a network with a fixed variance"):
        distillation_loss(lambda x, t, c: torch.cat([x, x], 1), teacher, *data, T, CONTEXT, SCHEDULE, "eps")


SIX = torch.tensor([0, 1, 2, 50, 500, 999])


@pytest.fixture
def pictures():
    """x0 on the 256 levels, both ends among them, and eps: float64 [6, 3, 4, 4]."""
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(0, 256, (6, 3, 4, 4), generator=generator).double() / 127.5 - 1
    x0[:, 0, 0] = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    return x0, 0.5 * torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64)


def network(x_t, t, context):
    """A smooth function of x_t."""
    return 0.8 * x_t.sin()


def learned_network(x_t, t, context):
    """The same, and a v that leaves [-1, 1] here and there."""
    return torch.cat([network(x_t, t, context), 1.2 * (3 * x_t + t.reshape(-1, 1, 1, 1)).cos()], 1)


def for_variance(variance):
    return learned_network if variance == "learned" else network


def exact_cdf(x):
    return torch.erfc(-x / math.sqrt(2)) / 2


def released_cdf(x):
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def released_terms(x0, eps, schedule, variance, cdf):
    """`_vb_terms_bpd` of guided-diffusion for eps prediction at times SIX, written out from its tables.

    One difference: at t = 0 its "beta" takes the second beta-tilde, and the paper, as here, the first beta.
    """
    alphas_cumprod = schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / before
    posterior_variance = betas * (1 - before) / (1 - alphas_cumprod)
    posterior_log_variance_clipped = torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log()

    def at(table):
        return table[SIX].reshape(-1, 1, 1, 1)

    def posterior_mean(start):
        on_start = betas * before.sqrt() / (1 - alphas_cumprod)
        on_x_t = (1 - before) * (1 - betas).sqrt() / (1 - alphas_cumprod)
        return at(on_start) * start + at(on_x_t) * x_t

    x_t = at(alphas_cumprod.sqrt()) * x0 + at((1 - alphas_cumprod).sqrt()) * eps
    output, v = learned_network(x_t, SIX, None).chunk(2, 1)
    mean = posterior_mean(at((1 / alphas_cumprod).sqrt()) * x_t - at((1 / alphas_cumprod - 1).sqrt()) * output)
    low, high = at(posterior_log_variance_clipped), at(betas.log())
    frac = {"learned": (v + 1) / 2, "beta_tilde": torch.zeros_like(v), "beta": torch.ones_like(v)}[variance]
    logvar = frac * high + (1 - frac) * low
    normal_kl = 0.5 * (
        -1.0 + logvar - low + torch.exp(low - logvar) + (posterior_mean(x0) - mean) ** 2 * torch.exp(-logvar)
    )
    centered, inv_stdv = x0 - mean, torch.exp(-0.5 * logvar)
    cdf_plus, cdf_min = cdf(inv_stdv * (centered + 1.0 / 255.0)), cdf(inv_stdv * (centered - 1.0 / 255.0))
    log_cdf_plus, log_one_minus_cdf_min = cdf_plus.clamp(min=1e-12).log(), (1 - cdf_min).clamp(min=1e-12).log()
    log_cdf_delta = (cdf_plus - cdf_min).clamp(min=1e-12).log()
    log_probs = torch.where(x0 < -0.999, log_cdf_plus, torch.where(x0 > 0.999, log_one_minus_cdf_min, log_cdf_delta))
    return torch.where(at(torch.arange(1000)) == 0, -log_probs, normal_kl).mean((1, 2, 3)) / math.log(2)


@pytest.mark.parametrize("variance", ["learned", "beta_tilde", "beta"])
@pytest.mark.parametrize("schedule", [COSINE, SCHEDULE])
def test_the_bound_is_that_of_the_released_code(schedule, variance, pictures):
    x0, eps = pictures
    bound = variational_bound(for_variance(variance), x0, eps, SIX, CONTEXT, schedule, "eps", variance, "8-bit")
    assert bound.shape == (6,)
    assert bound.dtype == torch.float64
    expected = released_terms(x0, eps, schedule, variance, exact_cdf)
    torch.testing.assert_close(bound / 1000, expected, rtol=1e-8, atol=0)
    approximate = released_terms(x0, eps, schedule, variance, released_cdf)
    torch.testing.assert_close(bound / 1000, approximate, rtol=1e-3, atol=0)


def test_the_bound_is_the_same_whatever_the_network_predicts(pictures):
    x0, eps = pictures
    alpha, sigma = SCHEDULE.coefficients(SIX, like=x0)

    def predicting(kind):
        def convert(x_t, t, context):
            output, v = learned_network(x_t, t, context).chunk(2, 1)
            estimate = prediction.to_x0("v", output, x_t, alpha, sigma)
            return torch.cat([prediction.from_x0(kind, estimate, x_t, alpha, sigma), v], 1)

        return variational_bound(convert, x0, eps, SIX, CONTEXT, SCHEDULE, kind, "learned", "8-bit")

    for kind in ("eps", "x0", "score"):
        torch.testing.assert_close(predicting(kind), predicting("v"), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("schedule", "t", "s"),
    [
        (SCHEDULE, [1, 2, 500, 999], [0, 1, 499, 998]),
        (SCHEDULE, [19, 39, 500, 999], [3, 19, 100, 0]),
        (VPSDE(), [0.01, 0.1, 0.5, 1.0], [0.001, 0.09, 0.1, 0.9]),
    ],
)
def test_with_a_fixed_variance_a_term_is_the_weighted_error_of_eps(schedule, t, s, pictures):
    x0, eps = (value[:4] for value in pictures)
    t, s = torch.tensor(t), torch.tensor(s)
    x_t = schedule.add_noise(x0, eps, t)
    alpha, sigma = schedule.coefficients(t, like=x0)
    output = 0.8 * x_t.sin()
    estimate = Estimate(prediction.to_x0("eps", output, x_t, alpha, sigma))
    beta, beta_tilde = posterior.beta(schedule, t, s), posterior.beta_tilde(schedule, t, s)
    ratio = beta_tilde / beta
    for name, variance, constant in [
        ("beta_tilde", beta_tilde, 0),
        ("beta", beta, (ratio - 1 - ratio.log()) / 2),
    ]:
        term = bound_term(estimate, x0, schedule, t, s, name, "8-bit") * math.log(2)
        expected = eps_weight(variance, schedule, t, s) * mean_square(eps - output) + constant
        torch.testing.assert_close(term, expected, rtol=1e-8, atol=1e-14)


def test_the_weight_of_eps_is_the_papers():
    t = torch.arange(1, 1000)
    alpha_bar = SCHEDULE.alphas_cumprod[1:]
    alpha = alpha_bar / SCHEDULE.alphas_cumprod[:-1]
    beta = 1 - alpha
    expected = beta**2 / (2 * beta * alpha * (1 - alpha_bar))
    torch.testing.assert_close(eps_weight(beta, SCHEDULE, t, t - 1), expected, rtol=1e-9, atol=0)
    assert eps_weight(beta[-1:], ZERO_SNR, t[-1:], t[-1:] - 1).isinf()


def bits_at_zero(x0, mean, schedule, data, variance="beta"):
    """L_0 of single values [B], whose decoder has the standard deviation sigma of t = 0."""
    t = torch.zeros(len(x0), dtype=torch.int64)
    return bound_term(Estimate(mean.reshape(-1, 1)), x0.reshape(-1, 1), schedule, t, t - 1, variance, data)


@pytest.mark.parametrize("std", [1e-3, 5e-3, 0.1, 0.9])
@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.0, 0.123, 0.997, 1.0])
def test_the_probabilities_of_the_256_levels_sum_to_1(mean, std):
    schedule = NoiseSchedule.from_alphas_cumprod(torch.tensor([1 - std**2, 0.1], dtype=torch.float64))
    levels = torch.arange(256).double() / 127.5 - 1
    bits = bits_at_zero(levels, torch.full_like(levels, mean), schedule, "8-bit")
    assert bits.isfinite().all()
    assert abs((-bits * math.log(2)).exp().sum() - 1) < 1e-12
    normal = torch.distributions.Normal(torch.tensor(mean, dtype=torch.float64), std)
    inner = (levels > mean - 5 * std) & (levels < mean + 5 * std) & (levels.abs() < 0.999)
    masses = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
    torch.testing.assert_close((-bits * math.log(2)).exp()[inner], masses[inner], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_the_mean_a_level_still_has_a_probability_and_a_gradient(dtype):
    schedule = NoiseSchedule.from_alphas_cumprod(torch.tensor([1 - 1e-6, 0.1], dtype=torch.float64))
    x0 = torch.tensor([-1.0, -1 + 2 / 255, 0.9, 1.0], dtype=dtype)
    mean = torch.tensor([1.0, 1.5, -0.9, -1.0], dtype=dtype, requires_grad=True)
    bits = bits_at_zero(x0, mean, schedule, "8-bit")
    nearest = (x0 - mean).detach().abs().double() - 1 / 255
    torch.testing.assert_close(bits.double(), (nearest / 1e-3) ** 2 / 2 / math.log(2), rtol=1e-4, atol=0)
    bits.sum().backward()
    # At 2000 sigmas torch's derivative of log_ndtr has one digit in single precision, which is enough to go downhill.
    tolerance = 0.4 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(mean.grad.double().abs(), nearest / 1e-6 / math.log(2), rtol=tolerance, atol=0)


def test_continuous_data_have_a_density(pictures):
    x0, eps = (value[:, :1, 0, 0].flatten() for value in pictures)
    for variance, entry in [("beta", posterior.beta), ("beta_tilde", posterior.beta_tilde)]:
        t = torch.tensor([0 if variance == "beta" else 1])  # beta-tilde at t = 0 is that of the step after
        std = entry(SCHEDULE, t, t - 1).sqrt()
        expected = -torch.distributions.Normal(x0 + 0.03 * eps, std).log_prob(x0) / math.log(2)
        bits = bits_at_zero(x0, x0 + 0.03 * eps, SCHEDULE, "continuous", variance)
        torch.testing.assert_close(bits, expected, rtol=1e-10, atol=0)
    assert bits.min() < 0


def test_the_hybrid_is_the_squared_error_and_a_thousandth_of_the_bound(pictures):
    x0, eps = pictures
    calls = []

    def counted(*inputs):
        calls.append(inputs)
        return learned_network(*inputs)

    hybrid = hybrid_loss(counted, x0, eps, SIX, CONTEXT, SCHEDULE, "v", "8-bit", min_snr_gamma=5.0)
    assert len(calls) == 1
    simple = diffusion_loss(network, x0, eps, SIX, CONTEXT, SCHEDULE, "v", min_snr_gamma=5.0)
    bound = variational_bound(learned_network, x0, eps, SIX, CONTEXT, SCHEDULE, "v", "learned", "8-bit")
    torch.testing.assert_close(hybrid, simple + 0.001 * bound, rtol=1e-12, atol=0)


@pytest.mark.parametrize("data", ["8-bit", "continuous"])
def test_the_hybrids_bound_trains_the_variance_alone(data, pictures):
    x0, eps = pictures
    output = torch.cat([0.8 * eps, eps.cos()], 1).requires_grad_()

    def gradient(loss, given):
        return torch.autograd.grad(loss(lambda *_: given).sum(), output)[0].chunk(2, 1)

    inputs = (x0, eps, SIX, CONTEXT, SCHEDULE, "eps")
    of_mean, of_variance = gradient(lambda net: hybrid_loss(net, *inputs, data), output)
    simple, _ = gradient(lambda net: diffusion_loss(net, *inputs), output.chunk(2, 1)[0])
    whole_of_mean, whole = gradient(lambda net: variational_bound(net, *inputs, "learned", data), output)
    torch.testing.assert_close(of_mean, simple, rtol=1e-12, atol=0)
    torch.testing.assert_close(of_variance, 0.001 * whole, rtol=1e-9, atol=0)
    assert whole_of_mean.abs().min() > 0
    assert of_variance.abs().min() > 0


@pytest.mark.parametrize("variance", ["learned", "beta"])
def test_a_new_network_gets_a_finite_gradient_from_the_bound_at_the_noisiest_times(variance):
    # There the estimate of a network that predicts no noise yet is up to 80,000, and its deviation about 1.
    output = torch.zeros(10, 6 if variance == "learned" else 3, 32, 32, requires_grad=True)
    x0, eps = torch.zeros(10, 3, 32, 32), torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = x0, eps, torch.arange(990, 1000), torch.zeros(10, 1, 1), COSINE, "eps"
    loss = variational_bound(lambda x_t, t, context: output, *inputs, variance, "8-bit")
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("data", ["8-bit", "continuous"])
@pytest.mark.parametrize("variance", ["learned", "beta_tilde", "beta"])
def test_single_precision_is_enough(variance, data, pictures):
    def bound(x0, eps, schedule):
        return variational_bound(for_variance(variance), x0, eps, SIX, CONTEXT, schedule, "v", variance, data)

    for schedule in (SCHEDULE, COSINE, ZERO_SNR):
        single = bound(*(value.float() for value in pictures), schedule)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), bound(*pictures, schedule), rtol=1e-4, atol=1e-3)
    half = bound(*(value.bfloat16() for value in pictures), SCHEDULE)
    assert half.dtype == torch.float32
    assert half.isfinite().all()


def test_a_learned_variance_that_would_stay_untrained_is_refused(pictures):
    x0, eps = pictures
    with pytest.raises(ValueError, match=r"6 channels for x0 \(6, 3, 4, 4\).*train it with hybrid_loss"):
        diffusion_loss(learned_network, x0, eps, SIX, CONTEXT, SCHEDULE, "v")
    with pytest.raises(ValueError, match="choose the variance 'learned' instead of 'beta'"):
        variational_bound(learned_network, x0, eps, SIX, CONTEXT, SCHEDULE, "v", "beta", "8-bit")


def test_a_learned_variance_that_the_network_lacks_is_refused(pictures):
    x0, eps = pictures
    missing = r"needs 6 output channels for x0 \(6, 3, 4, 4\), but the network gave 3"
    with pytest.raises(ValueError, match=missing):
        hybrid_loss(network, x0, eps, SIX, CONTEXT, SCHEDULE, "v", "8-bit")
    with pytest.raises(ValueError, match=missing):
        variational_bound(network, x0, eps, SIX, CONTEXT, SCHEDULE, "v", "learned", "8-bit")


def test_an_output_of_another_shape_is_refused(pictures):
    x0, eps = pictures
    with pytest.raises(ValueError, match=r"output is \(6, 2, 4, 4\), but for x0 \(6, 3, 4, 4\)"):
        diffusion_loss(lambda x_t, t, context: x_t[:, :2], x0, eps, SIX, CONTEXT, SCHEDULE, "v")


def test_an_unknown_variance_or_kind_of_data_is_refused(pictures):
    x0, eps = pictures
    with pytest.raises(ValueError, match="variance is 'small'"):
        variational_bound(network, x0, eps, SIX, CONTEXT, SCHEDULE, "v", "small", "8-bit")
    with pytest.raises(ValueError, match="data is 'latents'"):
        variational_bound(network, x0, eps, SIX, CONTEXT, SCHEDULE, "v", "beta", "latents")


def test_the_bound_and_the_hybrid_refuse_what_the_squared_error_refuses(pictures):
    x0, eps = pictures
    with pytest.raises(ValueError, match="use v with zero terminal SNR"):
        variational_bound(network, x0, eps, SIX, CONTEXT, ZERO_SNR, "eps", "beta", "8-bit")
    with pytest.raises(ValueError, match="use v with zero terminal SNR"):
        hybrid_loss(learned_network, x0, eps, SIX, CONTEXT, ZERO_SNR, "eps", "8-bit")
    with pytest.raises(ValueError, match="min_snr_gamma is"):
        hybrid_loss(learned_network, x0, eps, SIX, CONTEXT, SCHEDULE, "v", "8-bit", min_snr_gamma=0.0)
