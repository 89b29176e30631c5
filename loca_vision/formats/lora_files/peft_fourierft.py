"""peft's FourierFT: its files hold only coefficients, so the cells are drawn again from the seed and the weight's size."""

from __future__ import annotations

import torch
from torch import Tensor

from loca_vision.formats.lora_files.module_update import MOST_CELLS, ModuleUpdate
from loca_vision.formats.lora_files.scales import FourierSettings
from loca_vision.functional.cosine_atoms import Cells
from loca_vision.functional.fourier import inverse_real


def fourier_update(path: str, spectrum: Tensor, settings: FourierSettings, size: tuple[int, int] | None) -> ModuleUpdate:
    """Return the update that a spectrum of peft's FourierFT makes.

    Args:
        path: the path of the module.
        spectrum: (n,) coefficients.
        size: (p, q) of the module's weight; None if unknown.

    Raises:
        ValueError: the size is unknown; there are more coefficients than cells, or not as many as the settings say.
    """
    if size is None:
        raise ValueError(
            f"{path} has a spectrum of FourierFT, whose cells only the weight's size tells: name the weights (--base) "
            "or the model (--model)"
        )
    cells = size[0] * size[1]
    wanted = settings.count(path)
    if spectrum.dim() != 1 or len(spectrum) != wanted or not 0 < wanted <= cells <= MOST_CELLS:
        raise ValueError(f"fourierft_spectrum {tuple(spectrum.shape)}: expected ({wanted},), of the {cells} cells of {size}")

    def make() -> Tensor:
        generator = torch.Generator().manual_seed(settings.seed)
        flat = torch.randperm(cells, generator=generator)[:wanted]
        places = torch.stack([flat // size[1], flat % size[1]], 1)
        return inverse_real(spectrum.float() * settings.scaling, Cells(places, size))

    return ModuleUpdate("FourierFT", size, wanted, make)
