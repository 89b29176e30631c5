"""How close a picture is to another or to a text: PSNR and SSIM always, LPIPS and CLIP if their weights are available."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from loca_vision.messages import one_line

SMALLEST, SMALLEST_LPIPS = 11, 64  # pixels a side: the window of SSIM, and the least that AlexNet can process


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of RGB in [0, 1] in dB: 10 log10(1 / mean squared error); infinity if equal.

    Raises:
        ValueError: the pictures have different sizes.
    """
    _check_sizes(one, other, 1)
    return float(peak_signal_noise_ratio(_pixels(one), _pixels(other), data_range=1.0))


def ssim(one: Image.Image, other: Image.Image) -> float:
    """Return the structural similarity in [-1, 1], 1 if equal: Wang et al., 2004, the mean of red, green and blue.

    The window is theirs: 11 x 11, a Gaussian of 1.5 pixels, only where it lies entirely in the picture.

    Raises:
        ValueError: the pictures have different sizes, or a side shorter than 11 pixels.
    """
    _check_sizes(one, other, SMALLEST)
    pair = (_pixels(one), _pixels(other))
    everywhere: Any = structural_similarity_index_measure(*pair, data_range=1.0, return_full_image=True)
    margin = SMALLEST // 2  # some versions of torchmetrics include the margin, where the window covers a mirrored border
    return float(everywhere[1][..., margin:-margin, margin:-margin].mean())


class Perceptual:
    """LPIPS (Zhang et al., 2018) on AlexNet: from 0 for equal pictures up.

    Raises:
        ModuleNotFoundError: torchmetrics or torchvision is missing.
        OSError: AlexNet's weights are not available and cannot be downloaded.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.device = torch.device(device)
        try:
            self.metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(self.device)
        except (OSError, RuntimeError) as error:  # no connection, a full disk, or another hash than torchvision's
            raise OSError(f"the weights of AlexNet are not available ({one_line(error, 200)})") from error

    @torch.no_grad()
    def __call__(self, one: Image.Image, other: Image.Image) -> float:
        """Return the distance of two pictures.

        Raises:
            ValueError: they have different sizes, or a side shorter than 64 pixels.
        """
        _check_sizes(one, other, SMALLEST_LPIPS)
        distance: Any = self.metric(*(_pixels(image).float().to(self.device) for image in (one, other)))
        self.metric.reset()  # otherwise it would keep every pair
        return float(distance)


class Clip:
    """Pictures and texts as directions in the space of a CLIP model (Radford et al., 2021); `similarity` compares two.

    Args:
        source: a folder, or the name of a model on the hub, with its tokenizer and its image processor.
        device: the device to compute on, in float32.

    Raises:
        ModuleNotFoundError: transformers is missing.
        OSError: it is not available, or is not a CLIP model in safetensors files.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.device, place = torch.device(device), str(Path(source).expanduser()) if Path(source).exists() else str(source)
        try:
            model: Any = CLIPModel.from_pretrained(place, use_safetensors=True)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(place)
            self.processor: Any = CLIPImageProcessor.from_pretrained(place)
        except (OSError, ValueError, TypeError, KeyError) as error:  # transformers raises different errors for the same fault
            raise OSError(f"{source}: it cannot be read as a CLIP model ({one_line(error, 200)})") from error
        self.model = model.to(self.device, torch.float32).eval()

    @torch.no_grad()
    def image(self, image: Image.Image) -> Tensor:
        """Return the direction of a picture: (width,) float32 on the CPU, of length 1."""
        pixels = self.processor(images=image.convert("RGB"), return_tensors="pt").pixel_values.to(self.device)
        return _unit(self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output))

    @torch.no_grad()
    def text(self, text: str) -> Tensor:
        """Return the direction of a text, truncated to what the model takes: (width,) float32 on the CPU, of length 1."""
        most = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(text, max_length=most, truncation=True, return_tensors="pt").to(self.device)
        return _unit(self.model.text_projection(self.model.text_model(**words).pooler_output))


def similarity(one: Tensor, other: Tensor) -> float:
    """Return the cosine between two directions of `Clip`, in [-1, 1]."""
    return max(-1.0, min(1.0, float(one.double() @ other.double())))


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows[0].float(), dim=0).cpu()


def _pixels(image: Image.Image) -> Tensor:
    """Return (1, 3, h, w) float64 in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].double() / 255


def _check_sizes(one: Image.Image, other: Image.Image, least: int) -> None:
    if one.size != other.size:
        sizes = " and ".join(f"{image.width} x {image.height}" for image in (one, other))
        raise ValueError(f"pictures of {sizes} pixels: those that are compared have one size")
    if min(one.size) < least:
        raise ValueError(f"pictures must have at least {least} pixels a side, got {one.width} x {one.height}")


def finite(value: float) -> float | None:
    """Return the value, or None if JSON has no number for it, as for the PSNR of equal pictures."""
    return value if math.isfinite(value) else None
