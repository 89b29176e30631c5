"""What is drawn, predicted and weighed in denoising diffusion, against transcriptions of diffusers' scripts."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.nn import functional as F

from loca_vision.recipes.diffusion.denoising import Denoising, min_snr_weights, signal_to_noise, target
from loca_vision.recipes.diffusion.draws import draws
from loca_vision.recipes.diffusion.errors import denoising_loss, sampled

SHAPE = (4, 3, 5)


def scheduler(prediction_type="epsilon", **more):
    return DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, **more)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def drawn(count=4, **more):
    return draws(count, SHAPE, **{"timestep": uniform(1000), "seed": 1, "step": 7} | more)


def uniform(count):
    return Denoising(scheduler(num_train_timesteps=count)).timestep


def part(one, start, stop):
    return type(one)(*(value[start:stop] for value in vars(one).values()))


# Draws


def test_draws_are_a_function_of_seed_step_and_rank():
    state = torch.get_rng_state()
    assert equal(drawn(), drawn()) and torch.equal(torch.get_rng_state(), state)
    for other in ({"seed": 2}, {"step": 8}, {"rank": 1}):
        assert not any(torch.equal(a, b) for a, b in zip(vars(drawn()).values(), vars(drawn(**other)).values(), strict=True))


def test_processes_and_parts_of_a_batch_draw_what_one_draws():
    whole = drawn(8)
    for rank in range(2):
        mine = drawn(4, rank=rank)
        assert equal(mine, part(whole, 4 * rank, 4 * rank + 4))
        for micro in range(2):
            assert equal(drawn(2, first=4 * rank + 2 * micro), part(mine, 2 * micro, 2 * micro + 2))


def test_draws_have_their_distributions():
    many = draws(4000, (2,), timestep=uniform(10), seed=0, step=0)
    assert many.timesteps.dtype == torch.int64 and many.timesteps.unique().tolist() == list(range(10))
    assert abs(many.dropout.mean() - 0.5) < 0.02 and many.dropout.min() >= 0 and many.dropout.max() < 1
    for normal in (many.noise, many.posterior):
        assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    assert abs((many.noise * many.posterior).mean()) < 0.05


def test_samples_are_those_of_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    for dtype in (torch.float32, torch.bfloat16):
        distribution = DiagonalGaussianDistribution(torch.randn(2, 8, 3, 5).to(dtype))
        moments = torch.stack([distribution.mean, distribution.std], 1)
        noise = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(3), dtype=dtype)
        wanted = distribution.sample(torch.Generator().manual_seed(3)) * 0.18215
        assert torch.equal(0.18215 * sampled(moments, noise), wanted) and wanted.dtype == dtype


# Target, weights, loss


def test_targets():
    latents, noise, steps = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0, 500, 999])
    alpha = scheduler().alphas_cumprod[steps].sqrt()[:, None, None, None]
    velocity = alpha * noise - (1 - alpha**2).sqrt() * latents
    assert torch.equal(target(scheduler(), latents, noise, steps), noise)
    torch.testing.assert_close(target(scheduler("v_prediction"), latents, noise, steps), velocity)
    assert torch.equal(target(scheduler("sample"), latents, noise, steps), latents)
    other = scheduler()
    other.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type='flow'"):
        target(other, latents, noise, steps)


def test_the_ratio_of_signal_to_noise_is_that_of_diffusers():
    steps = torch.arange(1000)
    torch.testing.assert_close(signal_to_noise(scheduler(), steps), compute_snr(scheduler(), steps))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_weights_are_those_of_the_stock_script(kind):
    snr = compute_snr(scheduler(), torch.arange(1000))
    least = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    wanted = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[kind]
    torch.testing.assert_close(min_snr_weights(snr, 5.0, kind), wanted)


def test_weights_are_finite_where_nothing_but_noise_is_left():
    ending = scheduler("v_prediction", rescale_betas_zero_snr=True)
    snr = signal_to_noise(ending, torch.tensor([999]))
    assert snr.item() < 1e-6
    assert min_snr_weights(torch.zeros(1), 5.0, "epsilon").item() == 1
    assert min_snr_weights(torch.zeros(1), 5.0, "v_prediction").item() == 0
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="snr_gamma"):
            min_snr_weights(snr, gamma, "epsilon")


def test_the_loss_is_a_mean_in_float32():
    prediction, wanted = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    torch.testing.assert_close(denoising_loss(prediction, wanted), F.mse_loss(prediction, wanted))
    each, weights = F.mse_loss(prediction, wanted, reduction="none").mean((1, 2, 3)), torch.tensor([1.0, 0.5, 0.25])
    torch.testing.assert_close(denoising_loss(prediction, wanted, weights), (each * weights).mean())
    half = denoising_loss(prediction.half() * 300, wanted.half())  # whose squares overflow float16
    assert half.dtype == torch.float32 and half.isfinite()


def test_parts_of_a_batch_make_the_gradient_of_the_whole():
    weight = torch.randn(4, requires_grad=True)
    x, wanted = torch.randn(4, *SHAPE), torch.randn(4, *SHAPE)

    def gradient(parts):
        weight.grad = None
        for some in torch.arange(4).chunk(parts):
            (denoising_loss(x[some] * weight[some, None, None, None], wanted[some]) * len(some) / 4).backward()
        return weight.grad.clone()

    torch.testing.assert_close(gradient(1), gradient(2))
