"""Build timm classifiers, in the same way everywhere."""

from loca_vision.recipes.classification.models import ModelSpec, build_model, check_model_name, data_settings, default_weights

__all__ = ["ModelSpec", "build_model", "check_model_name", "data_settings", "default_weights"]
