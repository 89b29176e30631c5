"""`read_updates`: an adapter file of a pipeline, read without the pipeline."""

import pytest
import torch

from loca_vision import LoCAConfig, inject, read_updates, save_adapter
from support.pipelines import stable_diffusion, unet
from support.reference_weights import adapter


def test_updates_by_module(tmp_path):
    made = adapter(stable_diffusion(), whole=("unet.conv_in.weight",), name="cartoon")
    file = made.write(tmp_path)
    for path in (file, tmp_path, str(tmp_path)):
        found = read_updates(path)
        assert (found.name, found.base_model) == ("cartoon", "somebody/something")
        assert len(found.updates) == len(made.updates) and found.whole.keys() == made.whole.keys()
    assert torch.equal(found.whole["unet.conv_in.weight"], made.whole["unet.conv_in.weight"])
    block = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    for part, layer in {"q": "to_q", "out": "to_out.0"}.items():
        update = found.updates[f"{block}.{layer}"]
        torch.testing.assert_close(update.delta(), made.updates[f"{block}.{part}"].float())
        assert not any(parameter.requires_grad for parameter in update.parameters())
    layer = "encoder.layers.0.self_attn"
    update = found.updates[f"text_encoder.text_model.{layer}.q_proj"]
    torch.testing.assert_close(update.delta(), made.updates[f"text_encoder.text_model.{layer}.q"].float())


def test_in_inference_mode_it_reads_ordinary_tensors(tmp_path):
    adapter(stable_diffusion()).write(tmp_path)
    with torch.inference_mode():
        updates = read_updates(tmp_path).updates.values()
    assert not any(tensor.is_inference() for update in updates for tensor in update.tensors())


def renamed(made, old, new):
    """The same file with another name for what is called `old`."""
    tensors = {key.replace(old, new): value for key, value in made.tensors.items()}
    return type(made)(tensors, made.about | {"shapes": {k.replace(old, new): v for k, v in made.about["shapes"].items()}})


def test_refused(tmp_path):
    model = unet()
    inject(model, LoCAConfig(n_components=3))
    save_adapter(model, tmp_path / "alone")
    with pytest.raises(ValueError, match=r"alone.*: it is of a model by itself.*: save it with save_loca_weights"):
        read_updates(tmp_path / "alone")
    with pytest.raises(FileNotFoundError):
        read_updates(tmp_path / "nowhere.safetensors")

    made = adapter(stable_diffusion(), {"unet": ("q", "k")})
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    twice = renamed(made, f"{name}.k", f"{name}.to_q").write(tmp_path / "twice")
    with pytest.raises(ValueError, match=rf"{name}\.to_q: it is another name of {name}\.to_q, of which the file has an update"):
        read_updates(twice)
    fused = renamed(made, f"{name}.k", f"{name}.fused_q").write(tmp_path / "fused")
    with pytest.raises(ValueError, match=r"attn2\.fused_q: which weight it is added to only the model tells"):
        read_updates(fused)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(twice.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        read_updates(broken)


def test_two_names_of_a_whole_tensor_are_refused(tmp_path):
    made = adapter(stable_diffusion())
    names = [f"text_encoder.{before}final_layer_norm.weight" for before in ("", "text_model.")]
    made = made.with_tensors(**{f"full.{name}": torch.ones(24) for name in names}).but(whole=names)
    with pytest.raises(ValueError, match=r"final_layer_norm\.weight: the file has it twice"):
        read_updates(made.write(tmp_path))
