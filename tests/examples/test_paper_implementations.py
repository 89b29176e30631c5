"""The implementations that examples/paper times: all compute the same, and it is what scipy and autograd say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

import implementations
from implementations import Settings
from loca_vision.methods.spectrum import random_spectrum

SIZE, COUNT = 24, 30
TINY = ["--sizes", "16", "24", "--components", "5", "30", "--rank", "2", "--rounds", "2"]


@pytest.fixture
def steps():
    return implementations.implementations(SIZE, COUNT, Settings(sizes=(SIZE,), components=(COUNT,), rank=3))


def drawn():
    """The coefficients, cells and gradient of the fixture."""
    generator = torch.Generator().manual_seed(0)
    cells = random_spectrum((SIZE, SIZE), COUNT, name="layer", seed=0).cells
    return torch.randn(COUNT, generator=generator), cells, torch.randn((SIZE, SIZE), generator=generator)


@pytest.mark.parametrize("name", ["atoms", "matrices", "fast", "library"])
def test_cosine_updates_are_scipys(name, steps):
    coefficients, (rows, cols), gradient = drawn()[0], drawn()[1].T, drawn()[2]
    spectrum = np.zeros((SIZE, SIZE))
    spectrum[rows, cols] = coefficients
    update, derivatives = steps[name]
    assert update().numpy() == pytest.approx(idctn(spectrum, type=2, norm="ortho"), abs=1e-5)
    assert derivatives().numpy() == pytest.approx(dctn(gradient.numpy(), type=2, norm="ortho")[rows, cols], abs=1e-5)


def test_fourierft_is_what_autograd_says(steps):
    coefficients, (rows, cols), gradient = drawn()[0].requires_grad_(), drawn()[1].T, drawn()[2]
    spectrum = torch.zeros((SIZE, SIZE), dtype=torch.complex64).index_put((rows, cols), coefficients.to(torch.complex64))
    wanted = torch.fft.ifft2(spectrum).real
    (wanted * gradient).sum().backward()
    update, derivatives = steps["FourierFT"]
    torch.testing.assert_close(update(), wanted.detach())
    torch.testing.assert_close(derivatives(), coefficients.grad)


def test_lora_has_the_gradients_of_both_factors():
    generator = torch.Generator().manual_seed(1)
    gradient = drawn()[2]
    update, derivatives = implementations.by_rank(3, gradient, generator)
    up, down = torch.randn((2, SIZE, 3), generator=torch.Generator().manual_seed(1)).requires_grad_().unbind()
    up.retain_grad()
    down.retain_grad()
    (up @ down.T * gradient).sum().backward()
    torch.testing.assert_close(update(), (up @ down.T).detach())
    torch.testing.assert_close(derivatives(), torch.cat([up.grad, down.grad]))


def test_the_command(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        assert implementations.main([*TINY, "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "implementations.json").read_text())
    assert list(report["parts"]) == ["16 x 5", "16 x 30", "24 x 5", "24 x 30"]
    assert list(report["parts"]["24 x 30"]) == ["atoms", "matrices", "fast", "library", "FourierFT", "LoRA"]
    assert all(found["update_ms"] > 0 for part in report["parts"].values() for found in part.values())
    assert report["environment"]["threads"] == 1
    assert (tmp_path / "implementations.png").read_bytes().startswith(b"\x89PNG")
    assert "24 x 30" in capsys.readouterr().out


def test_bad_settings(tmp_path, capsys):
    assert implementations.main(["--sizes", "16", "--components", "257", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "components=257: expected a whole number from 1 to 256" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
