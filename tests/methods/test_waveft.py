"""WaveFT, against PyWavelets, against peft's layer, and where PyWavelets is not installed."""

import sys

import numpy as np
import pytest
import pywt
import torch
from peft import WaveFTConfig as PeftConfig
from peft import get_peft_model
from torch import nn

from loca_vision import WaveFTConfig, adapters, inject, load_adapter, save_adapter
from loca_vision.methods.locations import cell_locations
from loca_vision.methods.waveft import WaveletSpectrum, filters
from support.formulas import stir

SHAPES = [(6, 6), (12, 20), (7, 12), (5, 5), (1, 6)]
wavelets = pytest.mark.parametrize("wavelet", ["haar", "db1", "db2", "sym3", "coif1", "bior2.2", "db10"])


def at_cells(flat, values, shape, wavelet, scale=1.0):
    return WaveletSpectrum(shape, values, cell_locations(flat, shape), scale=scale, wavelet=wavelet)


@wavelets
@pytest.mark.parametrize("shape", [(6, 6), (12, 20)])
def test_every_cell_gives_pywavelets_inverse_transform(wavelet, shape):
    """Of a matrix as large as its filters need, with the coefficients in its middle; sizes are even, so that nothing is cut."""
    values = torch.randn(shape[0] * shape[1], generator=torch.Generator().manual_seed(0))
    found = at_cells(torch.arange(len(values)), values, shape, wavelet).delta().detach()
    border = (len(pywt.Wavelet(wavelet).rec_lo) - 2) // 2
    spectrum = np.pad(values.double().view(shape).numpy(), border)
    (upper, lower), (left, right) = (np.split(np.arange(size), 2) for size in spectrum.shape)
    quarters = [spectrum[np.ix_(rows, cols)] for rows in (upper, lower) for cols in (left, right)]
    wanted = pywt.idwt2((quarters[0], tuple(quarters[1:])), wavelet)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("wavelet", ["db1", "db2", "sym3", "coif1"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_peft_s_layer(wavelet, shape):
    """Given the cells and the coefficients that peft has drawn: values, and gradients of the coefficients."""
    count = min(20, shape[0] * shape[1])
    config = PeftConfig(n_frequency=count, scaling=3.0, wavelet_family=wavelet, init_weights=False, target_modules=["0"])
    layer = get_peft_model(nn.Sequential(nn.Linear(shape[1], shape[0])), config).base_model.model[0]
    coefficients, (rows, cols) = layer.waveft_spectrum["default"], layer.waveft_indices["default"]
    mine = at_cells(rows * shape[1] + cols, coefficients.detach().clone(), shape, wavelet, 3.0)
    theirs = layer.get_delta_weight("default")
    torch.testing.assert_close(mine.delta(), theirs, rtol=1e-5, atol=1e-6)
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(mine.delta(), mine.coefficients, direction)
    torch.testing.assert_close(ours, torch.autograd.grad(theirs, coefficients, direction), rtol=1e-4, atol=1e-5)


def test_atoms_of_an_orthogonal_wavelet_have_norm_one_inside():
    shape = (40, 40)
    for wavelet in ("db1", "db3"):
        for flat in (10 * 40 + 10, 10 * 40 + 30, 30 * 40 + 10, 30 * 40 + 30):
            atom = at_cells(torch.tensor([flat]), torch.ones(1), shape, wavelet, 2.0)
            assert atom.norm() == pytest.approx(2, rel=1e-6) == float(atom.delta().detach().norm())


def test_the_wavelet_is_in_the_file_and_in_what_is_swapped(vit, build, tmp_path):
    config = WaveFTConfig(n_components=20, wavelet="db2", seed=3)
    inject(vit, config)
    save_adapter(stir(vit), tmp_path)
    again = build("vit")
    load_adapter(again, tmp_path)
    for name, update in adapters(vit).items():
        torch.testing.assert_close(adapters(again)[name].delta(), update.delta(), rtol=0, atol=1e-6)
        other = at_cells(torch.arange(20), torch.zeros(20), update.shape, "db1")
        other.copy_from(update)
        assert torch.equal(other.delta(), update.delta())


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("scale", 0, "scale=0"),
        ("n_components", 0, "n_components=0"),
        ("wavelet", "db", "wavelet='db': expected one of PyWavelets' discrete wavelets; perhaps db"),
        ("wavelet", 2, "wavelet=2: expected the name"),
        ("wavelet", "db11", "wavelet='db11': its filters have 22 numbers, of at most 20"),
        ("wavelet", "morl", "wavelet='morl': expected one of"),
    ],
)
def test_wrong_settings_are_refused(field, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        WaveFTConfig(**{field: value})


def test_only_wavelets_other_than_haar_s_need_pywavelets(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    filters.cache_clear()
    WaveFTConfig()
    with pytest.raises(
        ModuleNotFoundError, match=r"wavelet='sym7': PyWavelets has its filters and is missing: .*loca-vision\[wavelets\]"
    ):
        WaveFTConfig(wavelet="sym7")
