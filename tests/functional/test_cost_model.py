"""The decisions of the cost model: properties that hold for any constants."""

import dataclasses

import pytest
import torch

import loca_vision.functional.cost_model as paths
from loca_vision.functional.cost_model import COSTS, Workload, choose
from loca_vision.functional.packed_dct import pieces
from support.strategies import FREE

CPU, FLOAT = torch.device("cpu"), torch.float32


def costs(**given):
    return dataclasses.replace(FREE, **given)


def decides(monkeypatch, asked, costs, tokens=1000, device=CPU, dtype=FLOAT):
    monkeypatch.setattr(paths, "COSTS", {"cpu": costs})
    return [choice.strategy for choice in choose(asked, tokens, device, dtype)]


def test_a_device_without_costs_takes_the_whole_gradient(monkeypatch):
    assert decides(monkeypatch, [Workload((768, 768), 10, 1)], costs(product=1), device=torch.device("meta")) == ["whole"]
    assert choose([], 10, CPU, FLOAT) == []


def test_no_tokens_leave_no_choice(monkeypatch):
    assert decides(monkeypatch, [Workload((96, 96), 10, 1)], costs(add=1), tokens=0) == ["whole"]


def test_the_cheaper_way_is_taken(monkeypatch):
    asked = [Workload((96, 96), 50, 1)]
    assert decides(monkeypatch, asked, costs(product=1)) == ["sampled"]
    assert decides(monkeypatch, asked, costs(product=1, dot=1e6)) == ["whole"]
    assert decides(monkeypatch, asked, costs(add=1)) == ["applied"]
    assert decides(monkeypatch, asked, costs(product=1, add=1)) == ["applied"]
    assert decides(monkeypatch, asked, costs(product=1, add=1, spread=1)) == ["sampled"]


@pytest.mark.parametrize("tokens", (16, 64, 256, 1024, 4096))
def test_nothing_is_built_where_tokens_are_few(tokens, monkeypatch):
    """A matrix is as many vectors as it has rows; tokens are transformed twice as often, and there are gradients to pass on."""
    asked = [Workload((1280, 1280), 1000, 1)]
    way = decides(monkeypatch, asked, costs(product=1, transform=1), tokens=tokens)
    assert way == (["applied"] if 3 * tokens < 1280 else ["sampled"])


def test_the_chosen_ways_are_the_cheapest(monkeypatch):
    """Against all combinations, written out: for each projection its way, and what those share who are transformed."""
    for tokens, cells, count in ((32, 100, 1), (200, 100, 2), (700, 3000, 1), (3000, 3000, 3), (3000, 9000, 2)):
        found = choose([Workload((256, 192), cells, 1)] * count, tokens, CPU, FLOAT)
        total = {way: count * found[0].seconds[way] for way in ("whole", "sampled", "applied")}
        assert total[found[0].strategy] == min(total.values())


def test_what_asks_for_nothing_gets_nothing_sampled(monkeypatch):
    asked = [Workload((96, 96), 50, 0), Workload((96, 96), 50, 1)]
    assert decides(monkeypatch, asked, costs(product=1)) == ["whole", "sampled"]


def test_projections_share_the_transform_of_their_activations(monkeypatch):
    """One alone does not pay for it: outputs few, inputs many. Together they do."""
    one, spread = Workload((16, 4096), 1, 1), 1e6  # so that nothing is applied
    assert decides(monkeypatch, [one], costs(product=1, transform=1.1, spread=spread)) == ["sampled"]
    assert decides(monkeypatch, [one], costs(product=1, transform=2, spread=spread)) == ["whole"]
    assert decides(monkeypatch, [one, one], costs(product=1, transform=2, spread=spread)) == ["sampled", "sampled"]


def test_each_projection_decides_for_itself(monkeypatch):
    few, many = Workload((96, 96), 10, 1), Workload((96, 96), 9216, 5)
    assert decides(monkeypatch, [few, many], costs(product=1, transform=1e-3, dot=1)) == ["sampled", "whole"]


def test_half_precision_has_its_own_product(monkeypatch):
    asked, known = [Workload((96, 96), 10, 1)], costs(product=1, half_product=1e-9, transform=1e-3, spread=1)
    assert decides(monkeypatch, asked, known) == ["sampled"]
    assert decides(monkeypatch, asked, known, dtype=torch.bfloat16) == ["whole"]


def test_threads_share_the_products_and_some_of_the_transforms():
    one = costs(product=1, dot=1, transform=1, serial=0.4)
    four = one.of_threads(4)
    assert (four.product, four.dot) == (0.25, 0.25)
    assert four.transform == pytest.approx(0.4 + 0.6 / 4)
    assert one.of_threads(1) == one


def test_costs_that_ship_are_positive():
    assert all(value > 0 for known in COSTS.values() for name, value in vars(known).items() if name != "launch")
    assert COSTS["cpu"].launch == 0  # so that nothing is built together there


def test_updates_are_built_together_where_starting_operations_is_what_costs(monkeypatch):
    asked = [Workload((96, 96), 50, 1)] * 2
    assert decides(monkeypatch, asked, costs(launch=1)) == ["together"] * 2
    assert decides(monkeypatch, asked, costs(launch=1, product=1)) == ["sampled"] * 2
    assert decides(monkeypatch, asked, costs(product=1e-9, transform=1, spread=1)) == ["whole"] * 2  # where that costs nothing
    half = decides(monkeypatch, asked, costs(launch=1, half_product=1, product=1e-9), dtype=torch.bfloat16)
    assert half == ["sampled"] * 2


def test_accelerators_without_costs_build_together():
    assert [paths.builds_together(torch.device(name)) for name in ("cpu", "meta", "cuda", "mps")] == [False, False, True, True]
    with paths.using("together"):
        assert paths.builds_together(CPU)
        assert choose([Workload((9, 9), 5, 1)], 10, CPU, FLOAT)[0].strategy == "together"
    with paths.using("whole"):
        assert not paths.builds_together(torch.device("cuda"))


@pytest.mark.parametrize("width", (1, 31, 768, 4096, 10**6))
@pytest.mark.parametrize("count", (0, 1, 100, 5000))
def test_pieces_are_neither_tiny_nor_huge_and_the_whole_together(width, count):
    found = pieces(count, width, 2)
    assert [place for start, end in found for place in range(start, end)] == list(range(count))
    assert all((end - start) % 16 == 0 and 32 <= end - start <= 768 for start, end in found[:-1])
