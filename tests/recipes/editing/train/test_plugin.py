"""examples/instruct_pix2pix/train.py: a method defined outside the library."""

import sys

import pytest

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from loca_vision import KINDS
from loca_vision.formats.adapter_file import METADATA_KEY
from loca_vision.storage.safetensors_file import open_safetensors
from support.edit_training import ADAPTER, TRAIN, trained, weights
from support.scripts import EXAMPLES, main

MODULE = EXAMPLES.parent / "your_own_update.py"


def forget():
    KINDS.pop("kronecker", None)
    for name in [name for name in sys.modules if name.startswith("your_own_update_")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def _only_for_now():
    yield
    forget()


def test_it_is_trained_and_gone_on_with(flags, tmp_path, capsys):
    out, more = tmp_path / "out", ("--method", "kronecker", "--set", "terms=1", "--set", "block=4", "--max_train_steps", 2)
    metrics = trained(out, *flags, *more, "--import", MODULE)
    assert metrics["config"]["method"] == "kronecker" and metrics["config"]["set"] == ["terms=1", "block=4"]
    with open_safetensors(out / ADAPTER) as file:
        assert '"method": "kronecker"' in file.metadata[METADATA_KEY]
        assert any(name.endswith(".left") for name in file.entries)
    before = weights(out)
    forget()
    (out / "metrics.json").unlink()
    assert main(TRAIN, "--config", out / "config.yaml", "--resume_from_checkpoint", "latest") == 0
    assert weights(out) == before
    forget()
    capsys.readouterr()
    chosen = (*more, "--import", MODULE, "--layers", "mid_block")
    assert main(TRAIN, *flags, *chosen, "--output_dir", tmp_path / "other") == 2
    assert "--layers: the method kronecker goes on all layers" in capsys.readouterr().err
    forget()
    assert main(TRAIN, *flags, *more, "--output_dir", tmp_path / "other") == 2
    said = capsys.readouterr().err
    assert "method='kronecker': it is unknown here" in said and "--import names the module" in said
