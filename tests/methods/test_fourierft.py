"""FourierFT, against the definition of the transform and against peft's layer."""

import pytest
import torch
from peft import FourierFTConfig as PeftConfig
from peft import get_peft_model
from torch import nn

from loca_vision import FourierFTConfig, adapters, inject
from loca_vision.functional.cosine_atoms import Cells
from loca_vision.functional.fourier import inverse_real
from loca_vision.methods.fourierft import FourierSpectrum
from loca_vision.methods.locations import cell_locations
from support.formulas import fourier_inverse, spread

SHAPES = [(1, 1), (1, 6), (7, 1), (2, 2), (5, 5), (6, 6), (6, 9), (9, 4), (33, 64)]
CONFIG = FourierFTConfig(n_components=30, scale=60.0)


def own_mirror(u, v, shape):
    return 2 * u % shape[0] == 0 and 2 * v % shape[1] == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_every_cell_gives_the_real_part_of_the_inverse_transform(shape):
    """All cells at once, those that are their own mirror image among them, and one of them twice."""
    flat = torch.cat([torch.arange(shape[0] * shape[1]), torch.tensor([0])])
    values = torch.randn(len(flat), dtype=torch.float64)
    cells = torch.stack([flat // shape[1], flat % shape[1]], 1)
    torch.testing.assert_close(inverse_real(values, Cells(cells, shape)), fourier_inverse(spread(values, flat, shape)))


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (5, 3), (4, 5)])
def test_norms_of_the_atoms(shape):
    for u in range(shape[0]):
        for v in range(shape[1]):
            spectrum = FourierSpectrum(shape, torch.ones(1), cell_locations(torch.tensor([u * shape[1] + v]), shape), scale=2.0)
            cells = shape[0] * shape[1]
            wanted = 2.0 / (cells if own_mirror(u, v, shape) else 2 * cells) ** 0.5
            assert spectrum.delta().norm().item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape):
    flat = torch.randperm(shape[0] * shape[1])[:7]
    cells = torch.stack([flat // shape[1], flat % shape[1]], 1)
    values = torch.randn(len(flat), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: inverse_real(values, Cells(cells, shape), norm="ortho"), values)


@pytest.mark.parametrize("shape", [(1, 6), (6, 6), (5, 5), (12, 7), (7, 12), (48, 144)])
def test_it_is_peft_s_layer(shape):
    """Given the cells and the coefficients that peft has drawn: values, and gradients of the coefficients and of x."""
    count = min(20, shape[0] * shape[1])
    linear = nn.Sequential(nn.Linear(shape[1], shape[0]))
    theirs = get_peft_model(linear, PeftConfig(n_frequency=count, scaling=150.0, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    coefficients = layer.fourierft_spectrum["default"]
    (rows, cols), x = layer.indices["default"], torch.randn(3, shape[1], requires_grad=True)
    locations = cell_locations(rows * shape[1] + cols, shape)
    mine = FourierSpectrum(shape, coefficients.detach().clone(), locations, scale=150.0)
    torch.testing.assert_close(mine.delta(), layer.get_delta_weight("default"), rtol=1e-6, atol=1e-6)

    def answer_of_mine():
        return nn.functional.linear(x, layer.base_layer.weight.detach() + mine.delta(), layer.base_layer.bias.detach())

    direction = torch.randn(3, shape[0])
    ours = torch.autograd.grad(answer_of_mine(), (mine.coefficients, x), direction)
    peft_s = torch.autograd.grad(theirs(x), (coefficients, x), direction)
    for one, other in zip(ours, peft_s, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer_of_mine(), theirs(x), rtol=1e-5, atol=1e-5)


def test_cells_are_different_drawn_from_seed_and_name_and_stay(vit, build):
    inject(vit, CONFIG)
    again = build("vit")
    inject(again, CONFIG)
    cells = {name: update.cells.tolist() for name, update in adapters(vit).items()}
    assert cells == {name: update.cells.tolist() for name, update in adapters(again).items()}
    assert len({str(of) for of in cells.values()}) == len(cells) == 4
    assert all(len({tuple(cell) for cell in of}) == 30 for of in cells.values())
    assert not any(update.locations.requires_grad for update in adapters(vit).values())


def test_coefficients_drawn_from_the_normal_distribution(vit):
    inject(vit, FourierFTConfig(n_components=2000, coefficient_init="normal"))
    drawn = torch.cat([update.coefficients.detach() for update in adapters(vit).values()])
    assert drawn.mean().abs() < 0.05 and abs(drawn.std() - 1) < 0.05
    assert len(drawn.unique()) > 7900


@pytest.mark.parametrize(
    ("field", "value"),
    [("scale", 0), ("scale", float("nan")), ("n_components", 0), ("coefficient_init", "ones"), ("seed", -1), ("targets", "q")],
)
def test_wrong_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        FourierFTConfig(**{field: value})
