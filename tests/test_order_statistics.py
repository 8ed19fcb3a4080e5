"""Selection by bisection of bits against NumPy's sort."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agr_jax.order_statistics import kth_smallest, largest_level

rows = hnp.arrays(
    np.float32,
    (3, 17),
    elements=st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 2.0**100, width=32)),
)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(rows, st.integers(0, 16))
def test_kth_smallest_is_the_sorted_entry(values, rank):
    got = kth_smallest(jnp.asarray(values), jnp.full(3, rank))
    np.testing.assert_array_equal(got, np.sort(values, axis=1)[:, rank])


@settings(deadline=None, derandomize=True, max_examples=50)
@given(rows, st.floats(1e-3, 20))
def test_largest_level_splits_the_weights(values, total):
    weights = np.random.default_rng(0).integers(0, 4, values.shape).astype(np.float32)
    total = np.float32(total)
    level = np.asarray(largest_level(jnp.asarray(values), jnp.asarray(weights), jnp.full(3, total)))
    for row, weight, got in zip(values, weights, level, strict=True):
        reached = [v for v in row if weight[row >= v].sum() >= total]
        assert got == (max(reached) if reached else 0)


@pytest.mark.parametrize("value", [0.0, 2e-44, np.finfo(np.float32).tiny, 3.4e38])
def test_constant_rows(value):
    values = jnp.full([2, 5], value, jnp.float32)
    np.testing.assert_array_equal(kth_smallest(values, jnp.asarray([0, 4])), values[:, 0])
    weights = jnp.ones_like(values)
    np.testing.assert_array_equal(largest_level(values, weights, jnp.full(2, 3.0)), values[:, 0])


def test_subnormal_and_negative_zeros_have_their_order():
    values = jnp.asarray([[3e-44, -0.0, 1e-44, 1.0]], jnp.float32)
    found = [np.asarray(kth_smallest(values, jnp.asarray([rank]))) for rank in range(4)]
    np.testing.assert_array_equal(np.concatenate(found), np.float32([0, 1e-44, 3e-44, 1]))
