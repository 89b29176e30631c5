"""location_rules.py: gradients are the library's, rules choose cells by them, and runs learn there."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from scipy import fft, stats

from classifier_study.settings import Study
from loca_vision import KINDS, LoCAConfig, adapters, inject, load_adapter, save_adapter, select_locations
from loca_vision.dct import dct2, idct2
from loca_vision.recipes.classification import recorded_runs
from loca_vision.storage.safetensors_file import open_safetensors, write_safetensors
from location_study import informed_rules
from location_study.chosen_cells import ChosenCellsConfig
from location_study.gradient_spectra import GradientSpectrum, gradient_spectra
from location_study.informed_cells import InformedCellsConfig
from location_study.informed_rules import INFORMED
from location_study.rules import RULES, chosen, energy_share
from location_study.settings import RuleStudy
from support.scripts import main
from support.timm_models import tiny

PLUGINS = (ChosenCellsConfig, InformedCellsConfig)
for config in PLUGINS:
    KINDS.pop(config.method)  # of which only the tests below know

NAMES = [f"blocks.{block}.attn.{part}" for block in (0, 1) for part in "qv"]


WITH_FEWER = ("gradient-model", "squares-model", "directions")  # in some projections


def spectrum(total, squares=None):
    total = torch.as_tensor(total, dtype=torch.float32)
    return GradientSpectrum(total, total.square() if squares is None else torch.as_tensor(squares, dtype=torch.float32))


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    for config in PLUGINS:
        monkeypatch.setitem(KINDS, config.method, config)


@pytest.fixture
def random_spectra():
    draws = torch.Generator().manual_seed(0)
    return {name: spectrum(*torch.randn(2, 6, 5, generator=draws).abs()) for name in NAMES}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_different_cells_and_as_many_as_it_may(rule, random_spectra):
    found = chosen(RULES[rule], random_spectra, 4, seed=3)
    cells = {name: found[name] for name in NAMES}
    assert {name: len(own) for name, own in cells.items()} == dict.fromkeys(NAMES, 4) or rule in WITH_FEWER
    assert sum(map(len, cells.values())) == 12 if rule == "directions" else 16
    for own in cells.values():
        assert len(own.unique()) == len(own) >= 1 and own.min() >= 0 and own.max() < 30
    again = chosen(RULES[rule], random_spectra, 4, seed=3)  # nothing has changed the spectra
    assert found.keys() == again.keys() and all(torch.equal(found[name], again[name]) for name in found)
    assert 0 < energy_share(random_spectra, found) <= 1


@pytest.mark.parametrize(("rule", "part"), [("gradient-model", "total"), ("squares-model", "squares")])
def test_of_the_whole_model_the_largest_are_taken_and_one_of_each(rule, part, random_spectra):
    random_spectra[NAMES[1]] = spectrum(torch.full((6, 5), 1e-6))  # nothing there is worth it
    found = chosen(RULES[rule], random_spectra, 5, seed=0)
    sizes = {name: getattr(of, part).abs().flatten() for name, of in random_spectra.items()}
    firsts = {(name, int(own.argmax())) for name, own in sizes.items()}
    every = [(float(value), name, place) for name, own in sizes.items() for place, value in enumerate(own)]
    rest = [cell[1:] for cell in sorted(every, reverse=True) if cell[1:] not in firsts]
    assert {(name, int(i)) for name, own in found.items() for i in own} == firsts | set(rest[:16])
    assert len(found[NAMES[1]]) == 1


def test_scores_by_hand():
    of = {"a": spectrum([[3.0, -4.0], [1.0, 2.0]], [[100.0, 16.0], [1.0, 9.0]])}
    assert chosen(RULES["gradient"], of, 2, 0)["a"].tolist() == [1, 0]
    assert chosen(RULES["squares"], of, 2, 0)["a"].tolist() == [0, 1]
    assert chosen(RULES["deviation"], of, 2, 0)["a"].sort().values.tolist() == [1, 2]  # 0.3, 1, 1, 2/3
    assert chosen(RULES["low"], of, 3, 0)["a"].sort().values.tolist() == [0, 1, 2]
    assert energy_share(of, {"a": torch.tensor([1, 2])}) == pytest.approx(17 / 30)


def test_curvature_takes_scales_of_rows_and_columns_away():
    draws = torch.Generator().manual_seed(0)
    plain = torch.randn(6, 5, generator=draws)
    rows, cols = torch.rand(6, 1, generator=draws) + 0.1, torch.rand(5, generator=draws) + 0.1
    flat, scaled = spectrum(plain, torch.ones(6, 5)), spectrum(plain * rows * cols, (rows * cols).square())
    same = chosen(RULES["curvature"], {"a": flat}, 30, 0)["a"], chosen(RULES["curvature"], {"a": scaled}, 30, 0)["a"]
    assert torch.equal(*same) and torch.equal(same[0], plain.abs().flatten().argsort(descending=True))


@pytest.mark.parametrize(("rule", "share"), [("sampled-1", 3 / 4), ("sampled-2", 9 / 10)])
def test_cells_are_drawn_with_their_probabilities(rule, share):
    of = {"a": spectrum([[3.0, 0.0], [0.0, -1.0]])}
    first = sum(int(chosen(RULES[rule], of, 1, seed)["a"]) == 0 for seed in range(400))
    assert stats.binomtest(first, 400, share).pvalue > 1e-4


def test_gradients_are_those_that_select_locations_sees():
    model, other = tiny("vit"), tiny("vit")
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])) for _ in range(3)]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    spectra = gradient_spectra(model, batches, NAMES)
    assert list(spectra) == NAMES and [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    inject(other, LoCAConfig(n_components=7, location_init="gradient"))
    cells = select_locations(other, (F.cross_entropy(other(x), y) for x, y in batches))
    for name, own in chosen(RULES["gradient"], spectra, 7, 0).items():
        assert torch.equal(own, cells[name][:, 0] * 48 + cells[name][:, 1])
    single = [gradient_spectra(model, [batch], NAMES)[NAMES[0]].total for batch in batches]
    torch.testing.assert_close(spectra[NAMES[0]].squares, sum(one.square() for one in single))


def test_an_adapter_has_its_cells_and_its_file_needs_no_other(tmp_path):
    cells = {name: torch.arange(number, 2000, 500 + number) for number, name in enumerate(NAMES)}
    (tmp_path / "some").mkdir()
    write_safetensors(tmp_path / "some" / "seed-5.safetensors", cells, {})
    config = ChosenCellsConfig(seed=5, folder=str(tmp_path), rule="some")
    model = tiny("vit")
    inject(model, config)
    for name, update in adapters(model).items():
        assert torch.equal(update.cells[:, 0] * 48 + update.cells[:, 1], cells[name])
        assert [parameter for parameter in update.parameters() if parameter.requires_grad] == [update.coefficients]
        torch.nn.init.normal_(update.coefficients)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "some" / "seed-5.safetensors").unlink()
    loaded = tiny("vit")
    load_adapter(loaded, tmp_path / "adapter")
    for name, update in adapters(loaded).items():
        assert torch.equal(update.delta(), adapters(model)[name].delta())
    write_safetensors(tmp_path / "some" / "seed-5.safetensors", {NAMES[0]: cells[NAMES[0]]}, {})
    with pytest.raises(ValueError, match=rf"rule='some': it has no cells for {NAMES[1]}"):
        inject(tiny("vit"), config)


def test_an_order_of_rows_and_columns_gathers_the_energy_of_a_gradient_of_rank_one():
    """A smooth gradient whose rows and columns are shuffled: sorted again, a few cells have nearly all of it."""
    draws = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(24, generator=draws), torch.randperm(20, generator=draws)
    gradient = torch.linspace(-1, 2, 24)[rows, None] * torch.linspace(-2, 1, 20)[columns]
    of = {NAMES[0]: spectrum(dct2(gradient))}
    plain, sorted_ = (chosen(RULES[rule], of, 4, 0) for rule in ("gradient", "reordered"))
    assert energy_share(of, plain) < 0.4 < 0.9 < energy_share(of, sorted_)
    one = InformedCellsConfig(n_components=4).build((24, 20))
    for part, value in sorted_.items():
        getattr(one, part.removeprefix(NAMES[0]).removeprefix(".") or "cells").copy_(value)
    (pulled,) = torch.autograd.grad((one.delta() * gradient).sum(), one.coefficients)
    assert float(pulled.square().sum() / gradient.square().sum()) == pytest.approx(energy_share(of, sorted_), rel=1e-4)


def test_directions_have_the_largest_singular_values(random_spectra):
    found = chosen(RULES["directions"], random_spectra, 13, 0)
    of = random_spectra[NAMES[0]]
    left, right = (found[f"{NAMES[0]}.{part}"] for part in ("left", "right"))
    core = left.T @ idct2(of.total) @ right
    torch.testing.assert_close(core, torch.diag(torch.linalg.svdvals(of.total)[:2]), atol=1e-4, rtol=1e-4)
    assert len(found[NAMES[0]]) == 9 and energy_share({NAMES[0]: of}, found) >= float(
        core.square().sum() / of.total.square().sum()
    )


def test_an_informed_update_is_its_formula_and_its_file_needs_no_other(tmp_path, random_spectra):
    (tmp_path / "some").mkdir()
    draws = torch.Generator().manual_seed(0)
    parts = {"rows": torch.randperm(48, generator=draws), "columns": torch.randperm(48, generator=draws)}
    parts |= {part: torch.linalg.qr(torch.randn(48, 2, generator=draws))[0].contiguous() for part in ("left", "right")}
    held = {name: torch.arange(number, 2000, 500 + number) for number, name in enumerate(NAMES)}
    held = {name: cells[:4] for name, cells in held.items()}
    held |= {f"{name}.{part}": value.clone() for name in NAMES for part, value in parts.items()}
    write_safetensors(tmp_path / "some" / "seed-0.safetensors", held, {})
    config = InformedCellsConfig(n_components=4, directions=2, scale=0.5, folder=str(tmp_path), rule="some")
    model, x = tiny("vit"), torch.randn(2, 3, 32, 32)
    before = model(x)
    inject(model, config)
    assert torch.equal(model(x), before)
    for name, update in adapters(model).items():
        torch.nn.init.normal_(update.coefficients)
        torch.nn.init.normal_(update.core)
        sparse = torch.zeros(48 * 48)
        sparse[held[name]] = update.coefficients.detach()
        basis = torch.as_tensor(fft.idctn(sparse.view(48, 48).numpy(), norm="ortho"))
        wanted = basis[parts["rows"]][:, parts["columns"]] + parts["left"] @ update.core @ parts["right"].T
        torch.testing.assert_close(update.delta(), 0.5 * wanted, atol=1e-5, rtol=1e-5)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "some" / "seed-0.safetensors").unlink()
    loaded = tiny("vit")
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_the_smallest_components_go_where_the_gradient_is_largest():
    """Every second step, of 20 cells 10: a cosine later the share is smaller, and after the last step nothing moves."""
    one = InformedCellsConfig(n_components=20, relocate_every=2, relocate_until=4).build((8, 8)).train()
    one.cells.copy_(torch.arange(20))
    one.coefficients.data.copy_(torch.arange(1.0, 21))
    wanted = torch.zeros(64)
    wanted[[40, 50, 60]] = torch.tensor([3.0, -2.0, 1.0])
    direction = idct2(wanted.view(8, 8))
    for step, moved in enumerate([[], [], [40, 50, 60], [40, 50, 60], [40, 50, 60]]):
        (one.delta() * direction).sum().backward()
        assert one.cells.tolist() == [*moved, *range(len(moved), 20)], step
    assert one.coefficients[:3].tolist() == [0, 0, 0] and one.coefficients[3] == 4 and int(one.steps) == 5
    still = one.cells.clone()
    one.eval().delta()
    assert torch.equal(one.cells, still) and not InformedCellsConfig(n_components=20).build((8, 8)).seen.numel()


@pytest.fixture
def small(monkeypatch):
    """Runs of a tiny ViT, in this process."""
    flags = ["--dataset", "digits", "--model", "test_vit", "--weights", "none", "--image_size", "32", "--augment", "none"]
    flags += ["--train_images", "16", "--validation_images", "8", "--test_images", "8", "--epochs", "1", "--batch_size", "8"]
    monkeypatch.setattr(Study, "flags", [*flags, "--workers", "0", "--no-check_images"])
    monkeypatch.setattr(recorded_runs, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))


def test_from_images_to_a_table_and_again(small, tmp_path, capsys):
    out = tmp_path / "rules"
    flags = ("--output_dir", out, "--budgets", 3, "--layers", "blocks.5", "--seeds", 0, 1, "--location_batches", 2)
    flags += ("--batch_size", 8)
    assert main("location_rules", *flags, "--rules", "random", "gradient-model") == 0
    said = capsys.readouterr().out
    assert said.endswith((out / "study.md").read_text() + "\n") and "less that of random-3" in said
    assert "| gradient-model | largest abs(sum Z) of all projections together | 3: " in said
    runs = json.loads((out / "runs.json").read_text())
    assert {run["trained_parameters"] for run in runs.values()} == {6}
    for seed in (0, 1):
        name = next(name for name, run in runs.items() if run["arm"] == "gradient-model-3" and run["seed"] == seed)
        with open_safetensors(out / "cells" / "gradient-model-3" / f"seed-{seed}.safetensors") as wanted:
            cells = wanted.tensors()
        with open_safetensors(out / name / "pytorch_loca_weights.safetensors") as saved:
            held = saved.tensors()
        assert sum(map(len, cells.values())) == 6
        assert all(torch.equal(held[f"{projection}.locations"].long(), own) for projection, own in cells.items())
    before = (out / "runs.json").read_bytes()
    assert main("location_rules", *flags, "--rules", "random", "gradient-model") == 0
    assert (out / "runs.json").read_bytes() == before


def test_gradients_may_be_those_of_a_new_head(small, tmp_path):
    """Then no probe is trained, the first gradients are others, and the folder knows it."""
    flags = ("--budgets", 3, "--layers", "blocks.5", "--seeds", 0, "--location_batches", 2, "--batch_size", 8)
    flags += ("--rules", "gradient", "--against", "gradient")
    for head in ("probe", "new"):
        assert main("location_rules", "--output_dir", tmp_path / head, *flags, "--head", head) == 0
    assert [(tmp_path / head / "probes").exists() for head in ("probe", "new")] == [True, False]
    files = [tmp_path / head / "cells" / "gradient-3" / "seed-0.safetensors" for head in ("probe", "new")]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert main("location_rules", "--output_dir", tmp_path / "new", *flags) == 2


@pytest.mark.parametrize("rule", INFORMED)
def test_informed_rules_train_as_many_numbers(rule, small, tmp_path, monkeypatch):
    monkeypatch.setattr(informed_rules, "_EVERY", 1)
    out = tmp_path / "rules"
    flags = ("--output_dir", out, "--budgets", 12, "--layers", "blocks.5", "--seeds", 0, "--location_batches", 2)
    flags += ("--batch_size", 8, "--train_images", 16, "--epochs", 1)
    assert main("location_rules", *flags, "--rules", rule, "--against", rule) == 0
    runs = json.loads((out / "runs.json").read_text())
    assert len(runs) >= 3 and {run["trained_parameters"] for run in runs.values()} == {24}
    with open_safetensors(out / next(iter(runs)) / "pytorch_loca_weights.safetensors") as saved:
        held = saved.tensors()
    with open_safetensors(next((out / "cells").glob("*/seed-0.safetensors"))) as wanted:
        cells = wanted.tensors()
    moved = [
        not torch.equal(held[f"{name}.cells"], own) for name, own in cells.items() if "." not in name.partition("attn.")[2]
    ]
    assert len(moved) == 2 and set(moved) == {rule == "relocated"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--rules", "gradient"), "against='random': expected one of the rules, gradient"),
        (("--rules", "random", "loudest"), "rules='loudest': the choices are"),
        (("--rules", "random", "random"), "expected one or more different rules"),
        (("--location_batches", 0), "location_batches=0: "),
    ],
    ids=["against", "unknown", "twice", "batches"],
)
def test_a_study_that_cannot_be(flags, said, tmp_path, capsys):
    assert main("location_rules", "--output_dir", tmp_path / "rules", *flags) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "rules").exists()


def test_what_the_other_study_needs_is_not_asked(capsys):
    assert "methods" not in RuleStudy().about and "rules" not in RuleStudy().about
    assert main("location_rules", "--help") == 0
    told = capsys.readouterr().out
    assert "--rules" in told and "--ranks" not in told
