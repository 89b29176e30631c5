"""The theory behind examples/paper: integrals against brute force and simulation, Marchenko-Pastur, a test of normality."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import binom, norm

import critical_correlation
import expected_errors
import marchenko_pastur
import normality
import reconstruction
import update_statistics
from expected_errors import CELLS, DCT, METHODS, PARTS, RANDOM_CELLS, SVD


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("count", "among"), [(1, 10), (4, 10), (9, 10), (60, 200)])
def test_largest_of_exponential_numbers(count, among):
    """E of the i-th largest of n is 1 / n + ... + 1 / i."""
    exact = sum(sum(1 / j for j in range(i, among + 1)) for i in range(1, count + 1)) / among
    assert expected_errors.largest(expected_errors.exponential_tail, count, among) == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize(("count", "among"), [(1, 10), (4, 10), (60, 200)])
def test_largest_of_squared_normal_numbers(count, among):
    """A number is among the largest where fewer than `count` of the others are larger."""
    exact, _ = quad(lambda z: 2 * z * z * norm.pdf(z) * binom.cdf(count - 1, among - 1, 2 * norm.sf(z)), 0, 12, limit=200)
    assert expected_errors.largest(expected_errors.normal_tail, count, among) == pytest.approx(exact, abs=1e-7)


def test_none_and_all_are_kept():
    for tail in (expected_errors.exponential_tail, expected_errors.normal_tail):
        assert expected_errors.largest(tail, 0, 10) == 0
        assert expected_errors.largest(tail, 10, 10) == 1
        assert (tail(0), tail(1)) == (0, 1)


def test_integrals_and_simulation_agree_within_the_standard_error(random):
    size, ranks = 60, [2, 5, 20]
    runs = [reconstruction.errors(random.standard_normal((size, size)), ranks, random) for _ in range(40)]
    for place, rank in enumerate(ranks):
        integrals = expected_errors.expected_errors(size, rank)
        for method in METHODS:
            values = np.array([run[method][place] for run in runs])
            spread = values.std(ddof=1) / math.sqrt(len(values))
            # the SVD's integral is the limit of large K
            slack = 0.3 / size if method == SVD else 2e-4
            assert abs(values.mean() - integrals[method]) < 3.5 * spread + slack, (method, rank)


def test_the_order_of_theorem_1_and_where_it_ends():
    for share in (0.01, 0.1, 0.2, 1 / 3):
        errors = expected_errors.limit_errors(share)
        assert errors[PARTS] == errors[DCT] < errors[CELLS] < errors[SVD] < errors[RANDOM_CELLS]
    end = expected_errors.crossing(PARTS, CELLS)
    assert 1 / 3 < end < 1 / 2
    errors = expected_errors.limit_errors(end)
    assert errors[PARTS] == pytest.approx(errors[CELLS])
    assert expected_errors.crossing(CELLS, SVD) is None


@pytest.mark.parametrize("shape", [(6, 6), (7, 7), (6, 9), (5, 4)])
def test_the_half_spectrum_has_the_whole_energy(random, shape):
    matrix = random.standard_normal(shape)
    cells, parts = reconstruction.fourier_energies(matrix)
    assert len(parts) == matrix.size
    assert cells.sum() == pytest.approx((matrix**2).sum())
    assert parts.sum() == pytest.approx((matrix**2).sum())


def test_a_kept_cell_is_a_wave_and_its_energy_what_it_explains(random):
    matrix = random.standard_normal((6, 6))
    spectrum = np.fft.fft2(matrix)
    masked = np.zeros_like(spectrum)
    for cell in ((1, 2), (-1, -2)):  # with its mirror image
        masked[cell] = spectrum[cell]
    rest = matrix - np.fft.ifft2(masked).real
    explained = (matrix**2).sum() - (rest**2).sum()
    cells, _ = reconstruction.fourier_energies(matrix)
    assert np.isclose(cells, explained).sum() == 1


def test_errors_are_those_of_the_truncated_matrix(random):
    matrix = random.standard_normal((9, 6))
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    by_rank, by_dct = reconstruction.svd_and_dct_errors(matrix, [2, 6])
    rest = matrix - u[:, :2] * s[:2] @ v[:2]
    assert by_rank == pytest.approx([(rest**2).sum() / (matrix**2).sum(), 0])
    assert 0 < by_dct[0] < 1
    assert expected_errors.budgets((9, 6), 2) == (10, 15)


@pytest.mark.parametrize("aspect", [0.05, 0.25, 1.0])
def test_the_density_integrates_to_one_and_to_its_distribution(aspect):
    low, high = marchenko_pastur.bounds(aspect)

    def share_up_to(value):
        return quad(lambda x: float(marchenko_pastur.density(np.array(x), aspect)), low, value, limit=400)[0]

    assert share_up_to(high) == pytest.approx(1, abs=1e-5)
    middle = low + 0.3 * (high - low)
    assert float(marchenko_pastur.cumulative(np.array(middle), aspect)) == pytest.approx(share_up_to(middle), abs=1e-5)
    assert marchenko_pastur.cumulative(np.array([low - 1, high + 1]), aspect).tolist() == pytest.approx([0, 1], abs=1e-3)
    assert marchenko_pastur.density(np.array([low - 0.01, high + 0.01]), aspect).tolist() == [0, 0]


def test_the_top_energy_is_an_integral_of_the_density():
    angle = 0.7
    bound = (2 * math.cos(angle)) ** 2
    share, energy = (
        quad(lambda x, power=power: x**power * float(marchenko_pastur.density(np.array(x), 1.0)), bound, 4)[0]
        for power in (0, 1)
    )
    assert marchenko_pastur.top_energy(share) == pytest.approx(energy, abs=1e-6)
    assert (marchenko_pastur.top_energy(0), marchenko_pastur.top_energy(1)) == pytest.approx((0, 1))


@pytest.mark.parametrize("shape", [(300, 300), (100, 400), (400, 100)])
def test_gaussian_noise_follows_the_law_and_a_low_rank_matrix_does_not(random, shape):
    noise = update_statistics.spectrum_statistics(3 + 0.1 * random.standard_normal(shape))
    assert noise["distance_to_law"] < 0.03
    assert 0.9 < noise["largest_over_bound"] < 1.1
    low_rank = random.standard_normal((shape[0], 8)) @ random.standard_normal((8, shape[1]))
    found = update_statistics.spectrum_statistics(low_rank)
    assert found["distance_to_law"] > 0.3
    assert found["largest_over_bound"] > 3


def test_a_wide_aspect_is_refused():
    with pytest.raises(ValueError, match=r"aspect=2\.0: columns by rows are in \(0, 1\]"):
        marchenko_pastur.bounds(2.0)


def test_normal_entries_are_accepted_whatever_their_scale_and_others_rejected(random):
    count = 40_000
    null = normality.null_statistics(count, 0.05, 30, random)
    assert len(null) == 300
    assert (np.diff(null) >= 0).all()

    def p(entries):
        return normality.p_value(normality.statistic(entries), null)

    assert p(random.standard_normal(count)) > 0.5
    assert p(1e-4 + 1e-5 * random.standard_normal(count)) > 0.5
    assert p(random.laplace(size=count)) == 0
    assert p(random.uniform(size=count)) == 0
    rank_one = np.outer(random.standard_normal(200), random.standard_normal(200))
    assert p(rank_one) == 0


def test_the_chance_level_is_what_normal_numbers_show(random):
    assert normality.NORMAL.sum() == pytest.approx(1)
    found = [normality.total_variation(normality.counts(random.standard_normal(5000))) for _ in range(30)]
    assert normality.chance(5000) == pytest.approx(np.mean(found), rel=0.03)
    assert normality.counts(np.array([-9.0, 0.0, 9.0])).tolist() == [1, *[0] * 48, 1, *[0] * 49, 1]


def test_an_epsilon_below_chance_is_refused(random):
    with pytest.raises(ValueError, match=r"epsilon=0\.05: 400 normal numbers already differ"):
        normality.null_statistics(400, 0.05, 1, random)


@pytest.mark.parametrize("model", critical_correlation.MODELS)
def test_a_spike_has_rank_one(random, model):
    added = critical_correlation.spike(model, 30, random)
    assert np.linalg.matrix_rank(added) == 1
    if model == "random":
        assert (added**2).mean() == pytest.approx(1)


def test_the_critical_point_is_where_the_lead_falls_to_zero():
    assert critical_correlation.critical([0, 0.1, 0.2], np.array([0.3, 0.1, -0.3])) == pytest.approx(0.125)
    assert critical_correlation.critical([0, 0.1], np.array([0.3, 0.1])) is None


def test_without_correlation_the_limits_are_those_of_theorem_1():
    by_rank, by_dct = critical_correlation.random_spike_errors(1e-9, 10_000, 1000)
    errors = expected_errors.limit_errors(0.1)
    assert (by_rank, by_dct) == pytest.approx((errors[SVD], errors[DCT]), abs=1e-3)
