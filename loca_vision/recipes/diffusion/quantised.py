"""Frozen weights in 8 or 4 bits under adapters that are trained in float32 (as in QLoRA; Dettmers et al., 2023)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal
from warnings import catch_warnings, simplefilter

import torch

Quantization = Literal["bnb-nf4", "bnb-int8", "torchao-int8", "quanto-int8"]
_LIBRARIES = {
    "bnb": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao", "torchao"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
}


def check_quantization(kind: Quantization) -> None:
    """Check that a quantisation can be used.

    Raises:
        ValueError: the library is not installed, or it needs a GPU that is not there.
    """
    module, package = _LIBRARIES[kind.partition("-")[0]]
    if find_spec(module.partition(".")[0]) is None or find_spec(module) is None:
        raise ValueError(f"--quantization {kind}: it needs {package}; python -m pip install {package}")
    if kind.startswith("bnb") and not torch.cuda.is_available():
        raise ValueError(f"--quantization {kind}: bitsandbytes needs a GPU; torchao-int8 works on processors too")


def quantized(kind: Quantization, component: str, dtype: torch.dtype) -> Any:
    """Return the argument `quantization_config` of a pipeline's `from_pretrained` that quantises one component.

    Args:
        component: such as unet or transformer.
        dtype: the dtype that its layers compute in.

    Raises:
        ValueError: this version of diffusers cannot quantise components of a pipeline.
    """
    import diffusers

    if not hasattr(diffusers, "PipelineQuantizationConfig"):
        raise ValueError(f"--quantization: diffusers {diffusers.__version__} cannot quantise a pipeline; a newer version can")
    with catch_warnings():  # diffusers deprecates optimum-quanto
        simplefilter("ignore", FutureWarning)
        return diffusers.PipelineQuantizationConfig(quant_mapping={component: _config(kind, dtype)})


def _config(kind: Quantization, dtype: torch.dtype) -> Any:
    import diffusers

    if kind == "bnb-nf4":
        return diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if kind == "bnb-int8":
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    if kind == "quanto-int8":
        return diffusers.QuantoConfig(weights_dtype="int8")
    from torchao.quantization import Int8WeightOnlyConfig

    return diffusers.TorchAoConfig(Int8WeightOnlyConfig())
