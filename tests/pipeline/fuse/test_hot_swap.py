"""Hot swapping of adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import Tensor

from loca_vision import LoCAConfig, adapters, inject
from loca_vision.pipeline import load as loading
from support.fusing import BOTH, CONV_IN, UNET, Failing
from support.pipelines import picture, quiet, stable_diffusion
from support.reference_weights import (
    FILE_NAME,
    Made,
    adapter,
    assert_far,
    assert_near,
    assert_same,
    expected,
    facts,
    listed,
    models,
)

TEXT = {"text_encoder": ("q", "v")}


def with_room(room: int, made: Made, name: str = "a") -> Any:
    pipe = stable_diffusion()
    pipe.enable_loca_hotswap(room)
    pipe.load_loca_weights(made.state(), name)
    return pipe


def learned(pipe: Any) -> dict[str, int]:
    """The tensors of all spectra, by name."""
    return {
        key: id(value)
        for c, model in models(pipe).items()
        for key, value in ((f"{c}.{key}", p) for key, p in model.named_parameters())
        if key.endswith(("coefficients", "locations"))
    }


def test_another_adapter_takes_the_place(pipe: Any, a: Made) -> None:
    objects, classes = learned(pipe), facts(pipe)["classes"]
    for seed, scale in ((3, 2.0), (4, -0.5), (5, 7.0)):
        other = adapter(stable_diffusion(), BOTH, seed=seed, scale=scale, size=1 / abs(scale))
        before = picture(pipe)
        pipe.load_loca_weights(other.state(), "a", hotswap=True)
        assert learned(pipe) == objects and facts(pipe)["classes"] == classes
        assert pipe.get_loca_adapters() == listed(BOTH, "a") and pipe.get_active_loca_adapters() == ["a"]
        assert_far(picture(pipe), before)
        assert_near(picture(pipe), expected((other, 1.0)))
    pipe.load_loca_weights(a.state(), hotswap=True)
    assert_near(picture(pipe), expected((a, 1.0)))


def test_it_acts_as_strongly_as_the_one_before(two: Any, a: Made, b: Made) -> None:
    other = adapter(stable_diffusion(), BOTH, seed=3)
    two.load_loca_weights(other.state(), "a", hotswap=True)
    assert_near(picture(two), expected((other, 0.5), (b, 0.25)))
    two.set_loca_adapters("b")
    two.load_loca_weights(a.state(), "a", hotswap=True)
    assert two.get_active_loca_adapters() == ["b"]
    assert_near(picture(two), expected((b, 1.0)))
    two.set_loca_adapters("a", {"unet": {"down": 0.5}})
    two.load_loca_weights(other.state(), "a", hotswap=True)
    assert_near(picture(two), expected((other, lambda name: 0.5 if name.startswith("unet.down_blocks.") else 1.0)))
    two.disable_loca()
    two.load_loca_weights(a.state(), "a", hotswap=True)
    assert torch.equal(picture(two), picture(stable_diffusion()))


@pytest.mark.parametrize("count", [1, 5, 12])
def test_fewer_components_fit_without_room_made(count: int, pipe: Any) -> None:
    other = adapter(stable_diffusion(), BOTH, seed=3, n=count, size=3.0)
    pipe.load_loca_weights(other.state(), "a", hotswap=True)
    assert_near(picture(pipe), expected((other, 1.0)))


def test_more_components_need_room(pipe: Any) -> None:
    before, last = facts(pipe), "text_encoder.text_model.encoder.layers.1.self_attn.out"
    for made in (
        adapter(stable_diffusion(), BOTH, n=13),
        adapter(
            stable_diffusion(),
            BOTH,
            n=lambda name: 13 if name == last else 12,
        ),
    ):
        words = (
            r"\.\w+ has 13 components and the adapter that it should replace has room for 12; "
            "call enable_loca_hotswap before the first"
        )
        with pytest.raises(ValueError, match=words):
            pipe.load_loca_weights(made.state(), "a", hotswap=True)
        assert_same(pipe, before)


def test_with_room_any_count_up_to_it_fits(a: Made) -> None:
    pipe = with_room(40, a)
    assert_near(picture(pipe), expected((a, 1.0)))
    for count in (40, 1, 23):
        other = adapter(stable_diffusion(), BOTH, seed=count, n=count, size=0.5)
        pipe.load_loca_weights(other.state(), "a", hotswap=True)
        assert_near(picture(pipe), expected((other, 1.0)))
    before = facts(pipe)
    with pytest.raises(ValueError, match="has 41 components and the adapter that it should replace has room for 40"):
        pipe.load_loca_weights(adapter(stable_diffusion(), BOTH, n=41).state(), "a", hotswap=True)
    with pytest.raises(ValueError, match="has 41 components: there is room for 40"):
        pipe.load_loca_weights(adapter(stable_diffusion(), BOTH, n=41).state(), "b")
    assert_same(pipe, before)


def test_room_changes_neither_file_nor_base(a: Made, tmp_path: Path) -> None:
    pipe = stable_diffusion()
    before = facts(pipe)
    pipe.enable_loca_hotswap(99)
    pipe.load_loca_weights(a.state(), "a")
    tensors = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path))
    assert set(tensors) == set(a.tensors)
    assert all(torch.equal(tensors[key], value) for key, value in a.tensors.items())
    pipe.fuse_loca()
    assert_near(picture(pipe), expected((a, 1.0)))
    pipe.unload_loca_weights()
    assert_same(pipe, before)


@pytest.mark.parametrize("room", [0, -1, True, 1.5, "5", None])
def test_room_is_a_whole_number(room: Any, a: Made) -> None:
    pipe = stable_diffusion()
    with pytest.raises(ValueError, match=r"max_components=.*: expected a whole number from 1 up"):
        pipe.enable_loca_hotswap(room)
    pipe.load_loca_weights(a.state())


def test_room_is_made_before_the_first(pipe: Any) -> None:
    before = facts(pipe)
    with pytest.raises(ValueError, match="call enable_loca_hotswap before the first"):
        pipe.enable_loca_hotswap(30)
    with pytest.raises(ValueError, match="has room for 12"):
        pipe.load_loca_weights(adapter(stable_diffusion(), BOTH, n=20).state(), "a", hotswap=True)
    assert_same(pipe, before)


@pytest.mark.parametrize("name", ["c", None, "", 7])
def test_the_name_to_replace_must_be_one_there(name: Any, two: Any, a: Made) -> None:
    before = facts(two)
    with pytest.raises(ValueError, match=r"adapter_name=.*: hotswap replaces a loaded adapter; there is a, b"):
        two.load_loca_weights(a.state(), name, hotswap=True)
    assert_same(two, before)
    empty = stable_diffusion()
    with pytest.raises(ValueError, match="hotswap replaces a loaded adapter; there is none"):
        empty.load_loca_weights(a.state(), name, hotswap=True)


def test_another_component_is_refused(a: Made) -> None:
    pipe = stable_diffusion()
    pipe.load_loca_weights(adapter(stable_diffusion(), UNET, seed=3).state(), "a")
    before = facts(pipe)
    for made in (a, adapter(stable_diffusion(), TEXT)):
        with pytest.raises(ValueError, match="no adapter"):
            pipe.load_loca_weights(made.state(), "a", hotswap=True)
        assert_same(pipe, before)
    inject(pipe.text_encoder, LoCAConfig(n_components=12), "b")
    before = facts(pipe)
    with pytest.raises(ValueError, match="no adapter 'a'"):
        pipe.load_loca_weights(a.state(), "a", hotswap=True)
    assert_same(pipe, before)


def test_another_projection_is_refused(pipe: Any, b: Made) -> None:
    before = facts(pipe)
    for parts in ({"unet": ("q", "k", "v")}, {"unet": ("q", "v"), "text_encoder": ("q", "v")}, {"unet": ("out",)}):
        words = r"\.(k|v|out) is not among the projections of adapter 'a'"
        with pytest.raises(ValueError, match=words):
            pipe.load_loca_weights(adapter(stable_diffusion(), parts, n=3).state(), "a", hotswap=True)
        assert_same(pipe, before)


def test_a_hostile_file_is_not_swapped_in(pipe: Any, a: Made, tmp_path: Path) -> None:
    before = facts(pipe)
    key = next(key for key in a.tensors if key.startswith("text_encoder.") and key.endswith("coefficients"))
    for made in (a.with_tensors(**{key: a.tensors[key] * math.nan}), a.with_tensors(**{key: None}), a.but(format_version=2)):
        with pytest.raises(ValueError, match=FILE_NAME):
            pipe.load_loca_weights(made.write(tmp_path), "a", hotswap=True)
        assert_same(pipe, before)


def test_a_swap_that_fails_half_way_changes_nothing(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = facts(pipe)
    other = adapter(stable_diffusion(), BOTH, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "swap", Failing(loading.swap, 2))
        with pytest.raises(RuntimeError, match="no memory left"):
            pipe.load_loca_weights(other.state(), "a", hotswap=True)
    assert_same(pipe, before)


def test_what_is_fused_is_not_swapped(pipe: Any, a: Made) -> None:
    pipe.fuse_loca()
    before = facts(pipe)
    with pytest.raises(ValueError, match="adapter 'a' is fused into the weights"):
        pipe.load_loca_weights(a.state(), "a", hotswap=True)
    assert_same(pipe, before)


NARROW: list[dict[str, Any]] = [
    UNET,
    {"unet": ("q",)},
    {"unet": ("v",), "text_encoder": ("out",)},
    {"text_encoder": ("q",)},
]


@pytest.mark.parametrize("parts", NARROW, ids=str)
def test_projections_and_components_that_are_left_rest(
    parts: dict[str, Any], pipe: Any, a: Made, base: Tensor, tmp_path: Path
) -> None:
    narrow = adapter(stable_diffusion(), parts, seed=3, n=7, scale=0.5, size=4.0)
    pipe.load_loca_weights(narrow.state(), "a", hotswap=True)
    shown = picture(pipe)
    assert_far(shown, base)
    assert_near(shown, expected((narrow, 1.0)))
    tensors = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path))
    assert set(tensors) == set(narrow.tensors)
    assert all(torch.equal(tensors[key], value) for key, value in narrow.tensors.items())
    other = stable_diffusion()
    other.load_loca_weights(tmp_path)
    assert_near(picture(other), shown, 1e-6)
    pipe.load_loca_weights(a.state(), "a", hotswap=True)
    assert_near(picture(pipe), expected((a, 1.0)))
    tensors = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path))
    assert all(torch.equal(tensors[key], value) for key, value in a.tensors.items())


def test_whole_tensors_are_swapped_too(a: Made) -> None:
    pipe = stable_diffusion()
    before = facts(pipe)
    pipe.load_loca_weights(a.state(), "a")
    whole = [adapter(stable_diffusion(), BOTH, seed=seed, whole=CONV_IN) for seed in (3, 4)]
    for made in (*whole, a, whole[0]):
        pipe.load_loca_weights(made.state(), "a", hotswap=True)
        assert_near(picture(pipe), expected((made, 1.0)))
        wanted = made.whole.get("unet.conv_in.weight", before["tensors"]["unet.conv_in.weight"])
        assert torch.equal(pipe.unet.conv_in.weight, wanted)
        pipe.disable_loca()
        assert torch.equal(picture(pipe), before["picture"])
        pipe.enable_loca()
        assert torch.equal(pipe.unet.conv_in.weight, wanted)
    pipe.unload_loca_weights()
    assert_same(pipe, before)


def test_whole_tensors_of_an_inactive_adapter_wait(two: Any, b: Made) -> None:
    two.set_loca_adapters("b")
    made = adapter(stable_diffusion(), BOTH, seed=3, whole=CONV_IN)
    two.load_loca_weights(made.state(), "a", hotswap=True)
    assert_near(picture(two), expected((b, 1.0)))
    two.set_loca_adapters("a")
    assert_near(picture(two), expected((made, 1.0)))


def test_swapping_with_less_memory(a: Made) -> None:
    pipe = stable_diffusion()
    pipe.enable_loca_low_memory()
    pipe.enable_loca_hotswap(30)
    pipe.load_loca_weights(a.state(), "a")
    other = adapter(stable_diffusion(), BOTH, seed=3, n=30, size=0.5)
    pipe.load_loca_weights(other.state(), "a", hotswap=True)
    assert_near(picture(pipe), expected((other, 1.0)))


def test_another_pipeline_of_the_components_can_swap(pipe: Any) -> None:
    other = adapter(stable_diffusion(), BOTH, seed=3)
    quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe)).load_loca_weights(other.state(), "a", hotswap=True)
    assert_near(picture(pipe), expected((other, 1.0)))


def test_nothing_is_compiled_anew(a: Made) -> None:
    pipe = with_room(30, a)
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)
    assert_near(picture(pipe), expected((a, 1.0)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (30, 3, 17):
            other = adapter(stable_diffusion(), BOTH, seed=count, n=count, scale=count / 10, size=0.5)
            pipe.load_loca_weights(other.state(), "a", hotswap=True)
            assert_near(picture(pipe), expected((other, 1.0)))
        pipe.set_loca_adapters("a", {"unet": {"down": 0.5}})
        assert_near(picture(pipe), expected((other, lambda name: 0.5 if name.startswith("unet.down_blocks.") else 1.0)))
        pipe.set_loca_adapters("a")
        pipe.load_loca_weights(adapter(stable_diffusion(), UNET, seed=5).state(), "a", hotswap=True)
        assert_near(picture(pipe), expected((adapter(stable_diffusion(), UNET, seed=5), 1.0)))
        pipe.disable_loca()
        assert_near(picture(pipe), picture(stable_diffusion()))
        pipe.enable_loca()
        pipe.load_loca_weights(a.state(), "a", hotswap=True)
        pipe.fuse_loca()
        assert_near(picture(pipe), expected((a, 1.0)))
        pipe.unfuse_loca()
        assert_near(picture(pipe), expected((a, 1.0)))


def test_an_injected_adapter_is_replaced(base: Tensor) -> None:
    pipe = stable_diffusion()
    inject(pipe.unet, LoCAConfig(n_components=12, targets=("q", "v")), "mine")
    other = adapter(stable_diffusion(), UNET, seed=3)
    pipe.load_loca_weights(other.state(), hotswap=True)
    assert pipe.get_loca_adapters() == {"unet": ["mine"]}
    assert_near(picture(pipe), expected((other, 1.0)))
    spectrum = next(iter(adapters(pipe.unet, "mine").values()))
    assert spectrum.count == 12
