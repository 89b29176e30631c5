"""What a denoiser is told in training is what its pipeline tells it; latents are those that the pipeline decodes."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from loca_vision.recipes.diffusion.denoising import Denoising
from loca_vision.recipes.diffusion.encoders import Encoders
from loca_vision.recipes.diffusion.families.by_pipeline import TEXT_TO_IMAGE, family_of
from loca_vision.recipes.diffusion.flow import Flow
from support.image_training import FAMILIES, length_of

PROMPT = "a red dog"
OF_UNETS = ("sample", "timestep", "encoder_hidden_states")  # which are told them without their names


@pytest.fixture(params=FAMILIES)
def family(request):
    pipe = FAMILIES[request.param]()
    kind = TEXT_TO_IMAGE[type(pipe).__name__]
    scheduler = (FlowMatchEulerDiscreteScheduler if kind.flow else DDPMScheduler).from_config(pipe.scheduler.config)
    more = {"max_sequence_length": 16} if length_of(request.param) else {}
    return kind(pipe, (Flow if kind.flow else Denoising)(scheduler), **more)


def calls(model, run):
    """The arguments of every call of a model, by name, and its answers."""
    forward, told = model.forward, []

    def spy(*given, **named):
        answer = forward(*given, **named)
        tensor = answer[0] if isinstance(answer, tuple) else answer.sample
        told.append(dict(zip(OF_UNETS, given, strict=False)) | named | {"answer": tensor})
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", spy)
        run()
    return told


@torch.no_grad()
def test_the_denoiser_is_told_what_the_pipeline_tells_it(family):
    pipe, guided = family.pipe, getattr(family.model.config, "guidance_embeds", False)
    settings = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent", **family.call_settings()}
    settings["guidance_scale"] = family.guidance_scale if guided else 1.0
    generator = torch.Generator().manual_seed(0)
    (theirs,) = calls(family.model, lambda: pipe(prompt=PROMPT, generator=generator, **settings))

    sent = theirs["hidden_states"] if "hidden_states" in theirs else theirs["sample"]
    noisy = unpacked(family, sent)
    timesteps = theirs["timestep"].reshape(-1)[:1] * (1000 if sent.ndim == 3 else 1)
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    predicted = []
    (ours,) = calls(
        family.model,
        lambda: predicted.append(family.predict(family.model, noisy, timesteps, family.texts([PROMPT]), sizes)),
    )
    assert flat(ours) and flat(ours).keys() <= flat(theirs).keys()
    for name, value in flat(ours).items():
        torch.testing.assert_close(
            value.float(), flat(theirs)[name].float().reshape(value.shape), rtol=1e-5, atol=1e-5, msg=name
        )
    torch.testing.assert_close(predicted[0], unpacked(family, theirs["answer"]), rtol=1e-4, atol=1e-5)


def flat(told):
    """The tensors among arguments."""
    inner = told.get("added_cond_kwargs") or {}
    return {name: value for name, value in (told | inner).items() if isinstance(value, torch.Tensor)}


def unpacked(family, latents):
    """(b, c, h, w) of what a transformer takes as a sequence, by the pipeline's own means."""
    if latents.ndim == 4:
        return latents
    if hasattr(family.pipe, "_unpack_latents_with_ids"):
        empty = latents.new_zeros(len(latents), latents.shape[2], 4, 4)
        return family.pipe._unpack_latents_with_ids(latents, family.pipe._prepare_latent_ids(empty))
    return family.pipe._unpack_latents(latents, 16, 16, family.pipe.vae_scale_factor)


@torch.no_grad()
def test_what_is_learned_is_what_is_decoded(family):
    """Latents of an image, put where the pipeline ends, come out as the autoencoder's own image of them."""
    pipe, images = family.pipe, torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = Encoders(family).moments(images)
    latents = family.latents(moments, torch.zeros_like(moments[:, 0]))
    assert latents.shape[1:] == family.latent_shape(moments.shape[2:])
    seen = []
    decode = pipe.vae.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda given, **more: seen.append(given) or decode(given, **more))
        patch.setattr(pipe.scheduler, "step", lambda *given, **more: (packed(family, latents),))
        settings = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, **family.call_settings()}
        pipe(prompt=PROMPT, output_type="pt", **settings)
    torch.testing.assert_close(seen[0], moments[:, 0], rtol=1e-4, atol=1e-5)


def packed(family, latents):
    if not hasattr(family.pipe, "_pack_latents"):
        return latents
    if hasattr(family.pipe, "_unpack_latents_with_ids"):
        return family.pipe._pack_latents(latents)
    return family.pipe._pack_latents(latents, *latents.shape)


@torch.no_grad()
def test_texts_do_not_depend_on_their_neighbours_and_cut_ones_are_told(family, caplog):
    encoders = Encoders(family)
    both = encoders.texts([PROMPT, "a cat"])
    assert set(both) == set(family.text_names)
    for name, value in encoders.texts(["a cat"]).items():
        assert torch.equal(value[0], both[name][1])
    family.length = family.length and max(16, *family.token_counts(next(iter(family.lengths())), ["a cat"]))
    long = " ".join(["red"] * 40)
    cut = encoders.cut(["a cat", long])
    assert list(cut) == [1] and cut[1][0] > cut[1][1] >= 12
    caplog.clear()
    longer = encoders.texts([long, f"{long} dog"])
    assert not caplog.records
    assert all(torch.equal(*value) for name, value in longer.items() if name == "text")  # the end is not read


def test_names_of_pipelines():
    with pytest.raises(ValueError, match="a StableDiffusion3Pipline cannot be trained here; perhaps StableDiffusion3Pipeline"):
        family_of("StableDiffusion3Pipline", "base")
    with pytest.raises(ValueError, match="those that can are StableDiffusionPipeline, "):
        family_of("WanPipeline", "base")
