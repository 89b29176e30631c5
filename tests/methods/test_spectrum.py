"""A spectrum: where its components start, that they can reach every cell, and that nothing rounds them."""

import copy
import pickle

import pytest
import torch

from loca_vision.methods.locations import cell_locations
from loca_vision.methods.spectrum import Spectrum, random_spectrum


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (6, 5), (33, 64)])
@pytest.mark.parametrize("share", (0.1, 0.5, 1.0))
def test_first_cells_are_different_and_inside(shape, share):
    count = max(1, int(share * shape[0] * shape[1]))
    spectrum = random_spectrum(shape, count, name="blocks.0.attn.q", seed=0)
    flat = spectrum.cells[:, 0] * shape[1] + spectrum.cells[:, 1]
    assert len(flat.unique()) == count
    assert flat.min() >= 0 and flat.max() < shape[0] * shape[1]
    assert spectrum.locations.min() >= 0 and spectrum.locations.max() <= 1
    assert torch.equal(spectrum.coefficients, torch.zeros(count))


def test_every_cell_is_as_likely_as_any_other():
    drawn = torch.cat([random_spectrum((4, 5), 3, name="q", seed=seed).cells for seed in range(2000)])
    counts = torch.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=20)
    assert counts.sum() == 6000
    # chi-square with 19 degrees of freedom: 43.8 is exceeded once in a thousand draws, and the seeds are fixed.
    assert ((counts - 300) ** 2 / 300).sum() < 43.8


def test_start_depends_on_seed_and_name_only():
    def start(name, seed):
        return random_spectrum((20, 20), 10, name=name, seed=seed).locations

    assert torch.equal(start("a", 1), start("a", 1))
    assert not torch.equal(start("a", 1), start("b", 1))
    assert not torch.equal(start("a", 1), start("a", 2))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (768, 768), (3072, 4096)])
def test_cells_survive_the_way_to_locations_and_back(shape):
    flat = torch.randint(shape[0] * shape[1], (5000,))
    flat[:2] = torch.tensor([0, shape[0] * shape[1] - 1])
    spectrum = Spectrum(shape, torch.zeros(5000), cell_locations(flat, shape), scale=1.0)
    assert torch.equal(spectrum.cells[:, 0] * shape[1] + spectrum.cells[:, 1], flat)


def test_every_cell_can_be_reached_and_locations_stay_inside():
    spectrum = Spectrum((5, 3), torch.zeros(2), torch.tensor([[-0.4, 1.7], [1.0, 0.0]]), scale=1.0)
    assert spectrum.cells.tolist() == [[0, 2], [4, 0]]
    spectrum.confine()
    assert spectrum.locations.tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_other_precisions_leave_coefficients_and_locations_alone(convert):
    spectrum = random_spectrum((40, 40), 30, name="q", seed=0)
    spectrum.coefficients.data.normal_()
    before = [p.detach().clone() for p in spectrum.parameters()]
    convert(torch.nn.Sequential(spectrum))
    for old, new in zip(before, spectrum.parameters(), strict=True):
        assert new.dtype == torch.float32
        assert torch.equal(old, new)


def test_it_follows_to_another_device():
    spectrum = random_spectrum((4, 4), 3, name="q", seed=0).to(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in spectrum.parameters()} == {("meta", torch.float32)}


def test_the_norm_is_scale_times_the_coefficients_norm():
    """Parseval: atoms of different cells are orthonormal, so scale means the same at every width."""
    for width in (16, 48, 200):
        spectrum = random_spectrum((width, width), 12, name="q", seed=0, scale=3.0)
        spectrum.coefficients.data.normal_()
        assert spectrum.delta().norm().item() == pytest.approx(3.0 * spectrum.coefficients.norm().item(), rel=1e-5)


def test_a_diverged_training_shows_in_the_loss_and_not_in_an_index():
    spectrum = random_spectrum((6, 5), 4, name="q", seed=0)
    spectrum.locations.data[1] = float("nan")
    spectrum.coefficients.data[1] = float("nan")
    spectrum.delta().sum().backward()
    assert spectrum.delta().isnan().any()


def test_neither_default_dtype_nor_device_nor_inference_mode_matters():
    expected = random_spectrum((9, 9), 5, name="q", seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            spectrum = random_spectrum((9, 9), 5, name="q", seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, other in zip(expected.parameters(), spectrum.parameters(), strict=True):
        assert torch.equal(mine, other) and other.dtype == torch.float32 and not other.is_inference()


CHANGES = {
    "in place": lambda s: s.locations.copy_(1 - s.locations),
    "through .data": lambda s: s.locations.data.copy_(1 - s.locations),
    "new data": lambda s: setattr(s.locations, "data", 1 - s.locations.data),
    "a new parameter": lambda s: setattr(s, "locations", torch.nn.Parameter(1 - s.locations)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_follows_from_cells_is_kept_until_they_move(change):
    spectrum = random_spectrum((9, 7), 6, name="q", seed=0)
    spectrum.coefficients.data.normal_()
    first = spectrum.layout
    assert spectrum.layout is first
    with torch.no_grad():
        spectrum.coefficients.mul_(2)
        assert spectrum.layout is first
        change(spectrum)
        kept = spectrum.delta()
    assert spectrum.layout is not first
    assert torch.equal(spectrum.layout.cells, spectrum.cells)
    assert torch.equal(kept, spectrum.delta())  # the one with a graph, which keeps nothing


def test_a_move_within_the_cells_or_back_to_the_border_changes_nothing():
    spectrum = Spectrum((5, 5), torch.ones(2), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    layout = spectrum.layout
    with torch.no_grad():
        spectrum.locations += torch.tensor([[0.01, -0.01], [0.3, -0.3]])
    assert spectrum.layout is layout
    spectrum.confine()
    assert spectrum.layout is layout
    with torch.no_grad():
        spectrum.locations[0, 0] = 0.9
    assert spectrum.layout is not layout


def test_copies_and_pickles_leave_what_is_kept_behind():
    spectrum = random_spectrum((9, 7), 6, name="q", seed=0)
    layout = spectrum.layout
    for other in (copy.deepcopy(spectrum), pickle.loads(pickle.dumps(spectrum))):
        assert other.layout is not layout and torch.equal(other.layout.cells, layout.cells)
    assert spectrum.layout is layout
