import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

from ldm.denoiser import Estimate, make_denoiser
from ldm.guidance import classifier, classifier_free, clip, interval, keep_known, log_prob_gradient, threshold
from ldm.samplers import sample_ddim
from ldm.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule("scaled_linear")
ZERO_SNR = NoiseSchedule("scaled_linear", zero_terminal_snr=True)
BATCH = 3


class RecordingNetwork(nn.Module):
    """A cheap nonlinear function of all three arguments, which keeps what it was called with."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=dtype))
        self.calls = []

    def forward(self, x_t, t, context):
        self.calls.append((x_t, t, context))
        return torch.tanh(self.gain * x_t + context.mean((1, 2)).reshape(-1, 1, 1, 1)) + (t / 1000).reshape(
            -1, 1, 1, 1
        ).to(x_t.dtype)


@pytest.fixture
def inputs():
    """x_t, t, cond, uncond."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(BATCH, 4, 8, 8, generator=generator)
    cond, uncond = torch.randn(2, BATCH, 5, 6, generator=generator)
    return x_t, torch.full((BATCH,), 400.0, dtype=torch.float64), cond, uncond


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
def test_guiding_x0_is_guiding_the_output(prediction, scale, inputs):
    x_t, t, cond, uncond = inputs
    network = RecordingNetwork()
    denoise = make_denoiser(network, SCHEDULE, prediction)
    guided = classifier_free(denoise, cond, uncond, scale)(x_t, t)
    output_uncond, output_cond = network(x_t, t, uncond), network(x_t, t, cond)
    expected = denoise.to_x0(output_uncond + scale * (output_cond - output_uncond), x_t, t)
    torch.testing.assert_close(guided.x0, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("scale", "rescale"), [(1.0, 0.7), (0.0, 0.0)])
def test_scale_one_and_zero_run_one_half_alone(scale, rescale, inputs):
    x_t, t, cond, uncond = inputs
    network = RecordingNetwork()
    denoise = make_denoiser(network, SCHEDULE, "eps")
    estimate = classifier_free(denoise, cond, uncond, scale, rescale)(x_t, t)
    assert len(network.calls) == 1
    assert network.calls[0][0].shape == x_t.shape
    assert torch.equal(estimate.x0, denoise(x_t, t, cond if scale == 1 else uncond).x0)


@torch.no_grad()
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("t", [torch.tensor(400.0), torch.tensor([400.0, 3.0, 900.0])])
def test_both_halves_are_one_batch_unconditional_first(rescale, t, inputs):
    x_t, _, cond, uncond = inputs
    network = RecordingNetwork()
    classifier_free(make_denoiser(network, SCHEDULE, "v"), cond, uncond, 7.5, rescale)(x_t, t)
    assert len(network.calls) == 1
    x_seen, t_seen, context_seen = network.calls[0]
    assert torch.equal(x_seen, torch.cat([x_t, x_t]))
    assert torch.equal(t_seen, torch.cat([t.expand(BATCH)] * 2))
    assert torch.equal(context_seen, torch.cat([uncond, cond]))


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescale_is_that_of_diffusers(prediction, rescale, inputs):
    x_t, t, cond, uncond = inputs
    network = RecordingNetwork()
    denoise = make_denoiser(network, SCHEDULE, prediction)
    guided = classifier_free(denoise, cond, uncond, 7.5, rescale)(x_t, t)
    output_uncond, output_cond = network(x_t, t, uncond), network(x_t, t, cond)
    output = rescale_noise_cfg(output_uncond + 7.5 * (output_cond - output_uncond), output_cond, rescale)
    torch.testing.assert_close(guided.x0, denoise.to_x0(output, x_t, t), rtol=1e-5, atol=1e-5)


def test_the_learned_variance_comes_from_the_conditional_half(inputs):
    x_t, t, cond, uncond = inputs

    def denoise(x_t, t, context):
        return Estimate(x_t, v=context[:, 0, :1])

    for scale in (1.0, 3.0):
        assert torch.equal(classifier_free(denoise, cond, uncond, scale)(x_t, t).v, cond[:, 0, :1])


def test_contexts_of_different_shapes_are_refused(inputs):
    _, _, cond, uncond = inputs
    with pytest.raises(ValueError, match="give both the same shape"):
        classifier_free(make_denoiser(RecordingNetwork(), SCHEDULE, "eps"), cond, uncond[:, :4], 2.0)


@pytest.mark.parametrize("rescale", [-0.1, 1.1])
def test_rescale_out_of_range_is_refused(rescale, inputs):
    _, _, cond, uncond = inputs
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        classifier_free(make_denoiser(RecordingNetwork(), SCHEDULE, "eps"), cond, uncond, 2.0, rescale)


def constant(value, v=None):
    """A denoiser that estimates x0 as `value` whatever it is given, and keeps the x_t that it was given."""

    def denoise(x_t, t):
        denoise.seen.append(x_t)
        return Estimate(value.expand_as(x_t), v)

    denoise.seen = []
    return denoise


def at(t):
    return torch.tensor(float(t), dtype=torch.float64)


def noise_of(t):
    alpha, sigma = SCHEDULE.at(at(t))
    return float(sigma / alpha)


def test_the_interval_is_open_below_and_closed_above():
    guided, plain = constant(torch.tensor(1.0)), constant(torch.tensor(0.0))
    x_t = torch.zeros(BATCH, 4, 8, 8)
    denoise = interval(guided, plain, SCHEDULE, low=noise_of(200), high=noise_of(600))
    for t, is_guided in [(0, 0), (199, 0), (200, 0), (201, 1), (400.5, 1), (600, 1), (600.5, 0), (999, 0)]:
        for times in (at(t), at(t).expand(BATCH)):
            assert torch.equal(denoise(x_t, times).x0, torch.full_like(x_t, is_guided))
    assert len(guided.seen) == 6  # neither runs without need
    assert len(plain.seen) == 10


def test_an_endless_interval_begins_at_pure_noise():
    guided, plain = constant(torch.tensor(1.0)), constant(torch.tensor(0.0))
    x_t = torch.zeros(BATCH, 4, 8, 8)
    assert interval(guided, plain, ZERO_SNR, 0, math.inf)(x_t, at(999)).x0.all()
    assert not interval(guided, plain, ZERO_SNR, 0, 1e9)(x_t, at(999)).x0.any()


def test_a_batch_on_both_sides_of_the_interval_is_refused():
    denoise = interval(constant(torch.zeros(())), constant(torch.zeros(())), SCHEDULE, 0, noise_of(500))
    assert denoise(torch.zeros(2, 1), torch.tensor([1.0, 400.0])).x0.shape == (2, 1)
    with pytest.raises(ValueError, match="a part of the batch only"):
        denoise(torch.zeros(2, 1), torch.tensor([400.0, 600.0]))


@pytest.mark.parametrize(("low", "high"), [(-0.1, 1.0), (1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_an_empty_interval_is_refused(low, high):
    with pytest.raises(ValueError, match="must satisfy 0 <= low < high"):
        interval(constant(torch.zeros(())), constant(torch.zeros(())), SCHEDULE, low, high)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding_is_that_of_diffusers(quantile):
    """Three samples: one within the bound, one a little and one far outside."""
    x0 = (
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.2, 1.0, 9.0])[:, None, None, None]
    )
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=1e6)
    result = threshold(constant(x0), quantile=quantile)(torch.zeros_like(x0), at(5)).x0
    torch.testing.assert_close(result, scheduler._threshold_sample(x0), rtol=1e-6, atol=1e-6)
    doubled = threshold(constant(2 * x0), bound=2, quantile=quantile)(torch.zeros_like(x0), at(5)).x0
    torch.testing.assert_close(doubled, 2 * result)


def test_static_thresholding_clips():
    x0 = torch.tensor([[-3.0, -0.4, 0.9, 1.5]])
    for bound, expected in [(1.0, [[-1, -0.4, 0.9, 1]]), (1.2, [[-1.2, -0.4, 0.9, 1.2]])]:
        result = threshold(constant(x0), bound)(torch.zeros_like(x0), at(5)).x0
        torch.testing.assert_close(result, torch.tensor(expected))


def test_eps_follows_the_thresholded_x0():
    """One step of DDIM is that of diffusers with clip_sample, which clips x0 and derives eps anew."""
    x_t, *_ = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=True)
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.set_timesteps(10)
    output = torch.cos(3 * x_t)
    denoise = make_denoiser(lambda x_t, t, context: output, SCHEDULE, "eps")
    clipped = threshold(lambda x_t, t: denoise(x_t, t, torch.zeros(3, 1, 1)))
    ours = sample_ddim(clipped, x_t, SCHEDULE, torch.tensor([900.0, 800.0]))
    theirs = scheduler.step(output, 900, x_t, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_threshold_that_is_none_is_refused():
    for bound in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be above 0"):
            threshold(constant(torch.zeros(())), bound)
    for quantile in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"quantile is .*, but must be from 0 to 1"):
            threshold(constant(torch.zeros(())), quantile=quantile)


class Classes:
    """Clean data of three classes, N(means[k], 0.4^2) with weights[k], and all that follows in closed form."""

    std = 0.4
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    means = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def __init__(self, schedule=SCHEDULE):
        self.schedule = schedule

    def log_probs(self, x_t, t):
        """log p(k | x_t) [B, 3]."""
        alpha, sigma = (value[..., None] for value in self.schedule.coefficients(t, x_t))
        distances = ((x_t[:, None] - alpha * self.means) ** 2).sum((2, 3))
        variance = alpha**2 * self.std**2 + sigma**2
        return (self.weights.log() - distances / (2 * variance[:, 0, :, 0])).log_softmax(1)

    def of_class(self, k):
        """E[x0 | x_t, k]."""

        def denoise(x_t, t):
            alpha, sigma = self.schedule.coefficients(t, x_t)
            gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
            return Estimate(self.means[k] + gain * (x_t - alpha * self.means[k]))

        return denoise

    def of_all(self, x_t, t):
        """E[x0 | x_t]."""
        probs = self.log_probs(x_t, t).exp()
        return Estimate(sum(probs[:, k, None, None] * self.of_class(k)(x_t, t).x0 for k in range(3)))

    def log_prob_of(self, k):
        return lambda x_t, t: self.log_probs(x_t, t)[:, k]


@torch.no_grad()
@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("t", [at(3), at(400), torch.tensor([10.0, 500.0, 700.0, 850.5, 999.0], dtype=torch.float64)])
def test_classifier_guidance_at_scale_one_is_the_conditional_denoiser(k, t):
    """grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t)."""
    classes = Classes()
    x_t = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guided = classifier(classes.of_all, classes.log_prob_of(k), SCHEDULE, 1.0)(x_t, t).x0
    torch.testing.assert_close(guided, classes.of_class(k)(x_t, t).x0, rtol=1e-9, atol=1e-9)
    assert (guided - classes.of_all(x_t, t).x0).abs().max() > 1e-3


@torch.no_grad()
def test_classifier_guidance_is_algorithm_2():
    classes = Classes()
    x_t = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = SCHEDULE.coefficients(at(600), x_t)
    gradient = log_prob_gradient(classes.log_prob_of(1), 3.0)(x_t, at(600))
    eps = (x_t - alpha * classes.of_all(x_t, at(600)).x0) / sigma - sigma * gradient
    guided = classifier(classes.of_all, classes.log_prob_of(1), SCHEDULE, 3.0)(x_t, at(600)).x0
    torch.testing.assert_close(guided, (x_t - sigma * eps) / alpha)


@torch.no_grad()
def test_sampling_with_a_classifier_ends_in_its_class():
    """The exact flow of a Gaussian is linear: unit noise x ends at mean + std x. Its first step goes unguided."""
    classes = Classes(ZERO_SNR)
    x = torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guided = classifier(classes.of_all, classes.log_prob_of(2), ZERO_SNR, 1.0)
    ended = sample_ddim(guided, x, ZERO_SNR, ZERO_SNR.timesteps(200, "trailing"))
    torch.testing.assert_close(ended, classes.means[2] + classes.std * x, rtol=0, atol=4e-2)


@torch.no_grad()
def test_the_gradient_is_that_of_the_scaled_log_probability():
    classes = Classes()
    x_t = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = log_prob_gradient(classes.log_prob_of(1), 2.0)(x_t, at(600))
    alpha, sigma = SCHEDULE.coefficients(at(600), x_t)
    pulls = alpha * classes.means
    variance = alpha**2 * classes.std**2 + sigma**2
    mixed = torch.einsum("bk,kij->bij", classes.log_probs(x_t, at(600)).exp(), pulls)
    torch.testing.assert_close(gradient, 2 * (pulls[1] - mixed) / variance)
    assert not gradient.requires_grad
    assert log_prob_gradient(lambda x_t, t: t * x_t.sum(1), 1.0)(
        torch.ones(2, 3), torch.tensor([4.0, 5.0])
    ).tolist() == [
        [4] * 3,
        [5] * 3,
    ]


def smooth(x_t, t):
    """A nonlinear denoiser whose derivative is known."""
    return Estimate(torch.tanh(0.5 * x_t), v=t.expand(len(x_t))[:, None] + 0 * x_t)


@torch.no_grad()
def test_clip_guidance_goes_through_the_network():
    x_t = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    words = torch.linspace(-1, 1, 6, dtype=torch.float64)
    guided = clip(smooth, lambda x0: (x0**2 * words).sum(1), SCHEDULE, 3.0)(x_t, at(300))
    x0 = smooth(x_t, at(300)).x0
    alpha, sigma = SCHEDULE.coefficients(at(300), x_t)
    gradient = 2 * x0 * words * 0.5 * (1 - x0**2)
    torch.testing.assert_close(guided.x0, x0 + 3 * sigma**2 / alpha * gradient)
    assert not guided.x0.requires_grad


@torch.no_grad()
def test_clip_guidance_by_the_likelihood_of_an_observation_is_the_posterior():
    """x0 ~ N(0, s^2) is seen as y = x0 + N(0, r^2). log p(y | x_t) is a Gaussian around E[x0 | x_t], of known width."""
    prior, noise, y = 0.8, 0.3, 1.2
    alpha, sigma = (float(value) for value in SCHEDULE.at(at(500)))
    kept = prior**2 * sigma**2 / (alpha**2 * prior**2 + sigma**2)  # the variance of x0 given x_t
    gain = alpha * prior**2 / (alpha**2 * prior**2 + sigma**2)
    x_t = torch.randn(5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guided = clip(
        lambda x_t, t: Estimate(gain * x_t),
        lambda x0: -((y - x0[:, 0]) ** 2) / (2 * (kept + noise**2)),
        SCHEDULE,
        1.0,
    )(x_t, at(500))
    precision = 1 / prior**2 + alpha**2 / sigma**2 + 1 / noise**2
    torch.testing.assert_close(guided.x0, (alpha * x_t / sigma**2 + y / noise**2) / precision)


def test_clip_guidance_nests():
    """Two similarities, one around the other, are their sum, where the inner shift's own derivative is 0."""
    x_t = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def linear(x_t, t):
        return Estimate(0.5 * x_t)

    first, second = (lambda x0: x0[:, 0]), (lambda x0: x0[:, 1:].sum(1))
    once = clip(linear, lambda x0: 2 * first(x0) + 3 * second(x0), SCHEDULE, 1.0)
    twice = clip(clip(linear, first, SCHEDULE, 2.0), second, SCHEDULE, 3.0)
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            torch.testing.assert_close(twice(x_t, at(500)).x0, once(x_t, at(500)).x0)


def test_no_gradient_reaches_the_weights():
    gain = nn.Parameter(torch.tensor(0.5))

    def denoise(x_t, t):
        return Estimate(gain * x_t)

    with torch.no_grad():
        clip(denoise, lambda x0: gain * x0.sum(1), SCHEDULE, 1.0)(torch.ones(2, 3), at(5))
        classifier(denoise, lambda x_t, t: gain * x_t.sum(1), SCHEDULE, 1.0)(torch.ones(2, 3), at(5))
    assert gain.grad is None


def test_pure_noise_is_not_guided_by_gradients():
    classes = Classes(ZERO_SNR)
    x_t = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([999.0, 998.0], dtype=torch.float64)
    plain = classes.of_all(x_t, t).x0
    for guided in (
        classifier(classes.of_all, classes.log_prob_of(0), ZERO_SNR, 1.0),
        clip(classes.of_all, lambda x0: x0.sum((1, 2)), ZERO_SNR, 1.0),
    ):
        x0 = guided(x_t, t).x0
        assert torch.equal(x0[0], plain[0])
        assert not torch.equal(x0[1], plain[1])


@pytest.mark.parametrize("recording", [True, False])
def test_a_callable_without_a_gradient_for_each_sample_is_refused(recording):
    x_t = torch.ones(3, 4)
    weight = torch.ones((), requires_grad=True)
    denoise = constant(torch.zeros(()))
    with torch.set_grad_enabled(recording):
        with pytest.raises(ValueError, match=r"log_prob gave shape \(\): .* each of 3 samples"):
            classifier(denoise, lambda x_t, t: x_t.sum(), SCHEDULE, 1.0)(x_t, at(5))
        with pytest.raises(ValueError, match=r"similarity gave shape \(3, 4\)"):
            clip(denoise, lambda x0: x0, SCHEDULE, 1.0)(x_t, at(5))
        for lost in (lambda x_t, t: x_t.detach().sum(1), lambda x_t, t: weight.expand(3)):
            with pytest.raises(ValueError, match="log_prob has no gradient"):
                log_prob_gradient(lost, 1.0)(x_t, at(5))
        with pytest.raises(ValueError, match="similarity has no gradient"):
            clip(smooth, lambda x0: x0.detach().sum(1), SCHEDULE, 1.0)(x_t, at(5))


@pytest.fixture
def scene():
    """Known latents, noise and a mask that has the right half painted; float64."""
    known, noise = torch.randn(2, BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    mask[..., 4:] = 1
    return known, noise, mask


def network(x_t, t, context):
    """A smooth function of x_t in which every position depends on its neighbours."""
    neighbours = x_t.roll(1, -1) + x_t.roll(1, -2)
    return torch.sin(x_t + 0.5 * neighbours) * 0.8 + 0.1 * (t / 1000).reshape(-1, 1, 1, 1).to(x_t.dtype)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_keeping_the_known_is_what_diffusers_inpaint_pipeline_does(spacing, prediction, strength, scene):
    """Its loop for a network of 4 channels (`StableDiffusionInpaintPipeline.__call__`), with its own scheduler."""
    known, noise, mask = scene
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
        timestep_spacing=spacing,
        clip_sample=False,
    )
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps[10 - int(10 * strength) :]
    begun = noise if strength == 1 else scheduler.add_noise(known, noise, timesteps[:1])

    latents = begun
    for i, t in enumerate(timesteps):
        output = network(latents, t.double().expand(BATCH), None)
        latents = scheduler.step(output, t, latents).prev_sample
        proper = known
        if i < len(timesteps) - 1:
            proper = scheduler.add_noise(known, noise, timesteps[i + 1 : i + 2])
        latents = (1 - mask) * proper + mask * latents

    grid = torch.cat([timesteps, torch.tensor([-1])]).double()
    denoise = make_denoiser(network, SCHEDULE, prediction)
    kept = keep_known(
        lambda x_t, t: denoise(x_t, t, torch.zeros(BATCH, 1, 1)), known, noise, mask, SCHEDULE, float(grid[0])
    )
    estimates = []
    ours = sample_ddim(kept, begun, SCHEDULE, grid, on_step=lambda info: estimates.append(info.x0))
    torch.testing.assert_close(ours, latents, rtol=0, atol=1e-10)
    assert all(torch.equal(x0[..., :4], known[..., :4]) for x0 in estimates)

    ours = sample_ddim(kept, begun.float(), SCHEDULE, grid)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), latents, rtol=1e-5, atol=1e-6)


def test_what_the_network_sees_of_the_known(scene):
    known, noise, mask = scene
    mask[..., 4] = 0.25
    x_t = torch.full_like(known, 9.0)
    inner = constant(torch.tensor(7.0, dtype=torch.float64))
    denoise = keep_known(inner, known, noise, mask, SCHEDULE, start=500)
    times = torch.tensor([500.0, 499.5, 20.0], dtype=torch.float64)
    x0 = denoise(x_t, times).x0
    noisy = SCHEDULE.add_noise(known, noise, times)
    (seen,) = inner.seen
    assert torch.equal(seen[0], x_t[0])
    torch.testing.assert_close(seen[1:], ((1 - mask) * noisy + mask * x_t)[1:])
    torch.testing.assert_close(x0, (1 - mask) * known + mask * 7)


def test_masks_may_be_of_numbers_or_truths_in_any_precision(scene):
    known, noise, mask = scene
    x_t = torch.zeros(known.shape)
    inner = constant(torch.tensor(7.0))
    expected = keep_known(inner, known.float(), noise.float(), mask.float(), SCHEDULE, 500)(x_t, at(3)).x0
    for given in (mask.bool(), mask.half().expand_as(known)):
        x0 = keep_known(inner, known, noise, given, SCHEDULE, 500)(x_t, at(3)).x0
        assert x0.dtype == torch.float32
        assert torch.equal(x0, expected)


def test_known_parts_that_do_not_fit_are_refused(scene):
    known, noise, mask = scene
    inner = constant(torch.zeros(()))
    with pytest.raises(ValueError, match=r"known is .* and noise .*: give both the same shape"):
        keep_known(inner, known, noise[:1], mask, SCHEDULE, 500)
    for wrong in (mask[0], mask[..., :7], mask.expand(2, 1, 8, 8)):
        with pytest.raises(ValueError, match="does not fit known"):
            keep_known(inner, known, noise, wrong, SCHEDULE, 500)
    with pytest.raises(ValueError, match=r"x_t is .* and known"):
        keep_known(inner, known, noise, mask, SCHEDULE, 500)(known[:1], at(3))


def test_the_outermost_has_the_last_word(scene):
    known, noise, mask = scene
    known = 5 + known.abs()
    big = constant(torch.tensor(3.0, dtype=torch.float64))

    def kept(denoise):
        return keep_known(denoise, known, noise, mask, SCHEDULE, 999)

    assert torch.equal(kept(threshold(big))(known, at(5)).x0, torch.lerp(known, torch.ones_like(known), mask))
    assert torch.equal(threshold(kept(big))(known, at(5)).x0, torch.ones_like(known))

    def log_prob(x_t, t):
        return x_t.sum((1, 2, 3))

    alpha, sigma = (float(value) for value in SCHEDULE.at(at(5)))
    step = sigma**2 / alpha
    assert torch.equal(threshold(classifier(big, log_prob, SCHEDULE, 1.0))(known, at(5)).x0, torch.ones_like(known))
    beyond = classifier(threshold(big), log_prob, SCHEDULE, 1.0)(known, at(5)).x0
    torch.testing.assert_close(beyond, torch.full_like(known, 1 + step))


def test_all_of_them_at_once_sample_as_written_out(scene):
    """Two steps of DDIM, with every guidance, and the same by hand."""
    known, noise, mask = scene
    cond, uncond = torch.randn(2, BATCH, 1, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    denoise = make_denoiser(lambda x_t, t, c: torch.tanh(x_t + c[..., None]), SCHEDULE, "x0")
    plain = classifier_free(denoise, cond, uncond, 1.0)
    guided = classifier(
        classifier_free(denoise, cond, uncond, 4.0), lambda x_t, t: -(x_t**2).sum((1, 2, 3)), SCHEDULE, 0.1
    )
    guided = interval(guided, plain, SCHEDULE, noise_of(300), math.inf)
    guided = keep_known(threshold(guided, bound=1.5), known, noise, mask, SCHEDULE, 800)
    grid = torch.tensor([800.0, 300.0, -1.0], dtype=torch.float64)
    result = sample_ddim(guided, noise, SCHEDULE, grid)

    (alpha, alpha_next, _), (sigma, sigma_next, _) = (values.tolist() for values in SCHEDULE.at(grid))
    x0_cond, x0_uncond = torch.tanh(noise + cond[..., None]), torch.tanh(noise + uncond[..., None])
    x0 = x0_uncond + 4 * (x0_cond - x0_uncond) + sigma**2 / alpha * 0.1 * -2 * noise
    x0 = torch.lerp(known, x0.clamp(-1.5, 1.5), mask)
    x = alpha_next * x0 + sigma_next * (noise - alpha * x0) / sigma
    x = torch.lerp(alpha_next * known + sigma_next * noise, x, mask)
    x0 = torch.tanh(x + cond[..., None])  # 300 is not in the interval any more
    torch.testing.assert_close(result, torch.lerp(known, x0, mask), rtol=1e-10, atol=1e-10)


def test_every_guidance_passes_the_learned_variance_on():
    x_t = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = smooth(x_t, at(5)).v

    def other(x_t, t):
        return Estimate(x_t, v=torch.zeros_like(x_t))

    for denoise in (
        interval(smooth, other, SCHEDULE, 0, 1e9),
        interval(other, smooth, SCHEDULE, 1e8, 1e9),
        threshold(smooth),
        threshold(smooth, quantile=0.9),
        classifier(smooth, lambda x_t, t: x_t.sum(1), SCHEDULE, 1.0),
        clip(smooth, lambda x0: x0.sum(1), SCHEDULE, 1.0),
        keep_known(smooth, x_t, x_t, torch.ones(1, 1), SCHEDULE, 999),
    ):
        assert torch.equal(denoise(x_t, at(5)).v, v)


@torch.no_grad()
def test_the_network_runs_in_its_own_dtype_and_the_estimate_is_float32(inputs):
    x_t, t, cond, _ = inputs
    network = RecordingNetwork(torch.bfloat16)
    estimate = make_denoiser(network, SCHEDULE, "v")(x_t, t, cond)
    x_seen, t_seen, context_seen = network.calls[0]
    assert (x_seen.dtype, t_seen.dtype, context_seen.dtype) == (torch.bfloat16, torch.float64, torch.bfloat16)
    assert estimate.x0.dtype == torch.float32
    alpha, sigma = SCHEDULE.coefficients(t, like=x_t)
    expected = alpha * x_t - sigma * network(x_seen, t_seen, context_seen).float()
    torch.testing.assert_close(estimate.x0, expected, rtol=0, atol=0)


@torch.no_grad()
def test_the_estimate_is_as_wide_as_x_and_one_time_serves_the_whole_batch(inputs):
    x_t, t, cond, _ = inputs
    network = RecordingNetwork(torch.float64)
    denoise = make_denoiser(network, SCHEDULE, "eps")
    estimate = denoise(x_t.double(), t[0], cond)
    assert estimate.x0.dtype == torch.float64
    assert network.calls[0][1].shape == (BATCH,)
    assert torch.equal(estimate.x0, denoise(x_t.double(), t, cond).x0)


def test_a_network_without_parameters_runs_in_the_dtype_of_x(inputs):
    x_t, t, cond, _ = inputs
    denoise = make_denoiser(lambda x_t, t, context: x_t * 2, SCHEDULE, "x0")
    torch.testing.assert_close(denoise(x_t, t, cond).x0, x_t * 2, rtol=0, atol=0)


def test_to_output_inverts_to_x0(inputs):
    x_t, t, _, _ = inputs
    for prediction in ("eps", "x0", "v"):
        denoise = make_denoiser(RecordingNetwork(), SCHEDULE, prediction)
        output = torch.ones_like(x_t)
        torch.testing.assert_close(denoise.to_output(denoise.to_x0(output, x_t, t), x_t, t), output)


def test_a_denoiser_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        make_denoiser(RecordingNetwork(), NoiseSchedule("scaled_linear", zero_terminal_snr=True), "eps")
    with pytest.raises(ValueError, match="prediction is 'epsilon'"):
        make_denoiser(RecordingNetwork(), SCHEDULE, "epsilon")
