"""train-image with a quantised denoiser, by libraries that are installed, and what is said where they are not."""

import numpy as np
import pytest
import torch

from support.edit_training import ADAPTER, tensors
from support.image_training import run, trained


@pytest.mark.filterwarnings("ignore")  # of libraries, about others' versions
@pytest.mark.parametrize(("kind", "library"), [("torchao-int8", "torchao"), ("quanto-int8", "optimum.quanto")])
def test_it_learns_and_goes_on(kind, library, dreambooth, tmp_path):
    pytest.importorskip(library)
    asked = (*dreambooth, "--quantization", kind)
    metrics = trained(tmp_path / "out", *asked)
    assert run(tmp_path / "again", *asked, "--max_train_steps", "2") == 0
    again = trained(tmp_path / "again", *asked, "--resume_from_checkpoint", "latest")
    assert again["curves"] == metrics["curves"]
    learned = tensors(tmp_path / "out" / ADAPTER)
    assert any(value.any() for name, value in learned.items() if name.endswith("coefficients"))
    exact = trained(tmp_path / "exact", *dreambooth)
    np.testing.assert_allclose(metrics["curves"]["loss"], exact["curves"]["loss"], rtol=0.02)
    assert metrics["curves"]["loss"] != exact["curves"]["loss"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-int8", "torchao-int8", "quanto-int8"])
def test_what_is_missing_is_told(kind, dreambooth, tmp_path, capsys, monkeypatch):
    import loca_vision.recipes.diffusion.quantised as quantised

    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    assert run(tmp_path / "out", *dreambooth, "--quantization", kind) == 2
    assert f"--quantization {kind}: it needs " in capsys.readouterr().err
    monkeypatch.setattr(quantised, "find_spec", lambda name: object())
    if kind.startswith("bnb"):
        assert run(tmp_path / "out", *dreambooth, "--quantization", kind) == 2
        assert "bitsandbytes needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
