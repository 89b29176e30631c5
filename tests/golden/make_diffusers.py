"""Write `diffusers.safetensors` and what diffusers makes of it: `python make_diffusers.py`, from the folder `tests`."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from support.pipelines import stable_diffusion

LAYERS = r"mid_block.*attn1\.(to_q|to_v)$|mid_block.attentions.0.proj_in$"
TEXT = r".*layers\.0\.self_attn\.q_proj$"

if __name__ == "__main__":
    torch.manual_seed(0)
    here = Path(__file__).parent
    pipe = stable_diffusion()
    settings = {"unet": (LAYERS, {"to_v": 2}), "text_encoder": (TEXT, {})}
    before, about = {}, {}
    for component, (layers, ranks) in settings.items():
        model = getattr(pipe, component)
        before |= {f"{component}.{key}": value.clone() for key, value in model.state_dict().items()}
        model.add_adapter(LoraConfig(r=1, lora_alpha=3, rank_pattern=ranks, use_rslora=True, target_modules=layers))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        about[component] = model.peft_config["default"].to_dict()
    layers = {f"{component}_lora_layers": get_peft_model_state_dict(getattr(pipe, component)) for component in settings}
    about = {f"{component}_lora_adapter_metadata": fields for component, fields in about.items()}
    type(pipe).save_lora_weights(here, **layers, **about, weight_name="diffusers.safetensors")
    fresh = stable_diffusion()
    fresh.load_lora_weights(here / "diffusers.safetensors")
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    after = {f"{c}.{key}": value for c in settings for key, value in getattr(fresh, c).state_dict().items()}
    changed = [key for key, value in after.items() if not torch.equal(value, before[key])]
    pairs = {"before": before, "after": after}
    save_file(
        {f"{key}.{when}": of[key] for when, of in pairs.items() for key in changed}, here / "diffusers-expected.safetensors"
    )
