"""What all writers of LoRA files share: the factors as other programs have them, and names with a component in front."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loca_vision.formats.lora_files.keys import canonical
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.storage.safetensors_file import PICKLES

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class LoraLayers:
    """The layers of a LoRA.

    Args:
        pairs: the factors by module path: `blocks.0.attn.qkv`, or of a pipeline `unet.mid_block...attn1.to_q`.
        kernels: (kh, kw) of the modules that are 2-D convolutions, (1, 1) included; `down` is (r, in * kh * kw) for them.
        magnitudes: (p,) of the modules that are DoRA: m V / |V| for V = W + scale * B A, with the norm of each row.
    """

    pairs: Mapping[str, LowRankPair]
    kernels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)

    def factors(
        self, module: str, keys: tuple[str, str], factor: float = 1.0, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return a module's `down` and `up` under these keys, `up` times a factor; for a convolution as 4-D kernels.

        The shapes are (r, q) and (p, r), or for a convolution (r, in, kh, kw) and (p, r, 1, 1).

        Raises:
            ValueError: one is not finite in that dtype.
        """
        pair, kernel = self.pairs[module], self.kernels.get(module)
        wide = torch.promote_types(pair.up.dtype, torch.float32)
        exact = pair.up.detach().to(wide) * factor
        same = exact.to(pair.up.dtype)
        up = same if torch.equal(same.to(wide), exact) else exact
        down = pair.down.detach()
        if kernel is not None:
            down, up = down.reshape(len(down), -1, *kernel), up[..., None, None]
        return {key: stored(key, tensor, dtype) for key, tensor in zip(keys, (down, up), strict=True)}

    def magnitude(self, module: str) -> Tensor:
        """Return the magnitudes of a DoRA in float32, because rounding them would change the whole weight."""
        shape = (1, -1, 1, 1) if module in self.kernels else (-1,)
        return self.magnitudes[module].detach().float().cpu().reshape(shape).clone()

    def with_components(self) -> LoraLayers:
        """Return the same layers under the names in files, where text encoders have `text_model` in their paths.

        Raises:
            ValueError: there is no layer, a path does not begin with a component of a pipeline, or a layer occurs twice.
        """
        check_any(self.pairs)
        for name in self.pairs:
            component, _, module = name.partition(".")
            if component not in COMPONENTS or not module:
                raise ValueError(f"{name}: it begins with no component of a pipeline ({', '.join(COMPONENTS)})")
        named = LoraLayers(*({canonical(name): of for name, of in part.items()} for part in vars(self).values()))
        if len(named.pairs) < len(self.pairs):
            raise ValueError("a layer of a text encoder comes twice, with and without text_model")
        return named


def stored(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor as a file stores it: a contiguous copy on the CPU, in that dtype.

    Raises:
        ValueError: it is not finite in that dtype.
    """
    found = tensor.detach().to(dtype or tensor.dtype).cpu().clone(memory_format=torch.contiguous_format)
    if not torch.isfinite(found).all():
        raise ValueError(f"{key} is not finite in {found.dtype}")
    return found


def check_any(pairs: Mapping[str, object]) -> None:
    """Refuse an empty set of updates.

    Raises:
        ValueError: there is none.
    """
    if not pairs:
        raise ValueError("there is no update to write")


def file_to_write(path: str | os.PathLike[str], name: str | None) -> Path:
    """Return a file that ends in .safetensors as it is, or the file of that name in a folder.

    Raises:
        ValueError: the path is neither.
    """
    file = Path(path)
    if file.suffix == ".safetensors" and not file.is_dir():
        return file
    if name is None or file.suffix in PICKLES:
        raise ValueError(f"path={str(path)!r}: a LoRA is written to a file that ends in .safetensors")
    return file / name
