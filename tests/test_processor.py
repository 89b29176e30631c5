"""LoCA as an attention processor: it wraps any other, and says the same as the weights with the updates in them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from oracle import adapter, assert_far, assert_near, layers, write_updates
from tiny import flux, output_of, picture, pixart, sd3, stable_diffusion, unet, xl_unet
from torch import Tensor, nn

import loca_vision.diffusers
from loca_vision import LoCAConfig, adapters, inject, remove
from loca_vision.diffusers import LoCAAttnProcessor
from loca_vision.methods.spectrum import Spectrum, random_spectrum

CONFIG = LoCAConfig(n_components=12, scale=2.0, targets=("q", "k", "v", "out"))
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"


class Biased(AttnProcessor):
    """Somebody's own, with arguments of its own."""

    heard: list[dict[str, Any]]

    def __init__(self, bias: float = 0.5) -> None:
        super().__init__()
        self.bias = bias
        self.heard = []

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        strength: float = 1.0,
        mask: Any = None,
    ) -> Tensor:
        self.heard.append({"strength": strength, "mask": mask})
        result: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return result + self.bias * strength


def wrap(model: nn.Module, config: LoCAConfig = CONFIG, processor: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Set a LoCA processor in every attention layer, and return them by the path of the layer."""
    made = {
        path.removesuffix(".processor"): LoCAAttnProcessor.of(
            model.get_submodule(path.removesuffix(".processor")),
            config,
            processor() if processor else None,
            name=path.removesuffix(".processor"),
        )
        for path in model.attn_processors  # type: ignore[union-attr]
    }
    model.set_attn_processor({f"{path}.processor": each for path, each in made.items()})  # type: ignore[operator]
    return made


@torch.no_grad()
def scatter(made: dict[str, Any], size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(3)
    for processor in made.values():
        for spectrum in processor.spectra.values():
            spectrum.coefficients.copy_(torch.randn(spectrum.coefficients.shape, generator=generator) * size)


@torch.no_grad()
def with_updates(model: nn.Module, made: dict[str, Any], strength: float = 1.0) -> nn.Module:
    """W + the updates of the processors, in the weights of another such model."""
    for path, processor in made.items():
        attention: Any = model.get_submodule(path)
        for part, spectrum in processor.spectra.items():
            layer = getattr(attention, {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out"}[part])
            layer = layer[0] if part == "out" else layer
            rows, cols = layer.weight.shape
            dense = torch.zeros(rows, cols, dtype=torch.float64)
            cells = spectrum.cells
            dense.index_put_((cells[:, 0], cells[:, 1]), spectrum.coefficients.double(), accumulate=True)
            layer.weight += strength * spectrum.scale * (basis(rows).T @ dense @ basis(cols)).float()
    return model


def basis(size: int) -> Tensor:
    """The orthonormal cosine transform, row by row."""
    steps = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(torch.pi * steps[:, None] * (2 * steps + 1) / (2 * size)) * (2 / size) ** 0.5
    rows[0] /= 2**0.5
    return rows


# What it says


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0, Biased])
def test_any_processor_may_be_wrapped(processor: Callable[[], Any]) -> None:
    model, plain = unet(), unet()
    plain.set_attn_processor(processor())
    base = output_of(plain)
    made = wrap(model, processor=processor)
    assert torch.equal(output_of(model), base), "zero coefficients change nothing"
    scatter(made)
    assert_far(output_of(model), base)
    assert_near(output_of(model), output_of(with_updates(plain, made)))


@pytest.mark.parametrize("after", [False, True], ids=["wrapped when stacked", "stacked when wrapped"])
def test_stacked_projections_are_adapted_too(after: bool) -> None:
    model, plain = unet(), unet()
    if after:
        made = wrap(model, processor=FusedAttnProcessor2_0)
        for module in model.modules():
            if hasattr(module, "fuse_projections"):
                module.fuse_projections(fuse=True)
    else:
        model.fuse_qkv_projections()
        made = wrap(model)
        assert all(isinstance(each.processor, FusedAttnProcessor2_0) for each in made.values())
    assert_near(output_of(model), output_of(plain))
    scatter(made)
    assert_far(output_of(model), output_of(plain))
    assert_near(output_of(model), output_of(with_updates(plain, made)))


@pytest.mark.parametrize("targets", [("q",), ("v", "k"), ("out",)])
def test_only_the_targets_are_adapted(targets: tuple[str, ...]) -> None:
    model = unet()
    made = wrap(model, LoCAConfig(n_components=5, scale=-3.0, targets=targets))
    assert all(set(each.spectra) == set(targets) for each in made.values())
    scatter(made)
    assert_near(output_of(model), output_of(with_updates(unet(), made)))


def test_one_layer_alone() -> None:
    model = unet()
    attention = model.get_submodule(ATTENTION)
    attention.set_processor(LoCAAttnProcessor.of(attention, CONFIG))
    made = {ATTENTION: attention.processor}
    scatter(made)
    assert_far(output_of(model), output_of(unet()))
    assert_near(output_of(model), output_of(with_updates(unet(), made)))


def test_spectra_of_ones_own() -> None:
    model = unet()
    attention = model.get_submodule(ATTENTION)
    spectrum = Spectrum((32, 24), torch.tensor([3.0, -2.0]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), scale=0.5)
    processor = LoCAAttnProcessor(attention.processor, {"k": spectrum})
    attention.set_processor(processor)
    assert processor.spectra == {"k": spectrum}
    assert_near(output_of(model), output_of(with_updates(unet(), {ATTENTION: processor})))


def test_the_scale_multiplies_the_updates() -> None:
    model = unet()
    made = wrap(model)
    scatter(made)
    for scale in (0.5, -1.0, 0.0, 1.0):
        for processor in made.values():
            processor.scale = scale
        assert_near(output_of(model), output_of(with_updates(unet(), made, scale)))
    quarter = LoCAAttnProcessor(AttnProcessor2_0(), made[ATTENTION].spectra, 0.25)
    assert quarter.scale == 0.25


def test_another_model_of_larger_blocks() -> None:
    model = xl_unet()
    made = wrap(model)
    scatter(made, 0.5)
    assert_far(output_of(model), output_of(xl_unet()))
    assert_near(output_of(model), output_of(with_updates(xl_unet(), made)))


@pytest.mark.parametrize("build", [sd3, flux, pixart])
def test_the_processors_of_transformers_may_be_wrapped(build: Callable[[], Any]) -> None:
    """Those of joint attention have projections of the text besides; `inject` is the oracle."""
    model, injected = build(), build()
    base = output_of(model)
    made = wrap(model)
    assert torch.equal(output_of(model), base)
    assert ("add_q" in {part for each in made.values() for part in each.spectra}) is (build is not pixart)
    scatter(made)
    inject(injected, CONFIG)
    for name, spectrum in adapters(injected).items():
        path, _, part = name.rpartition(".")
        spectrum.load_state_dict(made[path].spectra[part].state_dict())
    assert_far(output_of(model), base)
    assert_near(output_of(model), output_of(injected))


def test_a_whole_pipeline() -> None:
    pipe, plain = stable_diffusion(), stable_diffusion()
    base = picture(plain)
    made = wrap(pipe.unet)
    assert torch.equal(picture(pipe), base)
    scatter(made)
    with_updates(plain.unet, made)
    assert_near(picture(pipe), picture(plain))
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(picture(pipe), base)


def test_half_precision_keeps_spectra_exact() -> None:
    model = unet().to(torch.bfloat16)
    made = wrap(model)
    scatter(made)
    full = {name: p.clone() for name, p in model.named_parameters() if "processor" in name}
    model.to(torch.float16).to(torch.bfloat16)
    after = dict(model.named_parameters())
    assert full and all(after[name].dtype == torch.float32 and torch.equal(after[name], p) for name, p in full.items())


# Arguments


def test_arguments_reach_the_inner_processor() -> None:
    model, plain = unet(), unet()
    inner = Biased()
    plain.set_attn_processor(Biased())
    made = wrap(model, processor=lambda: inner)
    given = {"strength": 0.25, "mask": object()}
    found = output_of(model, cross_attention_kwargs=dict(given))
    assert len(inner.heard) == len(made) and all(heard == given for heard in inner.heard)
    assert torch.equal(found, output_of(plain, cross_attention_kwargs=dict(given)))
    assert_far(found, output_of(model))


def test_arguments_it_does_not_know_are_dropped_as_for_the_inner_one(caplog: pytest.LogCaptureFixture) -> None:
    """diffusers warns of them and leaves them out; wrapping makes no difference."""
    import diffusers

    diffusers.logging.enable_propagation()
    try:
        messages = []
        for model in (unet(), unet()):
            inner = Biased()
            model.set_attn_processor(inner)
            if messages:
                wrap(model)
            caplog.clear()
            output_of(model, cross_attention_kwargs={"strength": 0.5, "unheard_of": 1})
            assert inner.heard[0]["strength"] == 0.5
            messages.append([record.getMessage().split(" Biased")[0].split(" LoCA")[0] for record in caplog.records])
    finally:
        diffusers.logging.disable_propagation()
    assert messages[0] and messages[0] == messages[1]
    assert all("unheard_of" in message for message in messages[1])


def test_the_processor_alone_can_be_called() -> None:
    attention = unet().get_submodule(ATTENTION)
    processor = LoCAAttnProcessor.of(attention, CONFIG, Biased(0.0))
    scatter({ATTENTION: processor})
    states, text = torch.randn(2, 9, 32), torch.randn(2, 6, 24)
    attention.set_processor(processor)
    with torch.no_grad():
        by_layer = attention(states, encoder_hidden_states=text, strength=2.0)
        by_itself = processor(attention, states, text, strength=2.0)
    assert torch.equal(by_layer, by_itself)


class Writing(AttnProcessor2_0):
    """Keeps something on the layer it is called with, as some do."""

    def __call__(self, attn: Any, *args: Any, **named: Any) -> Any:
        attn.calls = getattr(attn, "calls", 0) + 1
        assert isinstance(attn.to_q.weight, Tensor) and attn.heads and attn.to_out[1] is not None
        assert attn.to_q.in_features and attn.to_out[0].out_features
        return super().__call__(attn, *args, **named)


def test_what_the_processor_sees_is_the_layer_in_all_else() -> None:
    model = unet()
    made = wrap(model, processor=Writing)
    output_of(model)
    assert all(model.get_submodule(path).calls == 1 for path in made)


def test_a_processor_that_reads_weights_reads_adapted_ones() -> None:
    seen: dict[str, Tensor] = {}

    class Reading(AttnProcessor2_0):
        def __call__(self, attn: Any, *args: Any, **named: Any) -> Any:
            seen["q"], seen["out"] = attn.to_q.weight.clone(), attn.to_out[0].weight.clone()
            return super().__call__(attn, *args, **named)

    model = unet()
    attention = model.get_submodule(ATTENTION)
    attention.set_processor(LoCAAttnProcessor.of(attention, CONFIG, Reading()))
    made = {ATTENTION: attention.processor}
    scatter(made)
    output_of(model)
    wanted: Any = with_updates(unet(), made).get_submodule(ATTENTION)
    assert_near(seen["q"], wanted.to_q.weight.detach())
    assert_near(seen["out"], wanted.to_out[0].weight.detach())
    assert torch.equal(attention.to_q.weight, unet().get_submodule(ATTENTION).to_q.weight)


# Learning


def test_gradients_reach_the_spectra() -> None:
    model, oracle = unet(), unet()
    model.requires_grad_(False)
    made = wrap(model)
    scatter(made, 0.3)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 24)
    model(sample, 3, text).sample.square().mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if name.endswith(("coefficients", "locations"))}
    with_updates(oracle, made)
    oracle(sample, 3, text).sample.square().mean().backward()
    for path, processor in made.items():
        attention: Any = oracle.get_submodule(path)
        for part, spectrum in processor.spectra.items():
            layer = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")
            rows, cols = layer.weight.shape
            spectral = basis(rows) @ layer.weight.grad.double() @ basis(cols).T
            wanted = spectrum.scale * spectral[spectrum.cells[:, 0], spectrum.cells[:, 1]]
            assert_near(spectrum.coefficients.grad.double(), wanted, 1e-6)
    assert max(float(s.coefficients.grad.abs().max()) for each in made.values() for s in each.spectra.values()) > 1e-4


def test_it_learns() -> None:
    model = unet()
    model.requires_grad_(False)
    wrap(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("coefficients"))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    sample, text, target = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 24), torch.randn(2, 4, 8, 8)
    losses = []
    for _ in range(15):
        loss = (model(sample, 3, text).sample - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


# Keeping and copying


def test_its_spectra_are_parameters_of_the_unet() -> None:
    model = unet()
    base = set(model.state_dict())
    made = wrap(model)
    keys = set(model.state_dict())
    added = keys - base
    assert base < keys and len(added) == 2 * sum(len(each.spectra) for each in made.values())
    assert all(".processor." in key and key.endswith(("coefficients", "locations")) for key in added)
    parameters = {id(p) for p in model.parameters()}
    assert all(id(s.coefficients) in parameters for each in made.values() for s in each.spectra.values())


def test_a_state_dict_brings_them_into_another_unet() -> None:
    model, other = unet(), unet(seed=9)
    scatter(wrap(model))
    wrap(other, LoCAConfig(n_components=12, scale=2.0, targets=CONFIG.targets, seed=5))
    assert_far(output_of(other), output_of(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(output_of(other), output_of(model))


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    result: nn.Module = pickle.loads(pickle.dumps(model))
    return result


def saved_by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    result: nn.Module = torch.load(file, weights_only=False)
    return result


@pytest.mark.parametrize("copying", [copied, pickled, saved_by_torch])
@pytest.mark.parametrize("processor", [AttnProcessor2_0, Biased])
def test_a_copy_has_processors_of_its_own(processor: Callable[[], Any], copying: Callable[[Any], Any]) -> None:
    model = unet()
    scatter(wrap(model, processor=processor))
    before = output_of(model)
    other = copying(model)
    assert torch.equal(output_of(other), before)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("coefficients"):
                parameter.zero_()
    plain = unet()
    plain.set_attn_processor(processor())
    assert torch.equal(output_of(other), output_of(plain))
    assert torch.equal(output_of(model), before)


def test_a_copied_processor_passes_arguments_to_its_own_inner_one() -> None:
    model = unet()
    wrap(model, processor=Biased)
    other = copy.deepcopy(model)
    output_of(other, cross_attention_kwargs={"strength": 0.5})
    heard = [p.processor.heard for p in model.attn_processors.values()]
    assert heard == [[]] * len(heard)
    assert all(p.processor.heard[0]["strength"] == 0.5 for p in other.attn_processors.values())


def test_base_keys_are_saved_with_the_models_own_save_pretrained(tmp_path: Any) -> None:
    """What a processor adds is the user's to keep; stock `from_pretrained` warns of it and gives the base."""
    model = unet()
    wrap(model)
    model.set_attn_processor(AttnProcessor2_0())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output_of(again), output_of(unet()))


# Beside other adapters


@pytest.mark.parametrize("first", ["inject", "processor"])
def test_it_adds_to_what_is_injected(first: str) -> None:
    model = unet()
    made: dict[str, Any] = {}
    for step in (first, {"inject": "processor", "processor": "inject"}[first]):
        if step == "processor":
            made = wrap(model)
        else:
            inject(model, LoCAConfig(n_components=9, scale=1.5, targets=("q", "v")))
    scatter(made)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for spectrum in adapters(model).values():
            spectrum.coefficients.copy_(torch.randn(spectrum.coefficients.shape, generator=generator))
    oracle = with_updates(unet(), made)
    with torch.no_grad():
        genuine = dict(layers(oracle))
        for name, spectrum in adapters(model).items():
            genuine[name].weight += spectrum.delta()
    assert_near(output_of(model), output_of(oracle))
    remove(model)
    assert_near(output_of(model), output_of(with_updates(unet(), made)))


def test_it_adds_to_what_a_pipeline_has_loaded() -> None:
    pipe, plain = stable_diffusion(), stable_diffusion()
    loaded = adapter(stable_diffusion(), {"unet": ("q", "out")}, seed=4)
    pipe.load_loca_weights(loaded.state())
    made = wrap(pipe.unet)
    scatter(made)
    write_updates(with_updates(plain.unet, made), "unet", (loaded, 1.0))
    assert_near(picture(pipe), picture(plain))
    half = stable_diffusion()
    write_updates(with_updates(half.unet, made), "unet", (loaded, 0.5))
    assert_near(picture(pipe, cross_attention_kwargs={"scale": 0.5}), picture(half))
    pipe.unload_loca_weights()
    alone = stable_diffusion()
    with_updates(alone.unet, made)
    assert_near(picture(pipe), picture(alone))


def test_one_around_another_adds_up() -> None:
    model = unet()
    inner = wrap(model)
    scatter(inner)
    outer = wrap(model, LoCAConfig(n_components=20, targets=("q", "v"), seed=7))
    scatter(outer, 2.0)
    assert all(isinstance(each.processor, LoCAAttnProcessor) for each in outer.values())
    assert_near(output_of(model), output_of(with_updates(with_updates(unet(), inner), outer)))


# Locations


def test_components_stand_where_inject_puts_them() -> None:
    """The seed and the name of the layer decide."""
    model, injected = unet(), unet()
    made = wrap(model)
    inject(injected, CONFIG)
    for name, spectrum in adapters(injected).items():
        path, _, part = name.rpartition(".")
        assert torch.equal(made[path].spectra[part].locations, spectrum.locations)
    one, other = (LoCAAttnProcessor.of(model.get_submodule(ATTENTION), CONFIG) for _ in range(2))
    assert torch.equal(one.spectra["q"].locations, other.spectra["q"].locations)
    assert not torch.equal(one.spectra["q"].locations, made[ATTENTION].spectra["q"].locations)


# Errors


def test_what_is_no_processor_or_spectrum_is_refused() -> None:
    spectrum = random_spectrum((32, 32), 4, name="q", seed=0)
    with pytest.raises(TypeError, match="processor is a str: an attention processor is called"):
        LoCAAttnProcessor("AttnProcessor", {"q": spectrum})
    with pytest.raises(TypeError, match=r"spectra\['q'\] is a Tensor: a Spectrum, or another update, is wanted"):
        LoCAAttnProcessor(AttnProcessor(), {"q": torch.ones(3)})
    with pytest.raises(ValueError, match="name at least one projection"):
        LoCAAttnProcessor(AttnProcessor(), {})
    for part in ("to_q", "qkv", "fc1", "", 3):
        with pytest.raises(ValueError, match=r"spectra: .* is not one of q, k, v, out, add_q, add_k, add_v, add_out"):
            LoCAAttnProcessor(AttnProcessor(), {part: spectrum})  # type: ignore[dict-item]


def test_what_does_not_fit_the_layer_is_refused() -> None:
    attention = unet().get_submodule(ATTENTION)
    before = attention.processor
    with pytest.raises(ValueError, match=r"n_components=.*: one number is wanted for one layer"):
        LoCAAttnProcessor.of(attention, LoCAConfig(n_components={"*": 3}))
    with pytest.raises(ValueError, match="n_components=769: k has 32 x 24 = 768 cells"):
        LoCAAttnProcessor.of(attention, LoCAConfig(n_components=32 * 24 + 1, targets=("k",)))
    with pytest.raises(ValueError, match=r"targets=\('fc1',\): Attention has no such projection"):
        LoCAAttnProcessor.of(attention, LoCAConfig(n_components=3, targets=("fc1",)))
    with pytest.raises(ValueError, match="Linear has no such projection"):
        LoCAAttnProcessor.of(nn.Linear(3, 3), LoCAConfig(n_components=3))
    assert attention.processor is before


def test_a_spectrum_of_another_shape_is_an_error_and_not_another_picture() -> None:
    model = unet()
    attention = model.get_submodule(ATTENTION)
    spectrum = random_spectrum((32, 32), 4, name="k", seed=0)  # this layer's k is (32, 24)
    with torch.no_grad():
        spectrum.coefficients.fill_(1.0)
    attention.set_processor(LoCAAttnProcessor(attention.processor, {"k": spectrum}))
    with pytest.raises((ValueError, RuntimeError)):
        output_of(model)


def test_it_is_what_the_module_exports() -> None:
    assert loca_vision.diffusers.LoCAAttnProcessor is LoCAAttnProcessor
    assert "LoCAAttnProcessor" in loca_vision.diffusers.__all__
