"""Weights of adapters by component and by block: which projection gets which weight, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

import loca_vision.diffusers
from loca_vision.pipeline.block_weights import block_strengths
from support.pipelines import picture, pixart, sd3, stable_diffusion, stable_diffusion_xl, text_encoder, unet, vae
from support.reference_weights import Made, adapter, assert_far, assert_near, assert_same, expected, facts

EVERY = ("q", "k", "v", "out")
Weights = Any


@pytest.fixture(scope="module")
def made() -> Made:
    return adapter(stable_diffusion(), {"unet": EVERY, "text_encoder": EVERY}, size=0.4)


@pytest.fixture(scope="module")
def other() -> Made:
    return adapter(stable_diffusion(), {"unet": ("q", "v"), "text_encoder": ("k",)}, seed=2, n=30, scale=1.5)


@pytest.fixture
def pipe(made: Made) -> Any:
    pipe = stable_diffusion()
    pipe.load_loca_weights(made.state(), "a")
    return pipe


def by_start(strengths: dict[str, float]) -> Callable[[str], float]:
    """The strength of the longest beginning of a projection's full name that is named, else 1."""

    def strength(name: str) -> float:
        return next((strengths[start] for start in sorted(strengths, key=len, reverse=True) if name.startswith(start)), 1.0)

    return strength


DOWN, MID, UP, TEXT = "unet.down_blocks.", "unet.mid_block.", "unet.up_blocks.", "text_encoder."

MEANINGS: dict[str, tuple[Weights, dict[str, float]]] = {
    "a number": (0.3, {"": 0.3}),
    "a whole number": (2, {"": 2.0}),
    "a negative one": (-0.5, {"": -0.5}),
    "nothing named": ({}, {}),
    "one component": ({"unet": 0.4}, {"unet.": 0.4}),
    "the other component": ({"text_encoder": 3.0}, {TEXT: 3.0}),
    "both": ({"unet": 0.4, "text_encoder": 0}, {"unet.": 0.4, TEXT: 0.0}),
    "None for a component": ({"unet": None, "text_encoder": 0.5}, {TEXT: 0.5}),
    "no block": ({"unet": {}}, {}),
    "down": ({"unet": {"down": 0.2}}, {DOWN: 0.2}),
    "mid": ({"unet": {"mid": 0.0}}, {MID: 0.0}),
    "mid in a list": ({"unet": {"mid": [0.5]}}, {MID: 0.5}),
    "up": ({"unet": {"up": 2.5}}, {UP: 2.5}),
    "all three": ({"unet": {"down": 0.2, "mid": 0.3, "up": 0.4}}, {DOWN: 0.2, MID: 0.3, UP: 0.4}),
    "one block": ({"unet": {"down": {"block_1": 0.1}}}, {f"{DOWN}1.": 0.1}),
    "both blocks": ({"unet": {"down": {"block_0": 0.9, "block_1": 0.1}}}, {f"{DOWN}0.": 0.9, f"{DOWN}1.": 0.1}),
    "a list for a block": (
        {"unet": {"up": {"block_0": [0.1, 0.9]}}},
        {f"{UP}0.attentions.0.": 0.1, f"{UP}0.attentions.1.": 0.9},
    ),
    "a list of one for a block": ({"unet": {"up": {"block_0": [0.6]}}}, {f"{UP}0.": 0.6}),
    "a tuple for a block": ({"unet": {"up": {"block_0": (0.6, 0)}}}, {f"{UP}0.": 0.6, f"{UP}0.attentions.1.": 0.0}),
    "everything at once": (
        {"unet": {"down": {"block_0": 0.3, "block_1": [0.4]}, "mid": 1.7, "up": {"block_0": [0, 2]}}, "text_encoder": 0.5},
        {f"{DOWN}0.": 0.3, f"{DOWN}1.": 0.4, MID: 1.7, f"{UP}0.attentions.0.": 0.0, f"{UP}0.attentions.1.": 2.0, TEXT: 0.5},
    ),
}


@pytest.mark.parametrize("case", MEANINGS)
def test_each_projection_acts_as_its_block_is_weighed(case: str, pipe: Any, made: Made) -> None:
    weights, strengths = MEANINGS[case]
    before = picture(pipe)
    pipe.set_loca_adapters("a", weights)
    assert pipe.get_active_loca_adapters() == ["a"]
    if strengths:
        assert_far(picture(pipe), before)
    assert_near(picture(pipe), expected((made, by_start(strengths))))
    pipe.set_loca_adapters(["a"], [weights])
    assert_near(picture(pipe), expected((made, by_start(strengths))))


def test_weighing_again_starts_anew(pipe: Any, made: Made) -> None:
    pipe.set_loca_adapters("a", {"unet": {"down": 0.2, "up": 0.0}, "text_encoder": 0.1})
    pipe.set_loca_adapters("a", {"unet": {"mid": 0.5}})
    assert_near(picture(pipe), expected((made, by_start({MID: 0.5}))))
    pipe.set_loca_adapters("a")
    assert_near(picture(pipe), expected((made, 1.0)))


def test_all_at_nothing_is_the_base(pipe: Any) -> None:
    pipe.set_loca_adapters("a", {"unet": {"down": 0, "mid": 0, "up": 0}, "text_encoder": 0})
    assert torch.equal(picture(pipe), picture(stable_diffusion()))


def test_several_adapters_have_each_its_own(pipe: Any, made: Made, other: Made) -> None:
    pipe.load_loca_weights(other.state(), "b")
    pipe.set_loca_adapters(["a", "b"], [{"unet": {"down": 0.5}}, {"unet": {"up": {"block_0": [2, 0.1]}}, "text_encoder": 0.3}])
    strengths = {UP: 2.0, f"{UP}0.attentions.1.": 0.1, TEXT: 0.3}
    assert_near(picture(pipe), expected((made, by_start({DOWN: 0.5})), (other, by_start(strengths))))
    pipe.set_loca_adapters(["b", "a"], [None, {"unet": {"mid": 4.0}}])
    assert_near(picture(pipe), expected((other, 1.0), (made, by_start({MID: 4.0}))))
    pipe.set_loca_adapters(["a", "b"], {"unet": {"mid": 0.5}})
    assert_near(picture(pipe), expected((made, by_start({MID: 0.5})), (other, by_start({MID: 0.5}))))


def test_they_last_and_are_multiplied_by_a_calls_strength(pipe: Any, made: Made) -> None:
    weights = {"unet": {"down": {"block_1": 0.5}, "up": 2.0}, "text_encoder": 0.5}
    strengths = {f"{DOWN}1.": 0.5, UP: 2.0, TEXT: 0.5}
    pipe.set_loca_adapters("a", weights)
    weights.clear()
    wanted = expected((made, by_start(strengths)))
    half = picture(pipe, cross_attention_kwargs={"scale": 0.5})
    assert_near(half, expected((made, lambda name: by_start(strengths)(name) / 2)))
    pipe.disable_loca()
    pipe.enable_loca()
    assert_near(picture(pipe), wanted)
    pipe.fuse_loca()
    assert_near(picture(pipe), wanted)
    pipe.unfuse_loca()
    assert_near(picture(pipe), wanted)
    pipe.fuse_loca(scale=0.5)
    assert_near(picture(pipe), half)


def test_the_base_is_restored_after_them(made: Made) -> None:
    pipe = stable_diffusion()
    before = facts(pipe)
    pipe.load_loca_weights(made.state(), "a")
    pipe.set_loca_adapters("a", {"unet": {"down": 0.5}})
    pipe.unload_loca_weights()
    assert_same(pipe, before)


MAPPINGS: list[dict[str, Any]] = [
    {"unet": {"down": 0.5, "mid": 0.25, "up": 2.0}},
    {"unet": {"mid": 0.25}},
    {"unet": {"down": {"block_0": 0.5}, "up": {"block_0": [0.1, 0.2]}}},
    {"unet": {"down": {"block_0": [0.5], "block_1": 0.7}, "mid": 0.1, "up": 0.3}, "text_encoder": 0.6},
    {"unet": 0.3, "text_encoder": 2},
]


@pytest.mark.parametrize("weights", MAPPINGS, ids=str)
def test_the_same_weights_mean_the_same_to_lora(weights: dict[str, Any], pipe: Any, made: Made) -> None:
    with_lora = stable_diffusion()
    with_lora.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "a")
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    with_lora.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), "a")
    with_lora.set_adapters("a", weights)
    scales: dict[str, float] = {}
    for component in ("unet", "text_encoder"):
        for path, layer in getattr(with_lora, component).named_modules():
            if hasattr(layer, "scaling"):
                part = path.rpartition("to_")[2].removesuffix(".0").removesuffix("_proj").rpartition(".")[2]
                owner = path.removesuffix(".0").rpartition(".")[0]
                scales[f"{component}.{owner}.{part}".replace("text_encoder.encoder", "text_encoder.text_model.encoder")] = (
                    layer.scaling["a"]
                )
    assert set(scales) == set(made.updates)
    pipe.set_loca_adapters("a", weights)
    assert_near(picture(pipe), expected((made, scales.__getitem__)))


# Other models


def test_blocks_are_numbered_as_the_model_has_them() -> None:
    """Also where the first has no attention, or has several of several layers."""

    def make() -> Any:
        pipe = stable_diffusion_xl()
        settings = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "cross_attention_dim": 40,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "transformer_layers_per_block": (1, 2),
            "projection_class_embeddings_input_dim": 64,
        }
        pipe.unet = unet(**settings)
        return pipe

    pipe, made = make(), adapter(make(), {"unet": EVERY, "text_encoder": ("q",), "text_encoder_2": ("v",)})
    pipe.load_loca_weights(made.state(), "a")
    weights = {"unet": {"down": {"block_1": [0.2, 0.3]}, "up": {"block_0": [0.4, 0.5, 0.6]}}, "text_encoder_2": 0.1}
    pipe.set_loca_adapters("a", weights)
    strengths = {f"{DOWN}1.attentions.{i}.": s for i, s in enumerate([0.2, 0.3])}
    strengths |= {f"{UP}0.attentions.{i}.": s for i, s in enumerate([0.4, 0.5, 0.6])} | {"text_encoder_2.": 0.1}
    assert_near(picture(pipe), expected((made, by_start(strengths)), make=make))
    with pytest.raises(ValueError, match=r"\['down'\]\['block_0'\]: the blocks with attention are block_1"):
        pipe.set_loca_adapters("a", {"unet": {"down": {"block_0": 0.5}}})
    assert_near(picture(pipe), expected((made, by_start(strengths)), make=make))


def test_ten_blocks_are_ten_blocks() -> None:
    """`block_1` is not the beginning of `block_10`."""

    class Attended(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attentions = torch.nn.ModuleList(torch.nn.Module() for _ in range(11))

    model = torch.nn.Module()
    model.down_blocks = torch.nn.ModuleList(Attended() for _ in range(11))
    model.up_blocks = torch.nn.ModuleList()
    names = [f"down_blocks.{i}.attentions.{j}.q" for i in (1, 10) for j in (1, 10)]
    weights = {"down": {"block_1": 0.5, "block_10": [0.0] * 10 + [7.0]}}
    assert block_strengths(model, weights, names, "w") == dict(zip(names, [0.5, 0.5, 0.0, 7.0], strict=True))
    weights = {"down": {"block_1": [0.0, 2.0] + [3.0] * 9}}
    assert block_strengths(model, weights, names, "w") == dict(zip(names, [2.0, 3.0, 1.0, 1.0], strict=True))


@pytest.mark.parametrize("model", [sd3, pixart, text_encoder, vae])
def test_a_model_without_such_blocks_takes_one_number(model: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="has no blocks; expected one number"):
        block_strengths(model(), {"down": 0.5}, ["transformer_blocks.0.attn.q"], "weights")
    assert block_strengths(model(), 0.5, ["transformer_blocks.0.attn.q"], "weights") == 0.5


def test_a_unet_without_a_middle() -> None:
    model = unet(mid_block_type=None)
    names = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.q"]
    with pytest.raises(ValueError, match=r"weights\['mid'\]: that block has no attention"):
        block_strengths(model, {"mid": 0.5}, names, "weights")
    assert block_strengths(model, {"down": 0.5}, names, "weights") == {names[0]: 0.5}


# What is refused

WRONG: dict[str, tuple[Weights, str]] = {
    "a text": ("0.5", r"='0\.5': expected a finite number"),
    "True": (True, "=True: expected a finite number"),
    "NaN": (math.nan, "=nan: expected a finite number"),
    "infinity": (-math.inf, "=-inf: expected a finite number"),
    "a complex number": (1j, "expected a finite number"),
    "a tensor of several": (torch.tensor([0.5, 0.5]), "expected a finite number"),
    "two for one": ([0.5, 0.5], "2 weights for 1 adapters"),
    "none for one": ([], "0 weights for 1 adapters"),
    "an unknown component": ({"transformer": 1.0}, "adapter 'a' is not in 'transformer'; it is in "),
    "a component without it": ({"vae": 1.0}, "adapter 'a' is not in 'vae'; it is in "),
    "the adapter's name": ({"a": 1.0}, "adapter 'a' is not in 'a'"),
    "blocks without a component": ({"down": 1.0}, "adapter 'a' is not in 'down'"),
    "a component that is a number": ({0: 1.0}, "adapter 'a' is not in 0"),
    "NaN for a component": ({"text_encoder": math.nan}, r"weights\['text_encoder'\]=nan: expected a finite number"),
    "blocks of a text encoder": ({"text_encoder": {"down": 0.5}}, r"weights\['text_encoder'\]=.* CLIPTextModel has no blocks"),
    "no blocks of a text encoder": ({"text_encoder": {}}, "CLIPTextModel has no blocks"),
    "a list for a component": ({"unet": [0.5, 0.5]}, r"weights\['unet'\]=\[0\.5, 0\.5\]: expected a finite number"),
    "an unknown side": (
        {"unet": {"middle": 0.5}},
        r"weights\['unet'\]\['middle'\]: the blocks of UNet2DConditionModel are 'down'",
    ),
    "a path": ({"unet": {"down_blocks.0": 0.5}}, r"the blocks of UNet2DConditionModel are 'down', 'mid' and 'up'"),
    "a block at the top": ({"unet": {"block_0": 0.5}}, r"\['block_0'\]: the blocks of UNet2DConditionModel are"),
    "a block there is not": (
        {"unet": {"down": {"block_7": 1}}},
        r"\['block_7'\]: the blocks with attention are block_0, block_1",
    ),
    "a block without attention": (
        {"unet": {"up": {"block_1": 1}}},
        r"\['up'\]\['block_1'\]: the blocks with attention are block_0$",
    ),
    "a negative block": ({"unet": {"down": {"block_-1": 1}}}, "the blocks with attention are"),
    "a block by number": ({"unet": {"down": {0: 1}}}, r"\['down'\]\[0\]: the blocks with attention are"),
    "a block with a zero": ({"unet": {"down": {"block_01": 1}}}, "the blocks with attention are"),
    "three for two attentions": (
        {"unet": {"up": {"block_0": [1, 2, 3]}}},
        r"\['block_0'\]=\[1, 2, 3\]: 3 weights for 2 attentions",
    ),
    "none for two attentions": ({"unet": {"up": {"block_0": []}}}, "0 weights for 2 attentions"),
    "two for one attention": ({"unet": {"down": {"block_0": [1, 2]}}}, "2 weights for 1 attentions"),
    "NaN for an attention": ({"unet": {"up": {"block_0": [1, math.nan]}}}, r"\['block_0'\]=nan: expected a finite number"),
    "None for an attention": ({"unet": {"up": {"block_0": [1, None]}}}, r"\['block_0'\]=None: expected a finite number"),
    "None for a block": ({"unet": {"up": {"block_0": None}}}, "expected a finite number"),
    "a text for a block": ({"unet": {"up": {"block_0": "11"}}}, "='11': expected a finite number"),
    "a mapping for a block": ({"unet": {"up": {"block_0": {"attentions": 1}}}}, "expected a finite number"),
    "two for the middle": ({"unet": {"mid": [1, 2]}}, r"\['mid'\]=\[1, 2\]: expected a finite number"),
    "a mapping for the middle": ({"unet": {"mid": {"block_0": 1}}}, r"\['mid'\]=.*: expected a finite number"),
    "a list for a side": ({"unet": {"down": [0.5, 0.5]}}, r"\['down'\]=\[0\.5, 0\.5\]: expected a finite number"),
    "True for a side": ({"unet": {"down": True}}, r"\['down'\]=True: expected a finite number"),
    "a wrong one after right ones": (
        {"text_encoder": 0.5, "unet": {"down": 0.5, "up": {"block_0": [0.5, "x"]}}},
        "='x': expected a finite number",
    ),
}


@pytest.fixture(scope="module")
def still(made: Made, other: Made) -> tuple[Any, dict[str, Any]]:
    """A pipeline that no test here may change, since all weights given to it are refused; and its facts."""
    pipe = stable_diffusion()
    pipe.load_loca_weights(made.state(), "a")
    pipe.load_loca_weights(other.state(), "b")
    pipe.set_loca_adapters(["b", "a"], [{"unet": {"down": 0.5}}, 0.25])
    pipe.disable_loca()
    return pipe, facts(pipe)


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_weight_is_refused_and_changes_nothing(case: str, still: tuple[Any, dict[str, Any]]) -> None:
    pipe, before = still
    weights, words = WRONG[case]
    with pytest.raises(ValueError, match=words) as caught:
        pipe.set_loca_adapters("a", weights)
    assert "weights" in str(caught.value) and str(caught.value).count("\n") == 0
    assert_same(pipe, before)
    if not isinstance(weights, list):
        with pytest.raises(ValueError, match=words):
            pipe.set_loca_adapters(["b", "a"], [0.5, weights])
        assert_same(pipe, before)


@pytest.mark.parametrize(
    ("names", "weights", "words"),
    [
        (["a", "b"], [1.0], "1 weights for 2 adapters"),
        (["a", "b"], [1.0, 1.0, 1.0], "3 weights for 2 adapters"),
        ([], [1.0], "1 weights for 0 adapters"),
        (["a", "a"], [1.0, 2.0], "an adapter is named twice"),
        (["a", "c"], None, "no adapter 'c' in the pipeline; it has 'a', 'b'"),
        ("ab", None, "no adapter 'ab' in the pipeline"),
        ([["a"]], None, r"no adapter \['a'\] in the pipeline"),
    ],
    ids=str,
)
def test_wrong_names_are_refused_and_change_nothing(
    names: Any, weights: Any, words: str, still: tuple[Any, dict[str, Any]]
) -> None:
    pipe, before = still
    with pytest.raises(ValueError, match=words):
        pipe.set_loca_adapters(names, weights)
    assert_same(pipe, before)


def test_weights_by_the_adapters_names_are_refused(pipe: Any) -> None:
    """Rather than taken for names alone, each at 1.0."""
    before = facts(pipe)
    with pytest.raises(ValueError, match="names="):
        pipe.set_loca_adapters({"a": 0.5})
    assert_same(pipe, before)


def test_what_was_refused_there_still_works(still: tuple[Any, dict[str, Any]], made: Made, other: Made) -> None:
    """That nothing was changed also means that what was set before is still set."""
    pipe, _ = still
    pipe.enable_loca()
    try:
        assert_near(picture(pipe), expected((other, by_start({DOWN: 0.5})), (made, 0.25)))
    finally:
        pipe.disable_loca()


def test_functions_take_the_same_weights(pipe: Any, made: Made) -> None:
    loca_vision.diffusers.set_loca_adapters(pipe, ["a"], [{"unet": {"mid": 0.5}}])
    assert_near(picture(pipe), expected((made, by_start({MID: 0.5}))))
