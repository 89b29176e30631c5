"""What the model of costs decides: properties that hold whatever its constants are."""

import dataclasses

import pytest
import torch

import loca_vision.paths as paths
from loca_vision.paths import COSTS, Asked, Costs, choose, tokens_at_once

CPU, FLOAT = torch.device("cpu"), torch.float32
ONE = Costs(product=1, half_product=1, transform=1, tokens=1, dot=1, cell=0, piece=0)


def decides(monkeypatch, asked, costs, tokens=1000, device=CPU, dtype=FLOAT):
    monkeypatch.setattr(paths, "COSTS", {"cpu": costs})
    return [choice.sampled for choice in choose(asked, tokens, device, dtype)]


def test_a_device_without_costs_takes_the_whole_gradient(monkeypatch):
    assert decides(monkeypatch, [Asked((768, 768), 10, 1)], ONE, device=torch.device("meta")) == [False]
    assert choose([], 10, CPU, FLOAT) == []


def test_the_cheaper_way_is_taken(monkeypatch):
    asked = [Asked((96, 96), 50, 1)]
    cheap = dataclasses.replace(ONE, tokens=0, dot=0)
    assert decides(monkeypatch, asked, cheap) == [True]
    assert decides(monkeypatch, asked, dataclasses.replace(cheap, dot=1e6)) == [False]


def test_what_asks_for_nothing_gets_nothing_sampled(monkeypatch):
    asked = [Asked((96, 96), 50, 0), Asked((96, 96), 50, 1)]
    assert decides(monkeypatch, asked, dataclasses.replace(ONE, tokens=0, dot=0)) == [False, True]


def test_projections_share_the_transform_of_their_activations(monkeypatch):
    """One alone does not pay for it: outputs few, inputs many. Together they do."""
    one = Asked((16, 4096), 1, 1)
    costs = dataclasses.replace(ONE, product=1, transform=0, tokens=1.1, dot=0)
    assert decides(monkeypatch, [one], costs) == [True]
    costs = dataclasses.replace(costs, tokens=2)
    assert decides(monkeypatch, [one], costs) == [False]
    assert decides(monkeypatch, [one, one], costs) == [True, True]


def test_each_projection_decides_for_itself(monkeypatch):
    few, many = Asked((96, 96), 10, 1), Asked((96, 96), 9216, 5)
    costs = dataclasses.replace(ONE, tokens=1e-3, dot=1)
    assert decides(monkeypatch, [few, many], costs) == [True, False]


def test_half_precision_has_its_own_product(monkeypatch):
    asked, costs = [Asked((96, 96), 10, 1)], dataclasses.replace(ONE, half_product=1e-9, transform=0)
    assert decides(monkeypatch, asked, costs) == [True]
    assert decides(monkeypatch, asked, costs, dtype=torch.bfloat16) == [False]


def test_threads_share_products_and_part_of_the_transforms():
    four = ONE.of_threads(4)
    assert (four.product, four.dot) == (0.25, 0.25)
    assert four.tokens == pytest.approx(0.4 + 0.6 / 4)
    assert ONE.of_threads(1) == ONE


def test_costs_that_ship_are_positive():
    assert all(value > 0 for costs in COSTS.values() for value in dataclasses.astuple(costs))


@pytest.mark.parametrize("width", (1, 31, 768, 4096, 10**6))
def test_pieces_are_neither_tiny_nor_huge(width):
    assert tokens_at_once(width) % 16 == 0 and 32 <= tokens_at_once(width) <= 512
