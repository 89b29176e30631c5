"""`pipe(prompts, loca_adapters=[...])`: every prompt as in a call of its own, in every component."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import loca_vision.diffusers  # noqa: F401  which adds the methods
from loca_vision import FourierFTConfig, LoCAConfig, LoRAConfig, inject
from loca_vision.pipeline.per_prompt import per_prompt
from support import pipelines
from support.mixed import as_mapping, stir

CONFIGS = {
    "ink": LoCAConfig(n_components=12, targets=("q", "v", "out", "fc1")),
    "oil": LoRAConfig(r=2),
    "wax": FourierFTConfig(n_components=12),
}
PROMPTS = ["a cat", "a red dog", "make it cartoon"]
ENTRIES: list[Any] = ["ink", None, {"oil": 1.5, "wax": -0.5}]


def adapted(pipe: Any, *components: str) -> Any:
    for component in components:
        for name, config in CONFIGS.items():
            inject(getattr(pipe, component), config, name)
            stir(getattr(pipe, component), name)
    return pipe.to(torch.float64)


def draw(pipe: Any, prompts: Any, latents: Tensor, **settings: Any) -> Tensor:
    given = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.5} | settings
    result: Tensor = pipe(prompts, latents=latents, **given).images
    return result


def one_by_one(pipe: Any, latents: Tensor, images: int = 1, **settings: Any) -> Tensor:
    found = []
    for index, entry in enumerate(ENTRIES):
        own = as_mapping(entry)
        pipe.set_loca_adapters(list(own), list(own.values()))
        mine = {key: value[index : index + 1] if key == "image" else value for key, value in settings.items()}
        found.append(draw(pipe, PROMPTS[index], latents[index * images : (index + 1) * images], **mine))
    return torch.cat(found)


def latents(images: int = 1) -> Tensor:
    return torch.randn(len(PROMPTS) * images, 4, 8, 8, dtype=torch.float64)


CASES: dict[str, tuple[Callable[[], Any], tuple[str, ...], dict[str, Any]]] = {
    "no guidance": (pipelines.stable_diffusion, ("unet", "text_encoder"), {"guidance_scale": 1.0}),
    "two branches": (pipelines.stable_diffusion, ("unet", "text_encoder"), {}),
    "two images a prompt": (pipelines.stable_diffusion, ("unet", "text_encoder"), {"num_images_per_prompt": 2}),
    "a scale": (pipelines.stable_diffusion, ("unet",), {"cross_attention_kwargs": {"scale": 0.5}}),
    "three branches": (pipelines.instruct_pix2pix, ("unet", "text_encoder"), {"image": None}),
    "two text encoders": (
        pipelines.stable_diffusion_xl,
        ("unet", "text_encoder", "text_encoder_2"),
        {"num_images_per_prompt": 2, "height": 16, "width": 16},
    ),
}


@pytest.mark.filterwarnings("ignore")  # of diffusers, about float64
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("low_memory", [False, True])
def test_every_prompt_is_drawn_as_alone(case: str, low_memory: bool) -> None:
    make, components, settings = CASES[case]
    pipe, settings = adapted(make(), *components), dict(settings)
    if "image" in settings:
        settings["image"] = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    images = settings.get("num_images_per_prompt", 1)
    noise = latents(images)
    wanted = one_by_one(pipe, noise, images, **settings)
    pipe.set_loca_adapters("ink")
    if low_memory:
        pipe.enable_loca_low_memory()
    found = draw(pipe, PROMPTS, noise, loca_adapters=ENTRIES, **settings)
    usual = draw(pipe, PROMPTS, noise, **settings)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max() < 1e-1 * (usual - wanted).abs().max()


@pytest.mark.filterwarnings("ignore")
def test_fused_projections_and_embeddings_in_the_place_of_prompts() -> None:
    pipe, noise = adapted(pipelines.stable_diffusion(), "unet"), latents()
    embeddings = torch.randn(3, 12, 24, dtype=torch.float64)
    settings = {"prompt_embeds": embeddings, "guidance_scale": 1.0}
    wanted = draw(pipe, None, noise, loca_adapters=ENTRIES, **settings)
    pipe.unet.fuse_qkv_projections()
    torch.testing.assert_close(draw(pipe, None, noise, loca_adapters=ENTRIES, **settings), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="loca_adapters has 3 entries for 2 prompts"):
        draw(pipe, None, noise[:2], loca_adapters=ENTRIES, prompt_embeds=embeddings[:2])


@pytest.mark.parametrize(("given", "count"), [({"class_labels": [1, 2, 3, 4]}, 4), ({"batch_size": 4}, 4)])
def test_classes_and_pictures_of_nothing_are_counted_as_prompts(given: dict[str, Any], count: int) -> None:
    pipe = adapted(pipelines.stable_diffusion(), "unet")
    signature = inspect.Signature()
    with (
        pytest.raises(ValueError, match=f"loca_adapters has 2 entries for {count} prompts"),
        per_prompt(pipe, ["ink", None], given, signature),
    ):
        pytest.fail("entered")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_unet_follows_and_compiles_nothing_anew() -> None:
    pipe, noise = adapted(pipelines.small(pipelines.stable_diffusion()), "unet"), latents()
    wanted = [draw(pipe, PROMPTS, noise, loca_adapters=own) for own in (ENTRIES, ENTRIES[::-1])]
    own: Any = pipe.unet
    torch._dynamo.reset()
    pipe.unet = torch.compile(own, backend="eager", fullgraph=True)
    with torch.compiler.set_stance("default"):
        first = draw(pipe, PROMPTS, noise, loca_adapters=ENTRIES)
        torch.testing.assert_close(first, wanted[0], atol=1e-5, rtol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(draw(pipe, PROMPTS, noise, loca_adapters=ENTRIES[::-1]), wanted[1], atol=1e-5, rtol=1e-5)


BAD: list[tuple[Any, Any, type[Exception], str]] = [
    (PROMPTS, ["ink"] * 2, ValueError, "loca_adapters has 2 entries for 3 prompts"),
    ("a cat", ["ink"] * 2, ValueError, "loca_adapters has 2 entries for 1 prompt"),
    (
        PROMPTS,
        ["inq", None, None],
        ValueError,
        "loca_adapters: no adapter 'inq' in the pipeline; it has 'ink', 'oil', 'wax'; perhaps",
    ),
    (PROMPTS, "ink", TypeError, "loca_adapters is a str: expected a list with one entry for each prompt"),
    (PROMPTS, [3, None, None], TypeError, r"loca_adapters\[0\]=3: expected the name of an adapter"),
]


@pytest.mark.parametrize(("prompts", "entries", "error", "sentence"), BAD)
def test_bad_entries_are_refused(prompts: Any, entries: Any, error: type[Exception], sentence: str) -> None:
    pipe = pipelines.stable_diffusion()
    for name, config in CONFIGS.items():
        inject(pipe.unet, config, name)
    with pytest.raises(error, match=sentence):
        draw(pipe, prompts, latents().float(), loca_adapters=entries)


def test_a_fused_adapter_is_refused() -> None:
    pipe = pipelines.stable_diffusion()
    for name, config in CONFIGS.items():
        inject(pipe.unet, config, name)
    pipe.fuse_loca(adapter_names=["ink"])
    with pytest.raises(ValueError, match="adapter 'ink' is fused into the weights; call unfuse_loca first"):
        draw(pipe, PROMPTS, latents().float(), loca_adapters=["oil", None, None])
