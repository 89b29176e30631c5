"""SHiRA, against peft's layer, and its two masks."""

import pytest
import torch
from peft import ShiraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

from loca_vision import SHiRAConfig, adapters, inject, load_adapter, save_adapter
from loca_vision.methods.locations import cell_locations
from loca_vision.methods.shira import SparseEntries
from loca_vision.model.target_checks import targets_for
from support.formulas import stir


@pytest.mark.parametrize("shape", [(6, 6), (7, 12)])
def test_it_is_peft_s_layer(shape):
    linear = nn.Sequential(nn.Linear(shape[1], shape[0]))
    config = PeftConfig(r=1, mask_type="random", random_seed=5, init_weights=False, target_modules=["0"])
    layer = get_peft_model(linear, config).base_model.model[0]
    values, (rows, cols) = layer.shira_weight["default"].detach(), layer.shira_indices["default"].long()
    mine = SparseEntries(shape, values.clone(), cell_locations(rows * shape[1] + cols, shape), scale=1.0)
    torch.testing.assert_close(mine.delta(), layer.get_delta_weight("default").to_dense())
    assert mine.norm() == pytest.approx(float(values.norm()), rel=1e-6)


def test_the_gradient_is_that_of_the_weight_at_the_entries():
    flat = torch.tensor([3, 17, 17, 40])
    update = SparseEntries((6, 9), torch.zeros(4), cell_locations(flat, (6, 9)), scale=2.0)
    direction = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad(update.delta(), update.coefficients, direction)
    assert torch.equal(found, 2 * direction.flatten()[flat])


def test_a_file_brings_the_same_output_back(vit, build, tmp_path):
    inject(vit, SHiRAConfig(n_components=20, targets=("q", "out")))
    save_adapter(stir(vit), tmp_path)
    again = build("vit")
    load_adapter(again, tmp_path)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(images), vit(images))
        assert (vit(images) - build("vit")(images)).abs().max() > 1e-3


def test_the_mask_by_magnitude_takes_the_largest_entries_of_the_weight(vit):
    config = SHiRAConfig(n_components=20, mask="magnitude")
    weights = {target.name: target.weight().detach().clone() for target in targets_for(vit, config)}
    inject(vit, config)
    for name, update in adapters(vit).items():
        inside = torch.zeros(update.shape, dtype=torch.bool)
        inside[update.cells[:, 0], update.cells[:, 1]] = True
        assert inside.sum() == 20 and weights[name].abs()[inside].min() >= weights[name].abs()[~inside].max()


@pytest.mark.parametrize(("field", "value"), [("scale", 0), ("n_components", 0), ("mask", "gradient"), ("seed", -1)])
def test_wrong_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        SHiRAConfig(**{field: value})
