"""Labelled images, before any transform."""

from loca_vision.data.images import ImageArrays, ImageFiles, Images, ImageSet, ImageSplits, open_image

__all__ = ["ImageArrays", "ImageFiles", "ImageSet", "ImageSplits", "Images", "open_image"]
