"""The largest DCT coefficients and the largest singular values: optimal, with the correct error."""

import itertools

import pytest
import torch
from scipy.fft import dctn, idctn

from loca_vision.formats.conversion.dct_truncation import Budget, largest_components, total_error
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair, truncated
from support.time_limit import within

SHAPES = [(1, 1), (1, 7), (5, 4), (12, 9), (30, 48)]


def rebuilt(part):
    spectrum = torch.zeros(part.shape[0] * part.shape[1], dtype=torch.float64)
    spectrum[part.cells] = part.coefficients.double()
    return torch.from_numpy(idctn(spectrum.view(part.shape).numpy(), norm="ortho"))


def matrices(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer {i}": torch.randn(shape, generator=generator) * (i + 1) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "budget", [Budget("count", 1), Budget("ratio", 0.3), Budget("threshold", 0.8), Budget("energy", 0.9), Budget("ratio", 1)]
)
def test_the_error_told_is_the_error_measured(shape, budget):
    (delta,) = matrices(shape).values()
    part = largest_components({"w": delta}, budget)["w"]
    measured = float((delta.double() - rebuilt(part)).norm())
    assert part.error == pytest.approx(measured, rel=1e-5, abs=1e-5)
    assert part.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert part.relative_error == pytest.approx(measured / float(delta.norm()), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind, amount", [("count", 40), ("ratio", 0.25), ("threshold", 1.5), ("energy", 0.7)])
def test_the_total_error_is_that_of_all_matrices(kind, amount, shared):
    deltas = matrices((8, 6), (10, 10), (6, 8))
    kept = largest_components(deltas, Budget(kind, amount, shared=shared))
    left = torch.cat([(deltas[name].double() - rebuilt(part)).flatten() for name, part in kept.items()])
    everything = torch.cat([delta.flatten() for delta in deltas.values()])
    assert total_error(kept.values()) == pytest.approx(float(left.norm() / everything.norm()), rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_other_choice_of_as_many_cells_is_closer(count):
    (delta,) = matrices((3, 4)).values()
    part = largest_components({"w": delta}, Budget("count", count))["w"]
    spectrum = torch.from_numpy(dctn(delta.double().numpy(), norm="ortho")).flatten()
    best = min(
        float((delta.double() - rebuilt_from(spectrum, cells, delta.shape)).norm())
        for cells in itertools.combinations(range(12), count)
    )
    assert part.error == pytest.approx(best, rel=1e-5)


def rebuilt_from(spectrum, cells, shape):
    chosen = torch.zeros_like(spectrum)
    chosen[list(cells)] = spectrum[list(cells)]
    return torch.from_numpy(idctn(chosen.view(shape).numpy(), norm="ortho"))


@pytest.mark.parametrize("count", [3, 4, 6, 10])
def test_no_other_sharing_of_one_budget_is_closer(count):
    """With at least one component for each matrix: every way of dividing the count, best cells of each."""
    deltas = matrices((2, 3), (3, 2), (4, 1))
    kept = largest_components(deltas, Budget("count", count, shared=True))
    errors = [
        [largest_components({"w": delta}, Budget("count", n))["w"].error ** 2 for n in range(1, delta.numel() + 1)]
        for delta in deltas.values()
    ]
    divisions = (d for d in itertools.product(*(range(1, 1 + len(e)) for e in errors)) if sum(d) == count)
    best = min(sum(e[n - 1] for e, n in zip(errors, division, strict=True)) for division in divisions)
    assert sum(part.error**2 for part in kept.values()) == pytest.approx(best, rel=1e-5, abs=1e-9)
    assert sum(len(part.cells) for part in kept.values()) == count


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("shared", [False, True])
def test_energy_is_reached_and_one_component_fewer_would_not(share, shared):
    deltas = matrices((9, 12), (12, 20))
    kept = largest_components(deltas, Budget("energy", share, shared=shared))
    for group in [list(kept)] if shared else [[name] for name in kept]:
        total = sum(kept[name].norm ** 2 for name in group)
        held = sum(float(kept[name].coefficients.double().square().sum()) for name in group)
        assert held >= share * total * (1 - 1e-9)
        smallest = min(float(kept[name].coefficients.abs().min()) for name in group)
        several = sum(len(kept[name].cells) for name in group) > len(group)
        assert not several or held - smallest**2 < share * total


def test_a_threshold_keeps_what_reaches_it():
    deltas = matrices((9, 12), (12, 20))
    for shared in (False, True):
        kept = largest_components(deltas, Budget("threshold", 1.7, shared=shared))
        for name, part in kept.items():
            spectrum = torch.from_numpy(dctn(deltas[name].double().numpy(), norm="ortho")).flatten()
            assert part.cells.tolist() == (spectrum.abs() >= 1.7).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "budget",
    [
        *(Budget(kind, amount, shared) for kind, amount in (("threshold", 1e6), ("ratio", 1e-9)) for shared in (False, True)),
        Budget("energy", 1e-9, shared=True),
        Budget("count", 2, shared=True),
    ],
)
def test_every_matrix_keeps_its_largest_component(budget):
    deltas = {"large": torch.randn(6, 6) * 1e3, "small": torch.randn(5, 7) * 1e-3}
    for name, part in largest_components(deltas, budget).items():
        spectrum = torch.from_numpy(dctn(deltas[name].double().numpy(), norm="ortho")).flatten()
        assert part.cells.tolist() == [int(spectrum.abs().argmax())]


@pytest.mark.parametrize("kind, amount, kept", [("count", 3, 3), ("energy", 1.0, 1), ("energy", 0.5, 1), ("ratio", 0.5, 8)])
def test_a_matrix_of_zeros(kind, amount, kept):
    part = largest_components({"w": torch.zeros(4, 4)}, Budget(kind, amount))["w"]
    assert len(part.cells) == kept and not part.coefficients.any()
    assert part.error == part.norm == part.relative_error == 0


def test_the_first_of_equals_wins():
    """[1, 0] has two coefficients that are equal to the last bit."""
    deltas = {name: torch.tensor([[1.0, 0.0]]) for name in ("a", "b", "c")}
    kept = largest_components(deltas, Budget("count", 4, shared=True))
    assert {name: part.cells.tolist() for name, part in kept.items()} == {"a": [0, 1], "b": [0], "c": [0]}
    kept = largest_components({"w": torch.zeros(1, 6)}, Budget("count", 2))
    assert kept["w"].cells.tolist() == [0, 1]


def test_half_precision_and_float64_are_taken():
    delta = torch.randn(8, 8, dtype=torch.float64)
    exact = largest_components({"w": delta}, Budget("count", 9))["w"]
    assert exact.error == pytest.approx(float((delta - rebuilt(exact)).norm()), rel=1e-6)
    half = largest_components({"w": delta.bfloat16()}, Budget("count", 9))["w"]
    assert half.error == pytest.approx(float((delta.bfloat16().double() - rebuilt(half)).norm()), rel=1e-5)


def test_matrices_are_asked_for_one_at_a_time():
    class Lazy(dict):
        asked = 0

        def __getitem__(self, name):
            Lazy.asked += 1
            return super().__getitem__(name)

    deltas = Lazy(matrices((6, 6), (6, 6), (6, 6)))
    largest_components(deltas, Budget("energy", 0.5))
    assert Lazy.asked == 3
    largest_components(deltas, Budget("energy", 0.5, shared=True))
    assert Lazy.asked == 3 + 6


def test_a_unet_of_projections_takes_seconds():
    """Time stands for memory here: no sort over the cells of all matrices, no copy of them."""
    delta = torch.randn(1280, 1280)
    with within(20):
        kept = largest_components({str(i): delta for i in range(8)}, Budget("ratio", 0.01, shared=True))
    assert sum(len(part.cells) for part in kept.values()) == round(0.01 * 8 * 1280 * 1280)


@pytest.mark.parametrize(
    "kind, amount, sentence",
    [
        ("count", 0, "whole number from 1"),
        ("count", 2.5, "whole number"),
        ("count", True, "finite"),
        ("energy", 1.2, "share"),
        ("ratio", 0, "share"),
        ("threshold", 0, "above 0"),
        ("threshold", float("nan"), "finite"),
        ("most", 1, "choices"),
    ],
)
def test_a_wrong_budget_is_refused(kind, amount, sentence):
    with pytest.raises(ValueError, match=sentence):
        Budget(kind, amount)


def test_wrong_matrices_are_refused():
    with pytest.raises(ValueError, match="no matrix"):
        largest_components({}, Budget("count", 1))
    with pytest.raises(ValueError, match="w holds NaN"):
        largest_components({"w": torch.full((2, 2), torch.nan)}, Budget("count", 1))
    with pytest.raises(ValueError, match="w has shape"):
        largest_components({"w": torch.ones(2)}, Budget("count", 1))
    with pytest.raises(ValueError, match="w has 4 cells"):
        largest_components({"w": torch.ones(2, 2)}, Budget("count", 5))
    with pytest.raises(ValueError, match="each of 2 matrices"):
        largest_components({"v": torch.ones(2, 2), "w": torch.ones(2, 2)}, Budget("count", 1, shared=True))


# Low rank


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (8, 5), (5, 8)])
def test_truncation_tells_its_error_which_no_other_matrix_of_that_rank_beats(shape):
    (delta,) = matrices(shape).values()
    for rank in range(1, min(shape) + 1):
        cut = truncated(delta, rank)
        measured = float((delta.double() - cut.pair.delta().double()).norm())
        assert cut.pair.rank == rank
        assert cut.error == pytest.approx(measured, rel=1e-4, abs=1e-5)
        assert cut.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        for _ in range(20):  # the best fit on random columns, which has that rank
            basis = torch.linalg.qr(torch.randn(shape[0], rank, dtype=torch.float64)).Q
            assert cut.error <= float((delta - basis @ (basis.T @ delta.double())).norm()) + 1e-5


def test_the_factors_are_balanced():
    cut = truncated(torch.randn(9, 6), 3).pair
    assert torch.allclose(cut.up.norm(dim=0), cut.down.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_factors_are_cut_down_as_their_product_is(rank):
    pair = LowRankPair(torch.randn(3, 7), torch.randn(9, 3), 0.7)
    of_factors, of_product = truncated(pair, rank), truncated(pair.delta(), rank)
    assert of_factors.pair.rank == min(rank, 3)
    assert torch.allclose(of_factors.pair.delta(), of_product.pair.delta(), atol=1e-5)
    assert of_factors.error == pytest.approx(of_product.error, rel=1e-4, abs=1e-5)
    assert of_factors.norm == pytest.approx(of_product.norm, rel=1e-5)


def test_a_rank_above_the_sides_works_for_factors():
    pair = LowRankPair(torch.randn(9, 4), torch.randn(3, 9), 2.0)
    cut = truncated(pair, 3)
    assert torch.allclose(cut.pair.delta(), pair.delta(), atol=1e-4) and cut.error < 1e-4


def test_wrong_ranks_and_factors_are_refused():
    for rank in (0, 4, 1.0, True):
        with pytest.raises(ValueError, match="ranks from 1 to 3"):
            truncated(torch.ones(3, 5), rank)
    with pytest.raises(ValueError, match="expected a matrix"):
        truncated(torch.ones(3), 1)
    with pytest.raises(ValueError, match="NaN"):
        truncated(torch.full((2, 2), torch.inf), 1)
    with pytest.raises(ValueError, match="expected"):
        LowRankPair(torch.ones(2, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match="finite"):
        LowRankPair(torch.ones(2, 3), torch.ones(4, 2), float("inf"))
