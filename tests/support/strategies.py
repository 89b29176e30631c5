"""Costs that make the model of `paths.py` choose one given way at all sizes."""

from loca_vision.functional.cost_model import Costs

FREE = Costs(product=0, half_product=0, transform=0, spread=0, dot=0, cell=0, piece=0, add=0)
FORCED = {
    "whole": {},
    "sampled": {"cpu": Costs(**vars(FREE) | {"product": 1, "half_product": 1})},
    "applied": {"cpu": Costs(**vars(FREE) | {"add": 1})},
}
TOGETHER = {"cpu": Costs(**vars(FREE) | {"launch": 1})}
