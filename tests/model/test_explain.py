"""The output of `explain`, against what the layers do."""

from dataclasses import replace

import pytest
import torch

import loca_vision.functional.cosine_linear as spectral_rows
import loca_vision.functional.cost_model as paths
from loca_vision import FourierFTConfig, LoCAConfig, LoRAConfig, adapters, explain, inject, set_adapters
from loca_vision.functional.cosine_atoms import offsets
from loca_vision.functional.cost_model import Workload
from loca_vision.functional.flop_counts import of_applying, of_factors, of_sampled_gradient, of_whole_gradient
from support.strategies import FORCED, FREE, TOGETHER
from support.timm_models import tiny

SAMPLED = FORCED["sampled"]


def learn(model, coefficients, locations):
    for spectrum in adapters(model).values():
        spectrum.coefficients.requires_grad_(coefficients)
        spectrum.locations.requires_grad_(locations)


@pytest.fixture
def adapted(vit):
    inject(vit, LoCAConfig(n_components=40, targets=("q", "v", "fc1")))
    return vit


WAYS = {"whole": {"spectrum_at"}, "sampled": {"spectra_at"}, "applied": {"spectra_at", "add_applied"}}


@pytest.mark.parametrize("path", FORCED)
def test_it_names_the_path_that_training_takes(adapted, images, path, monkeypatch):
    monkeypatch.setattr(paths, "COSTS", FORCED[path])
    taken = []
    for way in set.union(*WAYS.values()):
        real = getattr(spectral_rows, way)
        monkeypatch.setattr(spectral_rows, way, lambda *given, way=way, real=real: taken.append(way) or real(*given))
    adapted(images).square().sum().backward()
    rows = list(explain(adapted))
    assert {row.path for row in rows} == {path}
    assert set(taken) == WAYS[path]
    assert [row.projection for row in rows] == list(adapters(adapted)) and {row.count for row in rows} == {40}


@pytest.mark.parametrize(
    ("halves", "said", "places"),
    [((True, False), "coefficients", 1), ((False, True), "locations", 4), ((True, True), "coefficients and locations", 5)],
)
def test_phases_and_work(adapted, halves, said, places, monkeypatch):
    learn(adapted, *halves)
    assert len(offsets("central", *halves)) == places
    monkeypatch.setattr(paths, "COSTS", {})
    whole = explain(adapted, 100).rows[0]
    assert (whole.learns, whole.path, whole.why) == (said, "whole", "no costs are known for cpu")
    assert whole.backward == of_whole_gradient(Workload((48, 48), 40, places), 100)
    monkeypatch.setattr(paths, "COSTS", SAMPLED)
    sampled = explain(adapted, 100).rows[0]
    assert sampled.path == "sampled" and "by the model" in sampled.why
    assert sampled.backward == of_sampled_gradient(Workload((48, 48), 40, places), 100, 2)
    assert sampled.forward == whole.forward
    monkeypatch.setattr(paths, "COSTS", FORCED["applied"])
    applied = explain(adapted, 100).rows[0]
    assert applied.path == "applied"
    assert applied.forward == of_applying(Workload((48, 48), 40, places), 100, 2)
    assert applied.backward == sampled.backward + applied.forward


def test_what_is_built_together(adapted, monkeypatch):
    monkeypatch.setattr(paths, "COSTS", {})
    whole = explain(adapted, 100)
    with paths.using("together"):
        together = explain(adapted, 100)
        assert {row.path for row in together} == {"together"} and all("at once" in row.why for row in together)
        assert [replace(row, path="whole", why=whole.rows[0].why) for row in together] == list(whole)
        inject(adapted, LoRAConfig(r=2, targets=("fc1",)), "other")
        set_adapters(adapted, ["default", "other"])
        mixed = {row.projection.rpartition(".")[2]: row.path for row in explain(adapted)}
        assert mixed == {"q": "together", "v": "together", "fc1": "whole"}
        learn(adapted, False, False)
        assert {row.path for row in explain(adapted)} == {"kept", "whole"}
        adapted.requires_grad_(True)
        assert "together" not in {row.path for row in explain(adapted)}


def test_costs_that_choose_to_build_together(monkeypatch):
    """The work is that of the whole way; where the rows are interleaved, the whole way is taken."""
    for family, path in (("vit", "together"), ("maxvit", "whole")):
        model = tiny(family)
        inject(model, LoCAConfig(n_components=40, targets=("q", "v")))
        monkeypatch.setattr(paths, "COSTS", {})
        whole = explain(model, 100)
        monkeypatch.setattr(paths, "COSTS", TOGETHER)
        chosen = explain(model, 100)
        assert {row.path for row in chosen} == {path} and all("by the model" in row.why for row in chosen)
        assert [(row.forward, row.backward) for row in chosen] == [(row.forward, row.backward) for row in whole]


def test_what_learns_nothing_is_kept_and_costs_nothing(adapted):
    learn(adapted, False, False)
    assert {(row.learns, row.path, row.forward.flops) for row in explain(adapted)} == {("nothing", "kept", 0.0)}


def test_a_weight_that_learns_itself_leaves_no_choice(adapted, monkeypatch):
    monkeypatch.setattr(paths, "COSTS", SAMPLED)
    adapted.requires_grad_(True)
    assert {(row.path, row.why) for row in explain(adapted)} == {("whole", "W itself learns")}


def test_other_kinds(vit):
    inject(vit, LoRAConfig(r=3))
    row = explain(vit, {"blocks.0.*": 10, "*": 20}).rows[0]
    assert (row.path, row.count, row.forward) == ("factors", 3, of_factors((48, 48), 3, 10, 1))
    inject(vit, FourierFTConfig(n_components=7), name="waves")
    rows = explain(vit).rows
    assert {row.adapter for row in rows} <= {"default", "waves"} and {row.path for row in rows} == {"whole"}


def test_the_table_has_a_line_for_each_and_one_for_the_sum(adapted):
    found = explain(adapted, 100)
    lines = str(found).splitlines()
    assert len(lines) == len(found) + 2 == 8
    assert all(row.projection in line and row.why in line for row, line in zip(found, lines[1:], strict=False))
    assert lines[-1].startswith("6 projections")


def test_bad_input_is_refused_in_a_sentence(vit):
    with pytest.raises(ValueError, match="no adapter to explain"):
        explain(vit)
    inject(vit, LoCAConfig(n_components=4))
    with pytest.raises(ValueError, match=r"tokens=0 for blocks.0.attn.q: a whole number from 1 up"):
        explain(vit, 0)
    with pytest.raises(ValueError, match=r"tokens=.*no pattern matches blocks.1.attn.q"):
        explain(vit, {"blocks.0.*": 5})


def test_half_precision_may_be_said(adapted, monkeypatch):
    monkeypatch.setattr(
        paths, "COSTS", {"cpu": replace(FREE, product=1, half_product=1e-9, transform=1e-4, spread=1e-3, dot=1e-4)}
    )
    assert {row.path for row in explain(adapted, 100)} == {"sampled"}
    assert {row.path for row in explain(adapted, 100, dtype=torch.bfloat16)} == {"whole"}
