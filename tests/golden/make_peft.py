"""Write the folders `peft-*` and what peft makes of them: `python make_peft.py`."""

import json
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import nn

MODULES = ["fc1", "fc2", "conv"]
PLAIN = {"r": 2, "lora_alpha": 3, "target_modules": MODULES}
CONFIGS = {
    "lora": peft.LoraConfig(**PLAIN | {"rank_pattern": {"fc2": 1}, "alpha_pattern": {"conv": 5}}),
    "rslora": peft.LoraConfig(**PLAIN, use_rslora=True, modules_to_save=["head"]),
    "dora": peft.LoraConfig(**PLAIN, use_dora=True),
    "lora-bias": peft.LoraConfig(**PLAIN | {"target_modules": ["fc1", "conv"]}, lora_bias=True),
    "biases": peft.LoraConfig(**PLAIN, bias="all"),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=MODULES, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=1, alpha=3, target_modules=MODULES, use_effective_conv2d=True),
    "lokr-both": peft.LoKrConfig(r=1, alpha=3, target_modules=["fc1", "fc2"], decompose_both=True, decompose_factor=4),
    "lokr-full": peft.LoKrConfig(r=8, alpha=3, target_modules=["fc1", "conv"]),
    "fourierft": peft.FourierFTConfig(
        n_frequency=9, scaling=20.0, target_modules=["fc1", "fc2"], n_frequency_pattern={"fc2": 5}, random_loc_seed=3
    ),
}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.conv, self.head = nn.Linear(12, 8), nn.Linear(8, 12), nn.Conv2d(6, 8, 3), nn.Linear(12, 2)


@torch.no_grad()
def write(name: str, config: peft.PeftConfig, folder: Path) -> None:
    model = Tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    about = folder / "adapter_config.json"
    fields = {key: sorted(v) if key == "target_modules" else v for key, v in json.loads(about.read_text()).items()}
    about.write_text(
        json.dumps({key: v for key, v in fields.items() if v is not None and key != "auto_mapping"}, indent=1) + "\n"
    )
    after = adapted.merge_and_unload().state_dict()
    pairs = {"before": before, "after": after}
    save_file({f"{key}.{when}": v for when, of in pairs.items() for key, v in of.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    for number, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(number)
        write(name, config, Path(__file__).parent / f"peft-{name}")
