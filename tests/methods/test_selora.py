"""SeLoRA: the count of numbers, their cells, their initial size, and both bases against dense matrices."""

import math
from fractions import Fraction

import pytest
import safetensors.torch
import torch

from loca_vision import SeLoRAConfig, adapters, inject, save_adapter
from support.formulas import factors, numbers, stir
from support.timm_models import tiny

BASES = pytest.mark.parametrize("basis", ("haar", "fft"))


class Matrix:
    """What is to be adapted, without a model."""

    def __init__(self, rows, cols, name="blocks.0.attn.q"):
        self.name, self.shape = name, (rows, cols)

    def weight(self):
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("r", (1, 4, 10))
@pytest.mark.parametrize("eta", ("0", "0.1", "0.2", "0.29", "0.3", "0.55", "0.57", "0.6", "0.7", "0.8", "0.9", "0.95"))
def test_every_factor_has_exactly_the_share_of_numbers(r, eta):
    """eta counts as the decimal that it is written as: in floats, (1 - 0.9) * 100 is a little less than 10."""
    config = SeLoRAConfig(r=r, eta=float(eta))
    for size in (10, 20, 48, 100, 768):
        wanted = math.floor((1 - Fraction(eta)) * r * size)
        if wanted == 0:
            with pytest.raises(ValueError, match=rf"eta={float(eta)}: of {r} x {size} cells none"):
                config.count(size)
        else:
            assert config.count(size) == wanted
    assert SeLoRAConfig(r=10, eta=0.9).count(10) == 10


@BASES
def test_trained_numbers_cells_and_a_start_that_changes_nothing(basis):
    config = SeLoRAConfig(r=4, eta=0.3, basis=basis)
    (update,) = config.new_updates([Matrix(20, 30)])
    counts = {key: value.numel() for key, value in update.named_parameters()}
    assert counts == {"up_coefficients": 56, "down_coefficients": 84}
    for cells, total in ((update.up_cells, 80), (update.down_cells, 120)):
        assert len(cells.unique()) == len(cells) and cells.min() >= 0 and cells.max() < total
    assert torch.count_nonzero(update.up_coefficients) == 0 and torch.count_nonzero(update.down_coefficients) == 84
    assert torch.equal(update.delta(), torch.zeros(20, 30))


@BASES
@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (8, 5), (16, 16), (7, 33)])
@pytest.mark.parametrize("r", (1, 2, 5))
def test_factors_are_the_inverse_transforms(basis, shape, r):
    config = SeLoRAConfig(r=min(r, *shape), eta=0 if shape == (1, 1) else 0.3, basis=basis, alpha=3.0)
    (update,) = config.new_updates([Matrix(*shape)])
    torch.nn.init.normal_(update.up_coefficients)
    up, down = factors(config, numbers(update), shape)
    for mine, wanted in zip(update.pair(), (up, down), strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(update.delta().double(), 3.0 / config.r * up @ down, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(update.delta().square().sum(), update.trainable())
    values = {k: v.double().requires_grad_(v.is_floating_point()) for k, v in numbers(update).items() if "cells" not in k}
    exact_up, exact_down = factors(config, numbers(update) | values, shape)
    loss = (3.0 / config.r * exact_up @ exact_down).square().sum()
    wanted = torch.autograd.grad(loss, [values["up_coefficients"], values["down_coefficients"]])
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@BASES
@pytest.mark.parametrize(("cols", "eta"), [(64, 0.5), (200, 0.2), (48, 0.8)])
def test_the_inner_factor_begins_with_the_variance_of_lora_s(basis, cols, eta):
    """1 / (3 q), over all its entries and many seeds; its mean is 0."""
    drawn = []
    for seed in range(60):
        (update,) = SeLoRAConfig(r=8, eta=eta, basis=basis, seed=seed).new_updates([Matrix(8, cols)])
        drawn.append(update.pair()[1].detach().flatten())
    entries = torch.cat(drawn)
    assert entries.square().mean().item() == pytest.approx(1 / (3 * cols), rel=0.06)
    assert entries.mean().abs() < 0.05 * entries.std()


def test_all_factors_of_one_shape_share_their_cells(vit, tmp_path):
    config = SeLoRAConfig(r=4, targets=("q", "v", "out", "fc1"))
    names = inject(vit, config)
    found = adapters(vit)
    assert all(torch.equal(found[name].up_cells, found[names[0]].up_cells) for name in names if "fc1" not in name)
    assert all(torch.equal(found[name].down_cells, found[names[0]].down_cells) for name in names)
    other = tiny("vit")
    inject(other, SeLoRAConfig(r=4, seed=1))
    assert not torch.equal(adapters(other)[names[0]].up_cells, found[names[0]].up_cells)
    assert len({tuple(found[name].down_coefficients.tolist()) for name in names}) == len(names)
    stir(vit)
    tensors = safetensors.torch.load_file(save_adapter(vit, tmp_path))
    cells = {key: value for key, value in tensors.items() if key.startswith("cells.")}
    assert {key: len(value) for key, value in cells.items()} == {"cells.48x4": 96, "cells.4x48": 96, "cells.192x4": 384}
    assert all(value.dtype == torch.int32 for value in cells.values())
    assert cells["cells.192x4"].tolist() == found["blocks.0.mlp.fc1"].up_cells.tolist()


def test_a_square_of_the_rank_is_one_shape():
    """Where p = q = r both factors have it, and the file names its cells once."""
    (update,) = SeLoRAConfig(r=6, eta=0.5).new_updates([Matrix(6, 6)])
    assert torch.equal(update.up_cells, update.down_cells)


WRONG = [
    *(("eta", 1), ("eta", -0.1), ("eta", float("nan")), ("eta", "0.5"), ("r", 0), ("r", 2.0), ("r", True), ("alpha", 0)),
    *(("basis", "dct"), ("use_dora", 1), ("targets", ()), ("seed", None)),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_wrong_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        SeLoRAConfig(**{field: value})


def test_a_spectrum_without_a_single_number_is_refused(vit):
    before = vit.state_dict().keys()
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q.*eta=0\.999: of 1 x 48 cells none is left to be trained"):
        inject(vit, SeLoRAConfig(r=1, eta=0.999))
    assert vit.state_dict().keys() == before
