"""Load image classification datasets by name."""

from loca_vision.data.load import NAMES, load

__all__ = ["NAMES", "load"]
