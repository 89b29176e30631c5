"""Calculate the memory that a run needs from configurations alone: no weights are read, and only some kilobytes downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import nn

from loca_vision.model.inject import inject
from loca_vision.model.traversal import all_updates
from loca_vision.recipes.diffusion.checks import adapter_of
from loca_vision.recipes.diffusion.loading import Source
from loca_vision.recipes.text_to_image.recipe import ImageRecipe
from peft_image_gen_protocol import Protocol

KLEIN = "Flux2KleinPipeline"
SMALL = 500_000_000  # bytes of weights that are still reasonable to train on a CPU
_OF_A_TRAINED_NUMBER = 16  # bytes: parameter, gradient and AdamW's two moments, in float32


@dataclass(frozen=True)
class Needs:
    """The memory that a run needs.

    Args:
        weights: bytes of the weights of transformer, text_encoder, vae and dino.
        trained: the number of trained parameters.
        base: the number of parameters of the transformer, without the trained ones.
        projections: the adapted projections.
    """

    weights: dict[str, int]
    trained: int
    base: int
    projections: tuple[str, ...]

    @property
    def encoding(self) -> int:
        """Bytes on the device while images and texts are encoded: everything."""
        return sum(self.weights.values()) + 4 * self.trained

    @property
    def training(self) -> int:
        """Bytes on the device during training, without activations."""
        return self.weights["transformer"] + self.weights["dino"] + _OF_A_TRAINED_NUMBER * self.trained

    def said(self) -> str:
        """Return a readable summary."""
        parts = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in self.weights.items())
        return (
            f"weights, by calculation: {parts}; {self.trained:,} trained numbers\n"
            f"on the device at once: {self.encoding / 1e9:.3g} GB while images and texts are encoded, "
            f"{self.training / 1e9:.3g} GB and activations in training"
        )

    def check(self) -> None:
        """Check that the run fits on this machine.

        Raises:
            ValueError: the weights do not fit on the machine's GPU, or it has no GPU and they are too large for its CPU.
        """
        if not torch.cuda.is_available():
            if sum(self.weights.values()) > SMALL:
                raise ValueError(
                    f"expected a GPU for {sum(self.weights.values()) / 1e9:.3g} GB of weights, got none: "
                    "750 steps would take a processor weeks"
                )
            return
        there, most = torch.cuda.get_device_properties(0).total_memory, max(self.encoding, self.training)
        if there < most:
            raise ValueError(f"expected a GPU with over {most / 1e9:.3g} GB, got one with {there / 1e9:.3g} GB")


def needs_of(protocol: Protocol, recipe: ImageRecipe) -> Needs:
    """Calculate the needs of a run.

    Args:
        recipe: the resolved recipe, whose adapter is counted.

    Raises:
        OSError: a configuration is not available, for example without a network.
        ValueError: the base is not a pipeline of FLUX.2 klein, or the adapter does not fit it.
    """
    place = Source(protocol.base, what="a text-to-image pipeline")
    if (name := place.class_name()) != KLEIN:
        raise ValueError(f"{protocol.base}: expected a {KLEIN}, got a {name}")
    transformer = _empty_diffusers(Flux2Transformer2DModel, place.place, "transformer")
    sizes = {
        "transformer": numbers(transformer),
        "text_encoder": numbers(_empty_transformers("AutoModelForCausalLM", place.place, subfolder="text_encoder")),
        "vae": numbers(_empty_diffusers(AutoencoderKLFlux2, place.place, "vae")),
    }
    projections = inject(transformer, adapter_of(recipe))
    updates = all_updates(transformer)
    trained = sum(p.numel() for one in updates for p in (*one.trainable(), *one.location_parameters()))
    width = 4 if protocol.dtype == "float32" else 2
    weights = {part: width * count for part, count in sizes.items()}
    weights["dino"] = 4 * numbers(_empty_transformers("AutoModel", protocol.dino))
    return Needs(weights, trained, sizes["transformer"], projections)


def numbers(model: nn.Module) -> int:
    """Return the number of a model's parameters; shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _empty_diffusers(cls: Any, place: str, part: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = cls.from_config(cls.load_config(place, subfolder=part))
    return model


def _empty_transformers(kind: str, place: str, **where: str) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(place, **where)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, kind).from_config(config)
    return model
