"""Write files with kohya's keys, for ComfyUI, A1111 and sd-scripts: a LoRA, or full differences of weights."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loca_vision.formats.lora_files.keys import canonical, unflattened
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.stable_diffusion import Family, family_of, header_of
from loca_vision.formats.lora_files.written_layers import LoraLayers, check_any, file_to_write, stored
from loca_vision.storage.safetensors_file import write_safetensors

_ENCODERS = ("text_encoder", "text_encoder_2")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def write_kohya_lora(
    path: str | os.PathLike[str],
    pairs: Mapping[str, LowRankPair],
    *,
    kernels: Mapping[str, tuple[int, int]] | None = None,
    magnitudes: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    base_model: str = "unknown",
    xl: bool = False,
) -> Path:
    """Write a LoRA with kohya's keys: `lora_unet_<module with underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    ComfyUI, the web UIs, sd-scripts and `pipe.load_lora_weights` can read it. Two details are for their sake: diffusers (0.42)
    uses one alpha for a whole component, so the remaining factor goes into `up`; and layers of text encoders get updates of
    zeros, as described in `zeros_for_readers`.

    Args:
        path: a file that ends in .safetensors. An existing one is replaced.
        pairs: the factors by module of `unet`, `text_encoder` and `text_encoder_2` of Stable Diffusion.
        kernels: as in `LoraLayers`.
        magnitudes: as in `LoraLayers`, written as `dora_scale` (p, 1), which only LyCORIS reads exactly: diffusers (0.42)
            ignores it, ComfyUI divides by the norms of W instead of V, and A1111 by those of columns.
        dtype: the dtype of the factors; by default the one they have.
        base_model, xl: as in `family_of`, which decides between `lora_te1_` and `lora_te_`, and the header.

    Returns:
        The file.

    Raises:
        ValueError: there is no pair; a module has no name in these keys; a factor is not finite in that dtype; or `xl` is set
            and the modules are of another model.
        OSError: as `write_atomically`.
    """
    file = file_to_write(path, None)
    layers = LoraLayers(pairs, kernels or {}, magnitudes or {}).with_components()
    shapes = {name: pair.shape for name, pair in layers.pairs.items()}
    family = family_of(shapes, base_model, xl=xl)
    dora = {name.partition(".")[0] for name in layers.magnitudes}
    # A DoRA whose update is zero would still need magnitudes, which only the weight tells: such components get no zeros.
    zeros = {name: zero for name, zero in zeros_for_readers(shapes, family).items() if name.partition(".")[0] not in dora}
    layers = LoraLayers({**layers.pairs, **zeros}, layers.kernels, layers.magnitudes)
    alphas = {component: _alpha(layers.pairs, component) for component in {name.partition(".")[0] for name in layers.pairs}}
    tensors: dict[str, Tensor] = {}
    for name, pair in layers.pairs.items():
        key, alpha = flattened(name, xl=family == "sdxl"), alphas[name.partition(".")[0]]
        rest = pair.scale * pair.rank / alpha
        rest = 1.0 if abs(rest - 1) < 1e-9 else rest
        tensors |= layers.factors(name, (f"{key}.lora_down.weight", f"{key}.lora_up.weight"), rest, dtype)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        if name in layers.magnitudes:
            shape = (-1, 1, 1, 1) if name in layers.kernels else (-1, 1)
            tensors[f"{key}.dora_scale"] = layers.magnitude(name).reshape(shape)
    write_safetensors(file, tensors, header_of(family, base_model))
    return file


def write_differences(
    path: str | os.PathLike[str],
    differences: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    *,
    base_model: str = "unknown",
    xl: bool = False,
) -> Path:
    """Write differences of whole parameters: `<kohya's name>.diff` for a weight, and `.diff_b` for a bias.

    ComfyUI and A1111 add them to the weights, times the strength. diffusers does not read such files.

    Args:
        path: as in `write_kohya_lora`.
        differences: the tensors, in the shapes and dtypes to be written, by the name of the parameter, component first:
            `unet.mid_block...attn1.to_q.weight`.
        shapes: (p, q) of those that are updates of matrices, by module.
        base_model, xl: as in `write_kohya_lora`.

    Raises:
        ValueError: there is nothing to write, a parameter has no name in these keys, a value is not finite, or `xl` as there.
        OSError: as `write_atomically`.
    """
    file = file_to_write(path, None)
    check_any(differences)
    named = {canonical(module): shape for module, shape in shapes.items()}
    family = family_of(named, base_model, xl=xl)
    tensors: dict[str, Tensor] = {}
    for parameter, tensor in differences.items():
        key = difference_key(parameter, xl=family == "sdxl")
        tensors[key] = stored(key, tensor, None)
    zeros = LoraLayers(zeros_for_readers(named, family))
    for name in zeros.pairs:
        key = flattened(name, xl=family == "sdxl")
        tensors |= zeros.factors(name, (f"{key}.lora_down.weight", f"{key}.lora_up.weight"))
    write_safetensors(file, tensors, header_of(family, base_model))
    return file


def difference_key(parameter: str, *, xl: bool) -> str:
    """Return the key of a parameter's difference: `lora_unet_conv_in.diff` for `unet.conv_in.weight`, `.diff_b` for its bias.

    Raises:
        ValueError: the parameter has no such name.
    """
    module, _, kind = canonical(parameter).rpartition(".")
    endings = {"weight": "diff", "bias": "diff_b"}
    if kind not in endings:
        raise ValueError(f"{parameter}: kohya's keys have differences of weights and biases only")
    return f"{flattened(module, xl=xl)}.{endings[kind]}"


def zeros_for_readers(shapes: Mapping[str, tuple[int, int]], family: Family | None) -> dict[str, LowRankPair]:
    """Return updates of zeros, of rank 1, without which other programs lose updates of text encoders.

    A1111 keeps the query, key, value and output of an OpenCLIP encoder (SDXL's second, SD 2's) in one module, and takes either
    all four of a layer or none. diffusers infers the format of a text encoder's keys from an output projection, which at least
    one layer must have.
    """
    zeros: dict[str, LowRankPair] = {}
    for component in _ENCODERS:
        there = {name: shape for name, shape in shapes.items() if name.startswith(f"{component}.") and ".self_attn." in name}
        open_clip = family == ("sdxl" if component == "text_encoder_2" else "sd2")
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in there))
        if open_clip:
            wanted = [f"{layer}.{part}" for layer in layers for part in _ATTENTION]
        else:
            wanted = [f"{layer}.out_proj" for layer in layers[:1] if not any(name.endswith(".out_proj") for name in there)]
        width = next((shape[1] for shape in there.values()), 0)  # CLIP's attention is as wide inside as outside
        zeros |= {n: LowRankPair(torch.zeros(1, width), torch.zeros(width, 1)) for n in wanted if n not in there}
    return zeros


def flattened(path: str, *, xl: bool) -> str:
    """Return kohya's name of a module of a UNet or CLIP text encoder: `lora_unet_mid_block_attentions_0_...`.

    Args:
        path: the path, with the component before it and, for a text encoder, with `text_model` in it.
        xl: whether it is of Stable Diffusion XL, whose first text encoder is `te1`, not `te`.

    Raises:
        ValueError: the module has no such name.
    """
    component, _, rest = path.partition(".")
    encoders = {"text_encoder": "lora_te1_" if xl else "lora_te_", "text_encoder_2": "lora_te2_"}
    prefix = ({"unet": "lora_unet_"} | encoders).get(component)
    name = rest.replace(".", "_")
    of_clip = rest.startswith(("text_model.", "text_projection"))
    if prefix is None or unflattened(name) != rest or (component in encoders and not of_clip):
        raise ValueError(f"{path}: kohya's keys have names for the UNet and CLIP text encoders of Stable Diffusion only")
    return prefix + name


def has_name(module: str) -> bool:
    """Return whether a module has a name in kohya's keys."""
    try:
        return bool(flattened(canonical(module), xl=False))
    except ValueError:
        return False


def _alpha(pairs: Mapping[str, LowRankPair], component: str) -> float:
    """Return the alpha that most layers of a component have."""
    there = [pair.scale * pair.rank for name, pair in pairs.items() if name.startswith(f"{component}.")]
    return Counter(float(f"{alpha:.6g}") for alpha in there if alpha).most_common(1)[0][0] if any(there) else 1.0
