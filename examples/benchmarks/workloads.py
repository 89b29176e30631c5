"""The benchmarks' models: a ViT that classifies, and the noise-predicting UNets of Stable Diffusion 1.5 and SDXL.

Weights are random, which costs the same, and created on their device. A model is made once and all methods share its tensors,
since those of Stable Diffusion 1.5 take 3.4 GB. timm and diffusers are imported only by the functions that need them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rounds import check_positive

WIDTHS = (320, 640, 1280, 1280)
USUAL: dict[str, dict[str, Any]] = {
    "vit": {"batch_size": 8, "n_components": 3000},
    "unet": {"batch_size": 2, "n_components": 1000},
    "sdxl": {"batch_size": 1, "n_components": 1000},
}


@dataclass(frozen=True)
class Job:
    """The model, batch and adapters of a benchmark."""

    workload: Literal["vit", "unet", "sdxl"] = "vit"
    """A ViT, query and value adapted; or the UNet of Stable Diffusion 1.5 or of SDXL, query, key, value and output."""
    model: str = "vit_base_patch16_224"
    """A timm model with fused qkv layers, for `vit`."""
    widths: tuple[int, int, int, int] = WIDTHS
    """Channels of the UNet's blocks; multiples of 32. The UNet of SDXL uses the first three."""
    size: int = 32
    """Height and width of the UNet's latents; 64 is a picture of 512 pixels."""
    batch_size: int | None = None
    """Images or latents per step; by default 8 for a ViT, 2 for the UNet and 1 for SDXL's."""
    n_components: int | None = None
    """Components per projection (per layer for peft's FourierFT); by default 3000 for a ViT and 1000 for the UNets."""
    rank: int = 16
    """Rank r of LoRA and SeLoRA."""
    autocast: Literal["none", "bfloat16", "float16"] = "none"
    """Precision of the forward pass; weights are float32."""

    def __post_init__(self) -> None:
        check_positive(self, "widths", "size", "batch_size", "n_components", "rank")
        if any(width % 32 for width in self.widths):
            raise ValueError(f"widths={self.widths}: multiples of 32")


Some = TypeVar("Some", bound=Job)


def settled(job: Some) -> Some:
    """Return the same job with all defaults filled in."""
    return replace(job, **{name: value for name, value in USUAL[job.workload].items() if getattr(job, name) is None})


@dataclass(frozen=True)
class Workload:
    """A model, a batch, and how to adapt it.

    Args:
        base: the model, frozen except for its head; never trained itself.
        inputs: the batch's inputs, which require a gradient so that no backward pass stops halfway.
        loss: returns the loss of a model on the batch.
        head: the name of the module that is trained with the adapters, or None.
        targets: the projections that this library adapts.
        layers: the layers that peft adapts.
    """

    base: nn.Module
    inputs: Tensor
    loss: Callable[[nn.Module], Tensor]
    head: str | None
    targets: tuple[str, ...]
    layers: tuple[str, ...]

    def model(self) -> Any:
        """Return a model to adapt, which shares the base's tensors but has its own head."""
        return on_tensors_of(self.base, lambda name: self.head is not None and name.startswith(f"{self.head}."))


def on_tensors_of(model: nn.Module, own: Callable[[str], bool] = lambda name: False) -> Any:
    """Return a copy of a model that shares its parameters, except those whose names satisfy `own`."""
    return copy.deepcopy(model, {id(tensor): tensor for name, tensor in model.named_parameters() if not own(name)})


def held(model: nn.Module, base: nn.Module) -> float:
    """Return the MB that the model holds beyond the base: the adapters' tensors, and everything that LoCA caches."""
    notes = [vars(module).get(name) for module in model.modules() for name in ("_cached", "_kept")]
    kept = [tensor for note in notes for tensor in _tensors_in(note)]
    shared = {tensor.data_ptr() for tensor in base.parameters()}
    own = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *kept)}
    return sum(size for place, size in own.items() if place not in shared) / 1e6


def _tensors_in(note: Any) -> Iterator[Tensor]:
    if isinstance(note, Tensor):
        yield note
    elif isinstance(note, list | tuple | dict):
        for part in note.values() if isinstance(note, dict) else note:
            yield from _tensors_in(part)
    elif type(note).__module__.startswith("loca_vision."):
        yield from _tensors_in(vars(note))


def workload(job: Job) -> Workload:
    """Return the workload of a settled job, on the GPU if there is one, with the same numbers at every call."""
    torch.manual_seed(0)
    return {"vit": _vit, "unet": _unet, "sdxl": _sdxl}[job.workload](job, device_here())


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _vit(job: Job, device: torch.device) -> Workload:
    import timm

    with device:
        base: Any = timm.create_model(job.model, num_classes=10).requires_grad_(False).train()
    channels, height, width = base.pretrained_cfg["input_size"]
    images = torch.randn(job.batch_size or 1, channels, height, width, device=device, requires_grad=True)
    labels = torch.arange(len(images), device=device) % 10

    def loss(model: nn.Module) -> Tensor:
        with precision(job, device):
            return F.cross_entropy(model(images), labels)

    return Workload(base, images, loss, "head", ("q", "v"), ("qkv",))


def _unet(job: Job, device: torch.device) -> Workload:
    with device:
        base = unet(job.widths).train()
    return _denoising(job, device, base)


def _sdxl(job: Job, device: torch.device) -> Workload:
    with device:
        base = sdxl_unet(job.widths[:3]).train()
        more = {"text_embeds": torch.randn(job.batch_size or 1, 1280), "time_ids": torch.zeros(job.batch_size or 1, 6)}
    return _denoising(job, device, base, added_cond_kwargs=more)


def _denoising(job: Job, device: torch.device, base: Any, **more: Any) -> Workload:
    shape, width = (job.batch_size or 1, 4, job.size, job.size), base.config.cross_attention_dim
    latents, noise = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)
    times, text = torch.full(shape[:1], 500, device=device), torch.randn(*shape[:1], 77, width, device=device)

    def loss(model: nn.Module) -> Tensor:
        with precision(job, device):
            return F.mse_loss(model(latents, times, text, **more).sample, noise)

    return Workload(base, latents, loss, None, ("q", "k", "v", "out"), ("to_q", "to_k", "to_v", "to_out.0"))


def unet(widths: tuple[int, int, int, int] = WIDTHS) -> Any:
    """Return the UNet of Stable Diffusion 1.5 (860 million weights), or a narrower one, frozen."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, block_out_channels=widths).requires_grad_(False)


def sdxl_unet(widths: tuple[int, ...] = WIDTHS[:3]) -> Any:
    """Return the UNet of SDXL (2.6 billion weights), or a narrower and shallower one, frozen."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10) if widths == WIDTHS[:3] else 1,
        attention_head_dim=tuple(max(1, width // 64) for width in widths),  # numbers of heads, despite the name
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=1280 + 6 * 256,
    ).requires_grad_(False)


def precision(job: Job, device: torch.device) -> torch.autocast:
    dtype = torch.bfloat16 if job.autocast == "none" else getattr(torch, job.autocast)
    return torch.autocast(device.type, dtype, enabled=job.autocast != "none")
