"""Kinds that somebody else defines: the example, and what they may hold."""

import re
import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from loca_vision import KINDS, AdapterConfig, Update, adapters, inject, kind, load_adapter, save_adapter
from loca_vision.commands.inspect_file import describe
from support.timm_models import batch, tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "your_own_update.py"


@pytest.fixture(autouse=True)
def _only_for_now(monkeypatch):
    for name, config in list(KINDS.items()):
        monkeypatch.setitem(KINDS, name, config)
    yield
    for name in ("kronecker", "picked"):
        KINDS.pop(name, None)


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
