"""Write `lycoris.safetensors` and what LyCORIS makes of it: `python make_lycoris.py`, where lycoris-lora is installed.

The merged weights are those of its layers' forward pass: `get_merged_weight` of its LoKr (4.1.3) applies the scale twice.
"""

from pathlib import Path

import torch
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file

BLOCK = "mid_block_attentions_0_transformer_blocks_0"
COLUMNS = {"weight_decompose": True, "wd_on_out": False}
# name -> class, columns (and kernel) of a layer with 8 rows, settings
LAYERS = {
    f"{BLOCK}_attn1_to_q": (LoConModule, (12,), {"lora_dim": 2, "alpha": 1}),
    f"{BLOCK}_attn1_to_k": (LoConModule, (12,), {"lora_dim": 3, "alpha": 6, "weight_decompose": True}),
    f"{BLOCK}_attn1_to_v": (LoConModule, (12,), {"lora_dim": 2, "alpha": 1} | COLUMNS),
    f"{BLOCK}_attn1_to_out_0": (LohaModule, (12,), {"lora_dim": 2, "alpha": 1}),
    f"{BLOCK}_attn2_to_q": (LohaModule, (12,), {"lora_dim": 2, "alpha": 1} | COLUMNS),
    f"{BLOCK}_attn2_to_k": (LokrModule, (12,), {"lora_dim": 1, "alpha": 0.5}),
    f"{BLOCK}_attn2_to_v": (LokrModule, (12,), {"lora_dim": 1, "alpha": 0.5, "factor": 4, "decompose_both": True}),
    f"{BLOCK}_attn2_to_out_0": (LokrModule, (12,), {"lora_dim": 1, "alpha": 0.5, "full_matrix": True}),
    f"{BLOCK}_ff_net_2": (LokrModule, (12,), {"lora_dim": 1, "alpha": 0.5, "weight_decompose": True}),
    f"{BLOCK}_ff_net_0_proj": (FullModule, (12,), {}),
    "mid_block_resnets_0_conv1": (LoConModule, (6, 3, 3), {"lora_dim": 2, "alpha": 1}),
    "mid_block_resnets_0_conv2": (LoConModule, (6, 3, 3), {"lora_dim": 2, "alpha": 1, "use_tucker": True}),
    "mid_block_resnets_1_conv1": (LohaModule, (6, 3, 3), {"lora_dim": 2, "alpha": 1}),
    "mid_block_resnets_1_conv2": (LohaModule, (6, 3, 3), {"lora_dim": 2, "alpha": 1, "use_tucker": True}),
    "down_blocks_0_resnets_0_conv1": (LokrModule, (6, 3, 3), {"lora_dim": 1, "alpha": 0.5}),
    "down_blocks_0_resnets_0_conv2": (LokrModule, (6, 3, 3), {"lora_dim": 1, "alpha": 0.5, "use_tucker": True}),
    "down_blocks_0_resnets_1_conv1": (LoConModule, (6, 3, 3), {"lora_dim": 2, "alpha": 1} | COLUMNS),
    "down_blocks_0_resnets_1_conv2": (LohaModule, (6, 3, 3), {"lora_dim": 2, "alpha": 1} | COLUMNS),
}


@torch.no_grad()
def made(name: str, cls: type, size: tuple[int, ...], settings: dict) -> tuple[dict, dict]:
    """The layer's tensors in the file, and its weight before and after."""
    layer = torch.nn.Linear(*size, 8) if len(size) == 1 else torch.nn.Conv2d(size[0], 8, size[1:])
    adapted = cls(f"lora_unet_{name}", layer, **settings)
    for key, parameter in adapted.named_parameters():
        if not key.startswith("org_"):
            parameter.add_(0.3 * torch.randn(parameter.shape))
    tensors = (
        {f"lora_unet_{name}.{key}": value.contiguous().clone() for key, value in adapted.custom_state_dict().items()}
        if cls is not FullModule
        else {f"lora_unet_{name}.diff": adapted.weight.clone(), f"lora_unet_{name}.diff_b": adapted.bias.clone()}
    )
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    units = torch.eye(before[0].numel()).view(-1, *size)
    adapted.apply_to()
    after = adapted(units).flatten(1) - adapted(torch.zeros_like(units)).flatten(1)
    found = {f"{name}.before": before, f"{name}.after": after.T.reshape(before.shape).contiguous()}
    if cls is FullModule:
        found |= {f"{name}.bias": adapted(torch.zeros_like(units))[0] - bias}
    return tensors, found


if __name__ == "__main__":
    torch.manual_seed(0)
    file, expected = {}, {}
    for name, (cls, size, settings) in LAYERS.items():
        tensors, found = made(name, cls, size, settings)
        file |= tensors
        expected |= found
    here = Path(__file__).parent
    save_file(file, here / "lycoris.safetensors")
    save_file(expected, here / "lycoris-expected.safetensors")
