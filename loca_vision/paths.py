"""The costs by which a way is chosen; assign to an entry of COSTS to change them."""

from loca_vision.functional.cost_model import COSTS, Costs

__all__ = ["COSTS", "Costs"]
