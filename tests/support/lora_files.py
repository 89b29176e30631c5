"""LoRA pairs and checks for the tests in formats/lora_files/."""

import re

import torch

from loca_vision.formats.lora_files.low_rank_pair import LowRankPair

ATTENTION = r".*attn.*(to_q|to_k|to_v|to_out\.0)$"


COMPONENTS = {"unet": ATTENTION, "text_encoder": r".*self_attn\.(q_proj|out_proj)$", "text_encoder_2": r".*(v_proj|fc1)$"}


def plain(path):
    """The path without the level `text_model`, which not every text encoder has."""
    return path.replace(".text_model.", ".")


def modules(pipe):
    """Linear layers of the components, keyed by `component.path`."""
    for component in COMPONENTS:
        model = getattr(pipe, component, None)
        for path, module in model.named_modules() if model is not None else ():
            if isinstance(module, torch.nn.Linear):
                yield f"{component}.{path}", module


def made_up(pipe, *, ranks=(4,), scales=(1.0,), seed=0):
    """A low-rank pair for each attention layer of a pipeline, with alternating ranks and scales."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, module in modules(pipe):
        component, _, rest = path.partition(".")
        if re.fullmatch(COMPONENTS[component], rest):
            rank, scale = ranks[len(pairs) % len(ranks)], scales[len(pairs) % len(scales)]
            down = torch.randn(rank, module.in_features, generator=generator)
            pairs[path] = LowRankPair(down, torch.randn(module.out_features, rank, generator=generator), scale)
    return pairs


def weights_of(pipe):
    return {path: module.weight.detach().clone() for path, module in modules(pipe)}


def check_merged(pipe, base, pairs):
    """Check that after fusing every adapted weight is W + delta and all others are unchanged."""
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = weights_of(pipe)
    assert after.keys() == base.keys()
    for path, weight in base.items():
        delta = pairs[path].delta() if path in pairs else torch.zeros(())
        assert torch.allclose(after[path], weight + delta, atol=2e-5), path


def equal(read, pairs, **tolerance):
    read = {path: pair for path, pair in read.items() if pair.up.any()}  # one of zeros may be there for diffusers
    assert {plain(path) for path in read} == {plain(path) for path in pairs}
    expected = {plain(path): pair.delta() for path, pair in pairs.items()}
    assert all(torch.allclose(pair.delta(), expected[plain(path)], **tolerance) for path, pair in read.items())


MIXED = {"ranks": (4, 2, 3), "scales": (1.0, 0.25, 0.3)}
