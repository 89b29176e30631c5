"""The verbs: inject, remove, adapters, set_adapters, active_adapters."""

import copy

import pytest
import timm
import torch
from torch import nn

from loca_vision import (
    AlternatingSchedule,
    LoCAConfig,
    active_adapters,
    adapters,
    inject,
    load_adapter,
    remove,
    save_adapter,
    set_adapters,
)
from loca_vision.model.traversal import modules_of
from support.timm_models import batch, randomise, tiny

SMALL = LoCAConfig(n_components=30)


def merged(model, **strengths):
    """The base weights with the adapters' updates written into them: the oracle."""
    twin = copy.deepcopy(model)
    remove(twin)
    width = 48
    rows = {"q": slice(0, width), "k": slice(width, 2 * width), "v": slice(2 * width, 3 * width)}
    for name, strength in strengths.items():
        for projection, spectrum in adapters(model, name).items():
            path, part = projection.rsplit(".", 1)
            layer = twin.get_submodule(f"{path}.qkv")
            layer.weight.data[rows[part]] += strength * spectrum.delta().detach()
    return twin


def test_names_are_those_of_the_projections(vit):
    names = inject(vit, SMALL)
    assert names == ("blocks.0.attn.q", "blocks.0.attn.v", "blocks.1.attn.q", "blocks.1.attn.v")
    assert tuple(adapters(vit)) == names
    spectrum = adapters(vit)["blocks.1.attn.v"]
    assert spectrum.shape == (48, 48)
    assert spectrum.coefficients.shape == (30,) and spectrum.coefficients.dtype == torch.float32
    assert spectrum.locations.shape == (30, 2) and spectrum.locations.dtype == torch.float32
    assert spectrum.cells.shape == (30, 2) and spectrum.cells.dtype == torch.int64
    assert spectrum.delta().shape == (48, 48)


def test_only_adapter_and_head_learn(vit):
    inject(vit, SMALL)
    learned = {name for name, p in vit.named_parameters() if p.requires_grad}
    assert learned >= {"head.weight", "head.bias"}
    assert all(name.startswith("head.") or ".loca." in name for name in learned)


def test_counts_by_pattern(vit):
    inject(vit, LoCAConfig(n_components={"blocks.0.*": 7, "*.v": 5, "*": 3}))
    assert [len(s.coefficients) for s in adapters(vit).values()] == [7, 7, 3, 5]


def test_several_adapters_add_up_as_weighted(vit, images):
    inject(vit, SMALL, "a")
    inject(vit, LoCAConfig(n_components=20, targets=("k", "v"), seed=1), "b")
    for name in "ab":
        randomise(vit, name)
    with torch.no_grad():
        for strengths in ({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": -2.0}, {"b": 1.0}, {"a": 0.0}, {}):
            set_adapters(vit, list(strengths), list(strengths.values()))
            assert active_adapters(vit) == strengths
            torch.testing.assert_close(vit(images), merged(vit, **strengths)(images), rtol=1e-4, atol=1e-5)


def test_weights_come_in_several_forms(vit):
    inject(vit, SMALL, "a")
    inject(vit, SMALL, "b")
    assert active_adapters(vit) == {"a": 1.0, "b": 1.0}
    for names, weights, expected in (
        ("a", None, {"a": 1.0}),
        (["a", "b"], 0.5, {"a": 0.5, "b": 0.5}),
        (("b", "a"), [1, 2], {"b": 1.0, "a": 2.0}),
        (["a", "b"], {"b": 3, "a": 1}, {"a": 1.0, "b": 3.0}),
    ):
        set_adapters(vit, names, weights)
        assert active_adapters(vit) == expected


def test_injecting_next_to_a_trained_adapter_changes_nothing(vit, images):
    inject(vit, SMALL, "a")
    randomise(vit, "a")
    before = vit(images)
    inject(vit, LoCAConfig(n_components=9, targets=("q", "out", "fc2")), "b")
    assert torch.equal(vit(images), before)


def test_each_adapter_has_its_own_head(vit, images):
    base = vit(images)
    outputs = {}
    for value, name in enumerate("ab", start=1):
        inject(vit, SMALL, name)
        set_adapters(vit, name)
        with torch.no_grad():
            vit.head.weight.fill_(value)
        outputs[name] = vit(images)
    for name in "abab":
        set_adapters(vit, name)
        assert torch.equal(vit(images), outputs[name])
    set_adapters(vit, [])
    assert torch.equal(vit(images), base)
    set_adapters(vit, "b")
    remove(vit, "b")
    assert torch.equal(vit(images), base)
    set_adapters(vit, "a")
    assert torch.equal(vit(images), outputs["a"])
    remove(vit)
    assert torch.equal(vit(images), base)


def test_what_the_user_made_trainable_belongs_to_the_adapter(vit, images):
    inject(vit, SMALL, "a")
    vit.norm.requires_grad_(True)
    vit.norm.weight.data.normal_()
    trained = vit(images)
    inject(vit, SMALL, "b")
    assert torch.equal(vit(images), trained)
    vit.head.weight.data.zero_()
    set_adapters(vit, "a")
    assert torch.equal(vit(images), trained)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_merging_keeps_the_output_to_the_bit(vit, images, dtype):
    inject(vit, LoCAConfig(n_components=30, targets=("q", "v", "out", "fc1", "fc2")))
    randomise(vit)
    vit.head.weight.data.normal_()
    vit.to(dtype)
    with torch.no_grad():
        before = vit(images.to(dtype))
        remove(vit, merge=True)
        assert torch.equal(vit(images.to(dtype)), before)
    assert all(type(m).__name__ != "AdaptedLinear" for m in vit.modules())


def test_merging_one_of_two(vit, images):
    inject(vit, SMALL, "a")
    inject(vit, LoCAConfig(n_components=20, targets=("v",), seed=1), "b")
    for name in "ab":
        randomise(vit, name)
    set_adapters(vit, ["a", "b"], [0.5, 2.0])
    with torch.no_grad():
        before = vit(images)
        remove(vit, "b", merge=True)
        assert active_adapters(vit) == {"a": 0.5}
        torch.testing.assert_close(vit(images), before, rtol=1e-4, atol=1e-5)


def test_what_was_trainable_is_trainable_again(vit):
    vit.requires_grad_(False)
    vit.norm.requires_grad_(True)
    before = {name: p.requires_grad for name, p in vit.named_parameters()}
    inject(vit, SMALL, "a")
    inject(vit, SMALL, "b")
    remove(vit, "a")
    remove(vit, "b")
    assert {name: p.requires_grad for name, p in vit.named_parameters()} == before


def test_a_timm_model_inside_another_module(vit, images):
    model = nn.ModuleDict({"backbone": vit})
    names = inject(model, SMALL)
    assert names[0] == "backbone.blocks.0.attn.q"
    assert vit.head.weight.requires_grad
    remove(model)


def test_a_refused_call_leaves_the_model_alone(vit):
    inject(vit, SMALL, "a")
    keys = list(vit.state_dict())
    for config, name in ((SMALL, "a"), (LoCAConfig(n_components=48 * 48 + 1), "b"), (LoCAConfig(n_components={"x": 1}), "b")):
        with pytest.raises(ValueError):
            inject(vit, config, name)
    assert list(vit.state_dict()) == keys
    assert active_adapters(vit) == {"a": 1.0}


def test_a_spectrum_of_all_cells(vit):
    inject(vit, LoCAConfig(n_components=48 * 48, targets=("q",)))
    flat = adapters(vit)["blocks.0.attn.q"].cells @ torch.tensor([48, 1])
    assert len(flat.unique()) == 48 * 48


def test_every_head_learns_that_the_model_names():
    """VOLO adds the logits of a second head, which `get_classifier` does not return."""
    with torch.device("meta"):
        model = timm.create_model("volo_d1_224", num_classes=3)
    inject(model, SMALL)
    assert model.head.weight.requires_grad and model.aux_head.weight.requires_grad


@pytest.mark.parametrize(
    "name", ("maxvit_nano_rw_256", "swinv2_cr_tiny_224", "vit_relpos_small_patch16_224", "vit_base_patch16_siglip_224")
)
def test_mlps_are_those_of_the_blocks(name):
    """Neither squeeze-and-excitation nor the networks that make position biases; an attention pool's MLP is one."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    names = inject(model, LoCAConfig(n_components=3, targets=("fc1", "fc2")))
    assert names
    assert not any(word in projection for projection in names for word in ("se.", "meta_mlp", "rel_pos"))
    assert any("attn_pool.mlp" in projection for projection in names) == ("siglip" in name)


def test_levels_do_not_mix(vit):
    """An adapter belongs to the module it was injected into; above or below it, another call is refused untouched."""
    inject(vit, SMALL)
    keys = list(vit.state_dict())
    for other in (nn.Sequential(vit), vit.blocks[0]):
        with pytest.raises(ValueError, match=r"attn.q has the adapter 'default' through another module"):
            inject(other, SMALL, "b")
    assert list(vit.state_dict()) == keys
    remove(vit)
    inject(vit.blocks[0], SMALL)
    with pytest.raises(ValueError, match="through another module"):
        inject(vit, SMALL, "b")


@pytest.mark.parametrize("shared", ("weight", "layer"))
def test_projections_that_share_a_weight_are_refused(vit, shared):
    first, second = vit.blocks[0].attn, vit.blocks[1].attn
    if shared == "weight":
        second.qkv.weight = first.qkv.weight
    else:
        second.qkv = first.qkv
    with pytest.raises(ValueError, match=r"blocks.1.attn.q shares its weight with blocks.0.attn.q"):
        inject(vit, SMALL)


def test_gradients_from_before_do_not_move_the_frozen_base(vit, images):
    optimizer = torch.optim.AdamW(vit.parameters(), lr=0.1)
    vit(images).sum().backward()
    before = copy.deepcopy(vit.state_dict())
    inject(vit, SMALL)
    optimizer.step()
    remove(vit)
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())


def test_statistics_of_batch_normalisation_belong_to_the_adapter(build, tmp_path):
    model, images = build("tiny_vit"), batch("tiny_vit")
    before = copy.deepcopy(model.state_dict())
    inject(model, LoCAConfig(n_components=10))
    randomise(model)
    model.train()
    for _ in range(3):
        model(images * 3 + 1)
    model.eval()
    with torch.no_grad():
        trained = model(images)
        other = build("tiny_vit")
        load_adapter(other, save_adapter(model, tmp_path))
        assert torch.equal(other(images), trained)
    remove(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_head_exchanged_after_injection(vit, images, tmp_path):
    inject(vit, SMALL, "a")
    vit.reset_classifier(7)
    set_adapters(vit, "a", 0.5)
    load_adapter(build_with(vit), save_adapter(vit, tmp_path, "a"))
    inject(vit, SMALL, "b")
    assert vit(images).shape == (4, 7)
    remove(vit, "b")
    remove(vit)
    assert vit.head.out_features == 7


def build_with(model):
    """A fresh model with a head like `model`'s."""
    fresh = tiny("vit")
    fresh.reset_classifier(model.head.out_features)
    return fresh


def test_a_merge_that_overflows_is_refused_before_a_weight_is_written(vit):
    inject(vit, SMALL)
    randomise(vit, size=1e7)
    vit.half()
    before = [p.clone() for p in vit.parameters()]
    with pytest.raises(ValueError, match=r"blocks.0.attn.q: merged, the weight would not be finite in torch.float16"):
        remove(vit, merge=True)
    assert all(torch.equal(a, b) for a, b in zip(before, vit.parameters(), strict=True))


def test_data_parallel_training_has_one_order(vit, monkeypatch):
    """Wrapped before injection, new parameters would never be shared; the schedule comes after the wrapping."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(vit)
        with pytest.raises(ValueError, match="wrap it afterwards"):
            inject(wrapped, SMALL)
        inject(vit, SMALL)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        with pytest.raises(ValueError, match="before its schedule is made"):
            AlternatingSchedule(vit)
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()


@pytest.mark.parametrize("family", ("vit", "hiera", "swin"))
def test_modules_come_in_the_order_of_torch(family, build):
    model = build(family)
    inject(model, LoCAConfig(n_components=5))
    model.twice = next(model.children())  # the same module at two places
    assert list(modules_of(model)) == list(model.modules())
