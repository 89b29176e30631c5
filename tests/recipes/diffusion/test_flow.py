"""Flow matching, against transcriptions of diffusers' scripts."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from loca_vision.recipes.diffusion.flow import Flow

SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none")


def flow(scheme="none", **more):
    return Flow(FlowMatchEulerDiscreteScheduler(shift=3.0), scheme, **more)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_timesteps_are_drawn_as_by_diffusers(scheme):
    """One number each, by generators in the same state."""
    process = flow(scheme, logit_mean=0.3, logit_std=0.7, mode_scale=1.1)
    for seed in range(50):
        share = compute_density_for_timestep_sampling(
            scheme, 1, logit_mean=0.3, logit_std=0.7, mode_scale=1.1, generator=torch.Generator().manual_seed(seed)
        )
        assert process.timestep(torch.Generator().manual_seed(seed)) == (share[0] * 1000).long().clamp(0, 999)


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loss_of_flow_matching(scheme, precondition):
    """As train_dreambooth_lora_sd3.py has it."""
    process = flow(scheme, precondition_outputs=precondition)
    latents, noise, prediction = (torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(3))
    indices = torch.tensor([0, 400, 999])
    scheduler = process.scheduler
    sigmas = scheduler.sigmas[indices][:, None, None, None]
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    mine, timesteps = process.noisy(latents, noise, indices)
    assert torch.equal(mine, noisy) and torch.equal(timesteps, scheduler.timesteps[indices])
    weighting = compute_loss_weighting_for_sd3(weighting_scheme=scheme, sigmas=sigmas)
    theirs, target = (prediction * (-sigmas) + noisy, latents) if precondition else (prediction, noise - latents)
    wanted = (weighting * (theirs - target) ** 2).reshape(3, -1).mean(1)
    found = (prediction - process.target(latents, noise, indices)).square().flatten(1).mean(1) * process.weights(indices)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
