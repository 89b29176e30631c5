"""LoRA files for diffusers, peft and kohya: writing them."""

import pytest
import torch

from loca_vision.formats.lora_files.kohya_writer import write_kohya_lora
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.reader import read_lora
from loca_vision.formats.lora_files.writer import write_diffusers_lora
from support.lora_files import MIXED, check_merged, equal, made_up, plain, weights_of
from support.pipelines import stable_diffusion, stable_diffusion_xl


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
@pytest.mark.parametrize("about", [{}, {"scales": (0.25,)}, MIXED], ids=["plain", "scaled", "mixed"])
@pytest.mark.parametrize("write", [write_diffusers_lora, write_kohya_lora])
def test_a_pipeline_takes_what_is_written(write, about, make, tmp_path):
    pipe = make()
    pairs, base = made_up(pipe, **about), weights_of(pipe)
    file = write(tmp_path / "lora.safetensors", pairs)
    equal(read_lora(file).pairs, pairs, atol=1e-5)
    pipe.load_lora_weights(file)
    check_merged(pipe, base, pairs)


def test_a_folder_gets_the_usual_name(tmp_path):
    pairs = made_up(stable_diffusion())
    file = write_diffusers_lora(tmp_path / "lora", pairs)
    assert file == tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    equal(read_lora(tmp_path / "lora").pairs, pairs, atol=0)


def test_one_alpha_keeps_the_factors_to_the_bit(tmp_path):
    pairs = made_up(stable_diffusion(), scales=(0.3,))
    read = read_lora(write_kohya_lora(tmp_path / "x.safetensors", pairs)).pairs
    for path, pair in read.items():
        mine = next(p for name, p in pairs.items() if plain(name) == plain(path))
        assert torch.equal(pair.up, mine.up) and torch.equal(pair.down, mine.down) and pair.scale == pytest.approx(0.3)


@pytest.mark.parametrize(("scale", "dtype"), [(0.5, torch.float16), (0.3, torch.float32)])
def test_a_scale_that_half_precision_cannot_hold_widens_the_factor(scale, dtype, tmp_path):
    pair = LowRankPair(torch.randn(2, 4).half(), torch.randn(3, 2).half(), scale)
    (read,) = read_lora(write_diffusers_lora(tmp_path / "x.safetensors", {"unet.a.to_q": pair})).pairs.values()
    assert read.up.dtype == dtype and torch.allclose(read.delta(), pair.delta(), rtol=1e-6)


def test_half_precision_on_request(tmp_path):
    pairs = made_up(stable_diffusion())
    read = read_lora(write_kohya_lora(tmp_path / "x.safetensors", pairs, dtype=torch.float16)).pairs
    assert all(pair.up.dtype == pair.down.dtype == torch.float16 for pair in read.values())
    large = {"unet.mid_block.attentions.0.proj_in": LowRankPair(torch.ones(1, 2), torch.full((2, 1), 1e6))}
    with pytest.raises(ValueError, match=r"lora_up.weight is not finite in torch.float16"):
        write_kohya_lora(tmp_path / "x.safetensors", large, dtype=torch.float16)
    equal(read_lora(tmp_path / "x.safetensors").pairs, pairs, atol=0.05)
