"""The costs that determine how an update is computed; assign to an entry of COSTS to change them."""

from loca_vision.functional.cost_model import COSTS, Costs

__all__ = ["COSTS", "Costs"]
