"""Clipping values from counts: bins, max, percentile, MSE, entropy, and the percentile over timesteps."""

from __future__ import annotations

import numpy as np
import pytest
from quant_helpers import statistics

from ditc.export.quant.estimators import Method, estimate_amax, squared_error
from ditc.export.quant.formats import Format, fake_quantize, scale_of
from ditc.export.quant.histogram import BINS, bin_of, edges


@pytest.fixture(scope="module")
def outliers() -> np.ndarray:
    """A normal tensor with a few values twenty times as large."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 16)).astype(np.float32)
    x[:3] *= 20
    return x


def test_a_value_lies_between_the_edges_of_its_bin():
    values = np.float32(np.exp2(np.random.default_rng(0).uniform(-23, 23, 1000)))
    bins, points = bin_of(values), edges()
    assert (points[bins] <= values).all() and (values < points[bins + 1]).all()
    assert (points[1:] / points[:-1]).max() <= 1 + 1 / 32


def test_the_counts_are_those_between_the_edges(outliers):
    np.testing.assert_array_equal(
        statistics(outliers).histogram[0], np.histogram(np.abs(outliers), edges())[0]
    )


def test_what_lies_outside_all_bins_is_counted_at_their_ends():
    (counts,) = statistics(np.float32([[0.0], [1e-30], [1e30]])).histogram
    assert (counts[0], counts[-1], counts.sum(), len(counts)) == (2, 1, 3, BINS)


def test_max_is_the_largest_magnitude(outliers):
    assert estimate_amax(statistics(outliers), Method.MAX, Format.INT8) == np.abs(outliers).max()


def test_a_percentile_leaves_out_that_share_of_values(outliers):
    amax = estimate_amax(statistics(outliers), Method.PERCENTILE, Format.INT8, percentile=99.0)
    assert amax == pytest.approx(np.quantile(np.abs(outliers), 0.99), rel=1 / 32)


def test_mse_finds_the_amax_with_the_least_error(outliers):
    found = estimate_amax(statistics(outliers), Method.MSE, Format.INT8)

    def error(amax: float) -> float:
        return float(
            ((fake_quantize(outliers, scale_of(amax, Format.INT8), Format.INT8) - outliers) ** 2).mean()
        )

    tried = [error(np.abs(outliers).max() * share) for share in np.linspace(0.2, 1, 50)]
    assert error(found) <= min(tried) * 1.02


def test_the_error_from_counts_is_the_error_of_the_values(outliers):
    for kind in Format:
        amax = 8.0
        direct = ((fake_quantize(outliers, scale_of(amax, kind), kind) - outliers) ** 2).mean()
        assert squared_error(statistics(outliers).histogram[0], amax, kind) == pytest.approx(direct, rel=0.02)


def test_entropy_clips_a_long_tail(outliers):
    amax = estimate_amax(statistics(outliers), Method.ENTROPY, Format.INT8)
    assert np.abs(outliers).std() < amax < 0.8 * np.abs(outliers).max()


def test_a_percentile_over_timesteps_leaves_extreme_steps_out(outliers):
    calm = outliers[3:]
    both = statistics(calm, calm, calm, outliers)
    assert estimate_amax(both, Method.MAX, Format.INT8, timesteps=75.0) == np.abs(calm).max()
    assert estimate_amax(both, Method.MAX, Format.INT8) == np.abs(outliers).max()
