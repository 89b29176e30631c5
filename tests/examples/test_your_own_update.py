"""Methods defined outside the library: the example, and what such a method may contain."""

import json
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from classifier_study.arms import arms
from classifier_study.settings import Study
from loca_vision import KINDS, AdapterConfig, Update, adapters, inject, kind, load_adapter, save_adapter
from loca_vision.commands.inspect_file import describe
from support.image_folders import write_folder
from support.scripts import MODEL, main
from support.timm_models import batch, tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "your_own_update.py"


@pytest.fixture(autouse=True)
def _only_for_now(monkeypatch):
    for name, config in list(KINDS.items()):
        monkeypatch.setitem(KINDS, name, config)
    yield
    for name in ("kronecker", "picked"):
        KINDS.pop(name, None)
    for name in [name for name in sys.modules if name.startswith(("your_own_update_", "broken_plugin"))]:
        del sys.modules[name]  # what --import has imported


def test_the_example(capsys):
    names = runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert "12 projections; at first the same: True" in said and "loaded, the same logits: True" in said
    assert "'coefficients': 6144, 'head': 650" in said  # 12 of 4 terms of two 8 x 8 matrices each
    assert float(re.search(r"steps: (\S+)", said)[1]) < 0.5
    update = names["Kronecker"]((16, 24), 2, 4)
    for parameter in update.parameters():
        nn.init.normal_(parameter)
    wanted = sum(torch.kron(left, right) for left, right in zip(update.left, update.right, strict=True))
    torch.testing.assert_close(update.delta(0.5), 0.5 * wanted)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q: block=5: it does not divide 48 x 48"):
        inject(tiny("vit"), names["KroneckerConfig"](block=5))
    with pytest.raises(ValueError, match=r"targets=\('x',\): 'x' is not one of"):
        names["KroneckerConfig"](targets=("x",))


KRONECKER = ("--method", "kronecker", "--import", EXAMPLE)


@pytest.fixture
def photos(tmp_path):
    write_folder(tmp_path / "photos")
    return (*MODEL, "--dataset", "folder", "--root", tmp_path / "photos", "--batch_size", 16, "--epochs", 1, "--workers", 0)


def forgotten():
    """As in a new process."""
    KINDS.pop("kronecker", None)
    for name in [name for name in sys.modules if name.startswith("your_own_update_")]:
        del sys.modules[name]


def test_train_py_trains_it_and_the_others_know_it(photos, tmp_path, capsys):
    out = tmp_path / "out"
    flags = (*photos, "--output_dir", out)
    assert main("train", *flags, *KRONECKER, "--set", "terms=2", "--set", "block=4") == 0
    said = capsys.readouterr()
    assert "projections; at first" not in said.out  # importing it does nothing else
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["trained_parameters"] == 12 * 2 * (16 * 16 + 4 * 4)
    assert metrics["config"]["set"] == ["terms=2", "block=4"] and metrics["config"]["imports"] == [str(EXAMPLE)]
    assert (metrics["config"]["lr"], metrics["config"]["head_lr"]) == (1e-2, 1e-2)

    for again in (  # the finished run, from the command line and from its own settings
        (*flags, *KRONECKER, "--set", "terms=2", "--set", "block=4", "--resume"),
        ("--config", out / "config.yaml", "--resume"),
    ):
        forgotten()
        assert main("train", *again) == 0
    assert main("train", *flags, *KRONECKER, "--set", "terms=3", "--resume") == 2
    assert "other settings: set=['terms=3'], ['terms=2', 'block=4'] before" in capsys.readouterr().err

    forgotten()
    (out / "metrics.json").rename(tmp_path / "aside.json")  # and from its checkpoint
    assert main("train", "--config", out / "config.yaml", "--resume") == 0
    assert "going on after step 2 of 2" in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text())["test_accuracy"] == metrics["test_accuracy"]

    forgotten()
    assert main("evaluate", "--adapter", out) == 2  # what a run's folder says imports nothing
    said = capsys.readouterr().err
    assert "method='kronecker': it is unknown here" in said and "--import names the module" in said and said.count("\n") == 1
    assert "kronecker" not in KINDS
    assert main("evaluate", "--adapter", out, "--import", EXAMPLE) == 0
    assert json.loads((out / "evaluation.json").read_text())["test_accuracy"] == metrics["test_accuracy"]
    capsys.readouterr()
    assert main("report", out, "--no_paper") == 0
    assert "| runs | test_vit | kronecker | 6,528 |" in capsys.readouterr().out


MISTAKES = {
    "no file": (("--import", "nowhere.py"), "--import nowhere.py: it cannot be imported: there is no such file"),
    "no module": (("--import", "nowhere_at_all"), "it cannot be imported: No module named 'nowhere_at_all'"),
    "no Python": (("--import", "broken_plugin.py"), "broken_plugin.py: it cannot be imported: SyntaxError"),
    "no guard": (("--import", "broken_plugin_script.py"), "what a script does belongs below `if __name__ == '__main__'`"),
    "method": (("--method", "kronecker"), "method='kronecker': it is unknown here; there are loca"),
    "name": ((*KRONECKER, "--set", "term=2"), "--set term=2: the method kronecker has no such field; perhaps terms"),
    "type": ((*KRONECKER, "--set", "terms=two"), "--set terms=two: expected a whole number"),
    "half": ((*KRONECKER, "--set", "terms=2.5"), "--set terms=2.5: expected a whole number"),
    "form": ((*KRONECKER, "--set", "terms"), "--set terms: expected NAME=VALUE, as in --set terms=4"),
    "flag": ((*KRONECKER, "--set", "seed=4"), "--set seed=4: say --seed instead"),
    "another's": ((*KRONECKER, "--r", "4"), "--r is a setting of lora, selora; the method is kronecker"),
    "its own rule": ((*KRONECKER, "--set", "block=5"), "blocks.0.attn.q: block=5: it does not divide 64 x 64"),
    "a field with a flag": (("--set", "scale=2"), "--set scale=2: say --scale instead"),
    "no adapter": (("--method", "lp", "--set", "terms=2"), "--set is a setting of loca"),
    "choice": (("--method", "sdctft", "--set", "n_bands=0"), "n_bands=0"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("def\n")
    (tmp_path / "broken_plugin_script.py").write_text("import sys\nsys.exit(0)\n")
    flags, sentence = MISTAKES[case]
    assert main("train", *photos, "--output_dir", tmp_path / "out", *flags) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("train.py: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["evaluate", "study", "instruct_pix2pix/train", "instruct_pix2pix/evaluate"])
def test_a_wrong_module_of_the_other_scripts(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    needed = {"evaluate": ("--adapter", "x"), "study": ("--dataset", "digits")}
    assert main(name, *needed.get(name, ()), "--import", "nowhere.py") == 2
    said = capsys.readouterr().err
    assert said == f"{name.rpartition('/')[2]}.py: --import nowhere.py: it cannot be imported: there is no such file\n"


def test_help_and_the_study_know_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert main("train", "--import", EXAMPLE, "--help") == 0
    assert "kronecker (sums of Kronecker products)" in capsys.readouterr().out
    found = {arm.name: arm for arm in arms(Study("digits"))}
    assert found["kronecker"].flags == ("--method", "kronecker", "--adapter_dtype", "float32", "--head_lr", "0.01")
    assert found["kronecker"].rates == pytest.approx((1e-3, 3e-3, 1e-2))


class Picked(Update):
    """Gains of some rows, whose numbers are kept in a buffer beyond what float16 can count, and a module with more."""

    def __init__(self, shape, count):
        super().__init__(shape)
        self.register_buffer("rows", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("flags", torch.zeros(count, dtype=torch.bool))
        self.inner = nn.Linear(shape[1], count, bias=False, dtype=torch.float32)

    def delta(self, strength=1.0, weight=None):
        rows = self.rows - 5000
        return torch.zeros(self.shape).index_add(0, rows, strength * self.inner.weight * self.flags[:, None])


def picked():
    @kind
    @dataclass(frozen=True)
    class PickedConfig(AdapterConfig):
        method = "picked"
        count: int = 3
        targets: tuple[str, ...] = ("q", "out")
        seed: int = 0

        def build(self, shape):
            return Picked(shape, self.count)

        def initialize(self, update, projection, generator):
            update.rows.copy_(5000 + torch.randperm(projection.shape[0], generator=generator)[: self.count])
            update.flags[1:] = True
            nn.init.zeros_(update.inner.weight)

    return PickedConfig


def test_whole_numbers_flags_and_modules_inside_survive_a_float16_file(tmp_path):
    model, fresh, other = tiny("vit"), tiny("vit"), tiny("vit")
    inject(model, picked()())
    for update in adapters(model).values():
        nn.init.normal_(update.inner.weight)
    file = save_adapter(model, tmp_path, dtype=torch.float16)
    dtypes = {
        key.partition("attn.q.")[2]: value.dtype for key, value in safetensors.torch.load_file(file).items() if ".q." in key
    }
    assert dtypes == {"rows": torch.int64, "flags": torch.bool, "inner.weight": torch.float16}
    load_adapter(fresh, file)
    for name, update in adapters(fresh).items():
        assert torch.equal(update.rows, adapters(model)[name].rows) and update.rows.min() >= 5000
        assert torch.equal(update.flags, adapters(model)[name].flags)
        assert torch.equal(update.inner.weight, adapters(model)[name].inner.weight.half().float())
    assert (fresh(batch("vit")) - model(batch("vit"))).abs().max() < 0.01
    assert (fresh(batch("vit")) - other(batch("vit"))).abs().max() > 0.01
    inject(other, picked()(seed=1))
    for name, update in adapters(other).items():
        update.check_fits(adapters(fresh)[name], name)
        update.copy_from(adapters(fresh)[name])
    other.head.load_state_dict(fresh.head.state_dict())
    assert torch.equal(other(batch("vit")), fresh(batch("vit")))
    assert "48 x 48  144 " in describe(file)


def test_a_file_of_a_kind_nobody_has_defined_here(tmp_path):
    model = tiny("vit")
    inject(model, picked()())
    file = save_adapter(model, tmp_path)
    del KINDS["picked"]
    with pytest.raises(
        ValueError, match=r"method='picked': this library reads 'fourierft', 'loca', 'lora', 'sdctft', 'selora'"
    ):
        load_adapter(tiny("vit"), file)


def test_a_name_in_use_is_refused():
    with pytest.raises(ValueError, match=r"method='lora': loca_vision\.methods\.lora\.LoRAConfig has that name"):
        kind(type("Mine", (AdapterConfig,), {"method": "lora"}))
    assert kind(KINDS["lora"]) is KINDS["lora"]


def test_an_update_without_a_matrix_says_so():
    with pytest.raises(NotImplementedError, match="Update has neither a delta nor factors"):
        Update((2, 3)).delta()
