"""Selective DCT fine-tuning: its cells against a transcription of the rule, and that they do not move."""

import math

import pytest
import safetensors.torch
import torch
from scipy.fft import dctn

from loca_vision import AlternatingSchedule, SDCTFTConfig, adapters, inject, load_adapter, parameter_groups, save_adapter
from loca_vision.methods.sdctft import allotted, bands
from loca_vision.model.target_checks import targets_for
from support.formulas import stir
from support.timm_models import tiny


class Matrix:
    """What is to be adapted, without a model."""

    def __init__(self, rows, cols, name="blocks.0.attn.q"):
        self.name, self.shape = name, (rows, cols)
        self.values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols))

    def weight(self):
        return self.values


def chosen(config, matrix):
    """The flat cells, in order."""
    (update,) = config.new_updates([matrix])
    return (update.cells[:, 0] * matrix.shape[1] + update.cells[:, 1]).tolist()


def band_of(u, v, rows, cols, n_bands):
    """Which of the bands of equal width, the outermost distance being the largest in the plane."""
    outermost = math.hypot(rows - 1, cols - 1)
    return min(int(math.sqrt(u * u + v * v) / outermost * n_bands), n_bands - 1) if outermost else 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (8, 1), (12, 12), (9, 31)])
@pytest.mark.parametrize("n_bands", (1, 3, 4))
def test_bands(shape, n_bands):
    rows, cols = shape
    found = {int(flat): number for number, band in enumerate(bands(shape, n_bands)) for flat in band}
    cells = [(u, v) for u in range(rows) for v in range(cols)]
    assert found == {u * cols + v: band_of(u, v, rows, cols, n_bands) for u, v in cells}


@pytest.mark.parametrize("shape", [(12, 12), (9, 31), (24, 10)])
@pytest.mark.parametrize("share", (0.0, 0.7, 1.0))
def test_each_band_has_its_best_by_energy_and_the_rest_at_random(shape, share):
    matrix, count = Matrix(*shape), 30
    energy = dctn(matrix.values.double().numpy(), norm="ortho") ** 2
    cells = chosen(SDCTFTConfig(n_components=count, energy_share=share), matrix)
    assert len(set(cells)) == count
    rows, cols = shape
    for number in range(3):
        mine = [flat for flat in cells if band_of(flat // cols, flat % cols, rows, cols, 3) == number]
        band = [(u, v) for u in range(rows) for v in range(cols) if band_of(u, v, rows, cols, 3) == number]
        ranked = sorted(band, key=lambda cell: -energy[cell])
        best = {u * cols + v for u, v in ranked[: round(share * 10)]}
        assert len(mine) == 10 and best <= set(mine)
        if share < 1:
            assert set(mine) != {u * cols + v for u, v in ranked[:10]}


def test_the_random_ones_are_anywhere_in_the_band():
    matrix = Matrix(8, 8)
    drawn = [chosen(SDCTFTConfig(n_components=9, energy_share=0, seed=seed), matrix) for seed in range(300)]
    assert {flat for cells in drawn for flat in cells} == set(range(64))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2), (5, 1), (3, 4), (6, 6)])
@pytest.mark.parametrize("budgets", [None, (1, 0, 0), (0, 0, 1), (0.2, 0.5, 0.3), (0, 1, 0)])
def test_every_count_up_to_all_cells_is_exact(shape, budgets):
    matrix = Matrix(*shape)
    for count in range(1, shape[0] * shape[1] + 1):
        cells = chosen(SDCTFTConfig(n_components=count, budgets=budgets), matrix)
        assert len(set(cells)) == count and max(cells) < shape[0] * shape[1]
    assert sorted(cells) == list(range(shape[0] * shape[1]))


@pytest.mark.parametrize(
    ("count", "shares", "room", "given"),
    [
        (9, (1, 1, 1), (9, 9, 9), [3, 3, 3]),
        (10, (1, 1, 1), (9, 9, 9), [3, 4, 3]),
        (10, (0.5, 0.3, 0.2), (9, 9, 9), [5, 3, 2]),
        (9, (1, 1, 1), (1, 9, 9), [1, 5, 3]),  # to the next
        (9, (1, 1, 1), (9, 9, 1), [5, 3, 1]),  # and round
        (7, (0, 0, 1), (9, 9, 7), [0, 0, 7]),
        (6, (0, 0, 1), (2, 9, 1), [2, 3, 1]),
    ],
)
def test_shares(count, shares, room, given):
    assert allotted(count, shares, room) == given


def test_cells_depend_on_weight_seed_and_name():
    config = SDCTFTConfig(n_components=12)
    first = chosen(config, Matrix(9, 8))
    assert chosen(config, Matrix(9, 8)) == first
    assert chosen(SDCTFTConfig(n_components=12, seed=1), Matrix(9, 8)) != first
    assert chosen(config, Matrix(9, 8, "blocks.1.attn.q")) != first
    other = Matrix(9, 8)
    other.values = -other.values.flip(0, 1).square()
    assert chosen(SDCTFTConfig(n_components=12, energy_share=1), other) != first


def test_of_a_fused_weight_only_the_projection_s_own_rows_count(vit):
    weights = {target.name: target.weight() for target in targets_for(vit, SDCTFTConfig(n_components=1))}
    inject(vit, SDCTFTConfig(n_components=1, n_bands=1, energy_share=1))
    for name, update in adapters(vit).items():
        energy = dctn(weights[name].double().numpy(), norm="ortho") ** 2
        assert update.cells.tolist() == [list(divmod(int(energy.argmax()), 48))]


def test_no_schedule_and_no_optimiser_moves_a_cell(vit, images, tmp_path):
    inject(vit, SDCTFTConfig(n_components=30))
    stir(vit)
    before = {name: update.locations.detach().clone() for name, update in adapters(vit).items()}
    groups = parameter_groups(vit, lr=0.1, location_lr=0.5)
    assert [group["name"] for group in groups] == ["coefficients", "head"]
    schedule = AlternatingSchedule(vit, coefficient_steps=1, location_steps=1, learning_steps=4)
    optimiser = torch.optim.AdamW(groups)
    for _ in range(6):
        vit(images).square().sum().backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    assert all(torch.equal(update.locations, before[name]) for name, update in adapters(vit).items())
    tensors = safetensors.torch.load_file(save_adapter(vit, tmp_path))
    for name, update in adapters(vit).items():
        assert tensors[f"{name}.locations"].tolist() == (update.cells[:, 0] * 48 + update.cells[:, 1]).tolist()
    fresh = tiny("vit")
    for parameter in fresh.parameters():
        parameter.data.neg_().add_(1)  # stored, not chosen anew: of these weights others would be
    load_adapter(fresh, tmp_path)
    for name, update in adapters(fresh).items():
        assert torch.equal(update.cells, adapters(vit)[name].cells)


WRONG = [
    *(("n_bands", 0), ("n_bands", 2.0), ("energy_share", 1.1), ("energy_share", float("nan")), ("scale", 0), ("seed", 1.5)),
    *(("budgets", (1, 1)), ("budgets", (0, 0, 0)), ("budgets", (1, -1, 1)), ("budgets", "abc"), ("budgets", 3)),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_wrong_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        SDCTFTConfig(**{field: value})


def test_more_components_than_cells_are_refused():
    with pytest.raises(ValueError, match=r"n_components=13: blocks.0.attn.q has 3 x 4 = 12 cells"):
        SDCTFTConfig(n_components=13).new_updates([Matrix(3, 4)])
