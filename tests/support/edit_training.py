"""Settings and readers of results for the tests in recipes/editing/train/."""

import json

import numpy as np
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from loca_vision.storage.safetensors_file import open_safetensors
from support import pipelines as tiny
from support.scripts import main

ADAPTER = "pytorch_loca_weights.safetensors"


TRAIN = "instruct_pix2pix/train"


COLUMNS = ("--original_image_column", "before", "--edited_image_column", "after")


PICTURES = ("--validation_inference_steps", "2", "--num_validation_images", "2", "--validation_scales", "0.5", "1")


LOCA = ("--n_components", "10", "--learning_rate", "2e-2", "--location_lr", "1e-2")

LOCA += ("--coefficient_steps", "2", "--location_steps", "1", "--learning_steps", "5")


SMOOTH = ("--center_crop", "--random_flip", "--adam_epsilon", "1e-4")  # so that Adam makes no step of mere rounding


METHODS = {
    "loca": LOCA,
    "sdctft": ("--n_components", "10", "--learning_rate", "2e-2"),
    "fourierft": ("--n_components", "10", "--learning_rate", "2e-2"),
    "lora": ("--rank", "2", "--learning_rate", "1e-2"),
    "selora": ("--rank", "2", "--learning_rate", "1e-2"),
}


def trained(out, *arguments):
    """Train, and return the metrics of the run."""
    assert main(TRAIN, "--output_dir", out, *arguments) == 0
    return json.loads((out / "metrics.json").read_text())


def tensors(file):
    with open_safetensors(file) as opened:
        return opened.tensors()


def picture(file):
    with Image.open(file) as opened:
        return np.asarray(opened)


def weights(out):
    return (out / ADAPTER).read_bytes()


def pipeline(base):
    return tiny.quiet(StableDiffusionInstructPix2PixPipeline.from_pretrained(base, safety_checker=None))
