"""`agr_transform` against reference numbers, a reference of its own and its documented tables."""

import functools
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agr_jax import (
    AGRState,
    GradientPair,
    agr_transform,
    clean_and_adversarial_grads,
    from_gradient_pair,
    leaf_names,
)

BOTH_FILES = pytest.mark.parametrize("file", ["agr_leaves_small.npz", "agr_leaves.npz"])


def reference_leaf(
    g_a,
    g_c,
    *,
    gop=True,
    interpolation="cosine",  # None: that part does not act
    interpolate_negative=False,
    clip_norm=None,
    clip="changed",
):
    """One leaf in NumPy float64, written branch by branch from the paper: (G, cosine, branch)."""
    a, c = np.asarray(g_a, np.float64), np.asarray(g_c, np.float64)
    inner = np.vdot(a, c)
    cosine = inner / (np.linalg.norm(a) * np.linalg.norm(c) + 1e-20)
    if cosine < 0 and gop:
        result, branch = a - inner / np.vdot(c, c) * c, "projected"
    elif interpolation is not None and (cosine >= 0 or interpolate_negative):
        share = {"cosine": 1 - cosine, "mean": 0.5}.get(interpolation, interpolation)
        result, branch = (1 - share) * c + share * a, "interpolated"
    else:
        result, branch = a, "plain"
    clipped = {
        "changed": branch != "plain",
        "interpolated": branch == "interpolated",
        "all": True,
        "none": False,
    }[clip]
    length = np.linalg.norm(result)
    if clip_norm is not None and clipped and length > clip_norm:
        result = result * (clip_norm / length)
    return result, cosine, branch


def with_cosine(cosine, size=6, norm_a=2.0, norm_c=3.0, seed=0):
    """Two float32 vectors (g_a, g_c) of the given norms and cosine."""
    rng = np.random.default_rng(seed)
    c, other = rng.normal(size=(2, size))
    c /= np.linalg.norm(c)
    other -= (other @ c) * c
    other /= np.linalg.norm(other)
    a = cosine * c + np.sqrt(1 - cosine**2) * other
    return (norm_a * a).astype(np.float32), (norm_c * c).astype(np.float32)


def apply_once(transform, g_a, g_c):
    """The result and the next state for a single tree."""
    return transform.update(g_a, transform.init(g_a), clean_grads=g_c)


def assert_leaf_close(actual, expected, atol):
    """Euclidean distance of two leaves; the tolerance is the caller's."""
    distance = np.linalg.norm(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    assert distance <= atol, f"distance {distance:.3e}, allowed {atol:.3e}"


# --- the official code's numbers ------------------------------------------------------------------


@BOTH_FILES
def test_official_results(golden, file):
    z = golden(file)
    index = z["index"] if "index" in z else np.arange(int(z["n_leaves"]))
    g_a = [z[f"leaf{i:03d}_adv"] for i in index]
    g_c = [z[f"leaf{i:03d}_clean"] for i in index]
    assert len(index) >= 57

    outs, state = jax.jit(lambda a, c: apply_once(agr_transform(clip_norm=0.1), a, c))(g_a, g_c)

    for i, out, a in zip(index, outs, g_a, strict=True):
        norm_a = np.linalg.norm(a)
        anti_parallel = z["cs_ref64"][i] < -0.99999  # scalars of different sign among them
        for kind in ("agr", "agr_ref64"):
            expected = z[f"leaf{i:03d}_{kind}"]
            # Measured 9.2e-7 of the norm; anti-parallel leaves are 0 up to 1.2e-7 of |g_a|.
            tolerance = 1e-6 * norm_a if anti_parallel else 2e-6 * np.linalg.norm(expected)
            assert_leaf_close(out, expected, tolerance)
    np.testing.assert_allclose(state.cosine, z["cs_ref64"][index], rtol=0, atol=1e-6)
    np.testing.assert_allclose(state.cosine, z["cs"][index], rtol=0, atol=1e-6)
    # The official code counts cosines <= 0 as projected; at 0 both branches give g_a.
    np.testing.assert_array_equal(state.projected, z["cs_ref64"][index] < 0)


def test_official_diagnostics(golden):
    z = golden("agr_leaves.npz")
    g_a = [z[f"leaf{i:03d}_adv"] for i in range(80)]
    g_c = [z[f"leaf{i:03d}_clean"] for i in range(80)]
    _, state = jax.jit(lambda a, c: apply_once(agr_transform(), a, c))(g_a, g_c)
    assert int(np.sum(state.cosine <= 0)) == z["agr_gop_count"] == 41
    np.testing.assert_allclose(np.mean(state.cosine), z["agr_mean_cos"], rtol=0, atol=1e-6)
    # Float32 sums of 80 norms up to 1e6: measured 6e-8.
    np.testing.assert_allclose(np.mean(state.clean_norm), z["agr_mean_norm_clean"], rtol=1e-6)
    np.testing.assert_allclose(np.mean(state.adversarial_norm), z["agr_mean_norm_adv"], rtol=1e-6)


@BOTH_FILES
def test_official_diagnostics_before_the_start(golden, file):
    z = golden(file)
    index = z["index"] if "index" in z else np.arange(int(z["n_leaves"]))
    g_a = [z[f"leaf{i:03d}_adv"] for i in index]
    g_c = [z[f"leaf{i:03d}_clean"] for i in index]
    waiting = agr_transform(gop_start=10, gics_start=10)
    outs, state = jax.jit(lambda a, c: apply_once(waiting, a, c))(g_a, g_c)
    chex.assert_trees_all_equal(outs, g_a)
    np.testing.assert_allclose(state.cosine, z["cs_ref64"][index], rtol=0, atol=1e-6)
    assert not np.any(state.projected)
    if len(index) == 80:
        assert int(np.sum(state.cosine <= 0)) == z["pre_gop_count"]
        np.testing.assert_allclose(np.mean(state.cosine), z["pre_mean_cos"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.mean(state.clean_norm), z["pre_mean_norm_clean"], rtol=1e-6)


@BOTH_FILES
@pytest.mark.parametrize("leaf", ["zeroclean0", "zeroclean1"])
def test_zero_clean_gradient_of_the_reference_file(golden, file, leaf):
    z = golden(file)
    g_a, g_c = z[f"{leaf}_adv"], z[f"{leaf}_clean"]
    assert np.all(np.isnan(z[f"{leaf}_agr_official"]))  # 0 / 0 there, not reproduced
    out, _ = apply_once(agr_transform(clip_norm=0.1), g_a, g_c)
    norm = np.linalg.norm(g_a.astype(np.float64))
    assert_leaf_close(out, g_a * (0.1 / max(0.1, norm)), 2e-7 * norm)
    before, _ = apply_once(agr_transform(gop_start=1, gics_start=1), g_a, g_c)
    np.testing.assert_array_equal(before, z[f"{leaf}_pre_official"])


# --- the case table, cell by cell -----------------------------------------------------------------


@pytest.mark.parametrize("clip", ["none", "changed"])
@pytest.mark.parametrize(
    ("interpolation", "interpolate_negative"),
    [("cosine", False), *((kind, flag) for kind in ("mean", 0.3, None) for flag in (False, True))],
)
@pytest.mark.parametrize("gop", [True, False])
@pytest.mark.parametrize("cosine", [-0.9, 0.0, 0.2])
def test_case_table(cosine, gop, interpolation, interpolate_negative, clip):
    # None: the interpolation does not act, whatever its kind.
    argument = "mean" if interpolation is None else interpolation
    if cosine == 0:
        g_a, g_c = np.float32([0, 2, 0, -1]), np.float32([3, 0, 0.5, 0])
    else:
        g_a, g_c = with_cosine(cosine)
    transform = agr_transform(
        gop_start=0 if gop else None,
        gics_start=None if interpolation is None else 0,
        interpolation=argument,
        interpolate_negative=interpolate_negative,
        clip=clip,
        clip_norm=0.7,
    )
    out, state = apply_once(transform, g_a, g_c)
    expected, expected_cosine, branch = reference_leaf(
        g_a,
        g_c,
        gop=gop,
        interpolation=interpolation,
        interpolate_negative=interpolate_negative,
        clip_norm=0.7,
        clip=clip,
    )
    assert_leaf_close(out, expected, 2e-6)  # norms are 2 and 3: measured 3e-7
    np.testing.assert_allclose(state.cosine, [expected_cosine], atol=3e-7)
    np.testing.assert_array_equal(state.projected, [branch == "projected"])


def test_the_cells_differ():
    # Guards the test above: on its inputs the four branches give four results.
    g_a, g_c = with_cosine(-0.9)
    projected = reference_leaf(g_a, g_c)[0]
    plain = reference_leaf(g_a, g_c, gop=False)[0]
    mean = reference_leaf(g_a, g_c, gop=False, interpolation="mean", interpolate_negative=True)[0]
    tau = reference_leaf(g_a, g_c, gop=False, interpolation=0.3, interpolate_negative=True)[0]
    results = [projected, plain, mean, tau]
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert np.linalg.norm(one - other) > 0.1


def test_tau_is_the_share_of_the_adversarial_gradient():
    g_a, g_c = np.float32([1, 0]), np.float32([0, 1])
    out, _ = apply_once(agr_transform(interpolation=0.25, clip="none"), g_a, g_c)
    np.testing.assert_array_equal(out, [0.25, 0.75])


# --- starts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("starts", "clip", "first_clipped"),  # starts of GOP, of GICS and of the clip
    [
        ((0, 0, None), "changed", 0),
        ((1, 3, None), "all", 1),
        ((3, 1, None), "all", 1),
        ((None, 2, None), "all", 2),
        ((2, None, None), "all", 2),
        ((2, None, None), "changed", 2),
        ((None, 0, None), "changed", 0),
        ((None, None, None), "changed", None),
        ((None, None, 2), "all", 2),
        ((3, 2, 0), "all", 0),
        ((0, 1, 3), "changed", 3),
        ((0, 1, 3), "interpolated", 3),
        ((1, 1, None), "none", None),
    ],
)
@pytest.mark.parametrize("interpolation", ["cosine", "mean"])  # the mean of conflicts, too
def test_starts(starts, clip, first_clipped, interpolation):
    gop_start, gics_start, clip_start = starts
    interpolate_negative = interpolation == "mean"
    g_a, g_c = {}, {}
    g_a["conflict"], g_c["conflict"] = with_cosine(-0.6)
    g_a["agree"], g_c["agree"] = with_cosine(0.6, seed=1)
    transform = agr_transform(
        gop_start=gop_start,
        gics_start=gics_start,
        interpolation=interpolation,
        interpolate_negative=interpolate_negative,
        clip_start=clip_start,
        clip=clip,
        clip_norm=0.5,
    )
    update = jax.jit(transform.update)
    state = transform.init(g_a)
    for step in range(5):
        assert int(state.step) == step
        out, state = update(g_a, state, clean_grads=g_c)
        for name in ("agree", "conflict"):
            expected, _, branch = reference_leaf(
                g_a[name],
                g_c[name],
                gop=gop_start is not None and step >= gop_start,
                interpolation=interpolation
                if gics_start is not None and step >= gics_start
                else None,
                interpolate_negative=interpolate_negative,
                clip=clip,
                clip_norm=0.5 if first_clipped is not None and step >= first_clipped else None,
            )
            assert_leaf_close(out[name], expected, 2e-6)
            if name == "conflict":
                assert float(state.projected[1]) == (branch == "projected")


# --- clip -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["changed", "interpolated", "all", "none"])
def test_clip_modes(clip):
    # Three branches: GOP acts; the interpolation acts; a conflict that nothing acts on.
    g_a, g_c = with_cosine(-0.5)
    b_a, b_c = with_cosine(0.5)
    for gop in (0, None):
        transform = agr_transform(gop_start=gop, clip=clip, clip_norm=0.3)
        out, _ = apply_once(transform, [g_a, b_a], [g_c, b_c])
        for leaf, a, c in zip(out, (g_a, b_a), (g_c, b_c), strict=True):
            expected, _, branch = reference_leaf(a, c, gop=gop == 0, clip=clip, clip_norm=0.3)
            assert_leaf_close(leaf, expected, 2e-6)
            is_clipped = clip == "all" or (branch == "interpolated" and clip != "none")
            is_clipped = is_clipped or (branch == "projected" and clip == "changed")
            length = float(jnp.linalg.norm(leaf))
            assert length <= 0.3 * (1 + 2e-7) if is_clipped else length > 1


def test_a_short_leaf_is_not_stretched():
    g_a, g_c = with_cosine(-0.5, norm_a=0.05)
    clipped, _ = apply_once(agr_transform(clip_norm=0.1), g_a, g_c)
    free, _ = apply_once(agr_transform(clip_norm=None, clip="none"), g_a, g_c)
    np.testing.assert_array_equal(clipped, free)


# --- granularity and input forms ------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])  # one of each sign of the global cosine
@pytest.mark.parametrize("clip", ["changed", "all", "none"])
def test_global_granularity_is_one_concatenated_leaf(seed, clip):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3,), "b": (2, 4), "c": (), "d": (0,)}
    g_c = {k: np.asarray(rng.normal(size=s), np.float32) for k, s in shapes.items()}
    sign = 1 if seed else -1
    g_a = {k: np.asarray(sign * v + rng.normal(size=v.shape), np.float32) for k, v in g_c.items()}
    whole = {
        name: np.concatenate([g[k].ravel() for k in shapes]) for name, g in (("a", g_a), ("c", g_c))
    }
    options = {"clip": clip, "clip_norm": 0.4}
    out, state = apply_once(agr_transform(granularity="global", **options), g_a, g_c)
    expected, expected_state = apply_once(agr_transform(**options), whole["a"], whole["c"])
    chex.assert_trees_all_equal_shapes_and_dtypes(out, g_a)
    flat = np.concatenate([np.ravel(out[k]) for k in shapes])
    assert_leaf_close(flat, expected, 1e-6)  # other orders of summation: measured 1.2e-7
    # Every leaf has the diagnostics of the whole.
    spread = jax.tree.map(lambda v: np.repeat(v, len(shapes)) if v.ndim else v, expected_state)
    chex.assert_trees_all_close(state, spread, rtol=1e-6)
    assert state.cosine.shape == (len(shapes),)
    assert (float(state.cosine[0]) < 0) == (seed == 0)
    per_leaf, _ = apply_once(agr_transform(**options), g_a, g_c)
    assert np.linalg.norm(np.ravel(per_leaf["b"]) - np.ravel(out["b"])) > 1e-3


def test_both_input_forms_and_the_adapter_agree():
    rng = np.random.default_rng(0)
    draw = lambda: {"w": np.float32(rng.normal(size=(3, 2))), "b": np.float32(rng.normal(size=2))}  # noqa: E731
    g_a, g_c = draw(), draw()
    transform = agr_transform()
    by_argument = apply_once(transform, g_a, g_c)
    by_pair = transform.update(GradientPair(clean=g_c, adversarial=g_a), transform.init(g_a))
    adapter = from_gradient_pair(transform)
    by_adapter = adapter.update(GradientPair(g_c, g_a), adapter.init(GradientPair(g_a, g_a)))
    chex.assert_trees_all_equal(by_argument, by_pair, by_adapter)
    swapped = apply_once(transform, g_c, g_a)
    assert not np.allclose(by_argument[0]["w"], swapped[0]["w"])


def test_init_takes_parameters_or_a_pair_of_them():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    for transform in (agr_transform(), from_gradient_pair(agr_transform())):
        one, two = transform.init(params), transform.init(GradientPair(params, params))
        chex.assert_trees_all_equal(one, two)
        assert one.cosine.shape == (2,)


# --- without the clean gradient -------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["leaf", "global"])
def test_without_clean_gradient(granularity):
    g_a = {"w": jnp.full((3, 2), 5.0), "b": jnp.full(2, jnp.bfloat16(7))}
    g_c = {"w": jnp.full((3, 2), -1.0), "b": jnp.full(2, jnp.bfloat16(1))}
    transform = agr_transform(granularity=granularity)
    state = transform.init(g_a)
    out, without = transform.update(g_a, state)
    chex.assert_trees_all_equal(out, g_a)
    chex.assert_trees_all_equal_shapes_and_dtypes(out, g_a)
    assert int(without.step) == 1
    for diagnostic in without[1:]:
        assert np.all(np.isnan(diagnostic))
        assert diagnostic.size == 2
    _, with_clean = transform.update(g_a, state, clean_grads=g_c)
    assert not np.any(np.isnan(with_clean.cosine))
    for other in (without, with_clean):
        chex.assert_trees_all_equal_structs(state, other)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, other)


def test_steps_without_clean_gradient_count():
    g_a, g_c = with_cosine(-0.6)
    transform = agr_transform(gop_start=2, clip="none", clip_norm=None)
    state = transform.init(g_a)
    for _ in range(2):
        out, state = transform.update(g_a, state)
        np.testing.assert_array_equal(out, g_a)
    out, _ = transform.update(g_a, state, clean_grads=g_c)
    assert_leaf_close(out, reference_leaf(g_a, g_c)[0], 2e-6)


@pytest.mark.parametrize("granularity", ["leaf", "global"])
def test_the_control_of_clipping_alone(granularity):
    g_a = {"long": np.float32([3, 4]), "short": np.float32([0.03, 0.04])}
    transform = agr_transform(
        gop_start=None, gics_start=None, clip="all", clip_start=1, granularity=granularity
    )
    state = transform.init(g_a)
    out, state = transform.update(g_a, state)
    chex.assert_trees_all_equal(out, g_a)  # before clip_start
    without, _ = transform.update(g_a, state)
    opposite = jax.tree.map(np.negative, g_a)
    with_clean, _ = transform.update(g_a, state, clean_grads=opposite)
    whole = np.linalg.norm(np.concatenate(list(g_a.values())).astype(np.float64))
    expected = {
        "leaf": {"long": g_a["long"] * 0.02, "short": g_a["short"]},
        "global": {k: v * (0.1 / whole) for k, v in g_a.items()},
    }[granularity]
    chex.assert_trees_all_close(without, expected, rtol=3e-7)
    chex.assert_trees_all_equal(without, with_clean)


# --- the edge-case table of the docstring, row for row --------------------------------------------

_A, _C = np.float32([1.0, -2.0, 0.5]), np.float32([0.5, 1.0, 3.0])
_ZERO = np.zeros(3, np.float32)
_TINY = np.float32(1e-10 / np.linalg.norm(_A)) * _A
_NONE = {"gop_start": None, "gics_start": None}
_NAN = np.full(3, np.nan, np.float32)


def _with(value, place=0):
    out = _A.copy()
    out[place] = value
    return out


# row of the table: (g_a, g_c, options, expected, absolute tolerance)
EDGE_CASES = {
    "g_c = 0": [
        (_A, _ZERO, {}, _A, 0),
        (_A, _ZERO, {"gics_start": None}, _A, 0),
        (_A, _ZERO, {"gop_start": None}, _A, 0),
        (_A, _ZERO, {"interpolation": 0.25}, 0.25 * _A, 0),  # by the case table
    ],
    "g_a = 0": [
        (_ZERO, _C, {}, _ZERO, 0),
        (_ZERO, _C, {"interpolation": 0.25}, 0.75 * _C, 0),
        (_ZERO, _C, {"interpolation": "mean"}, 0.5 * _C, 0),
    ],
    "both 0": [
        (_ZERO, _ZERO, {}, _ZERO, 0),
        (_ZERO, _ZERO, {"interpolation": 0.25}, _ZERO, 0),
    ],
    "parallel, g_a = k g_c, k > 0": [
        # The cosine is 1 up to 1e-7, times |g_a - g_c|.
        (k * _C, _C, {}, _C, 2e-7 * (1 + k) * 4)
        for k in (0.25, 1.0, 3.0, 1000.0)
    ],
    "anti-parallel, g_a = -k g_c": [
        (np.float32(-k) * _C, _C, {}, _ZERO, 1e-6 * k) for k in (0.25, 1.0, 3.0, 1000.0)
    ],
    "scalar, signs differ": [
        (np.float32(-3), np.float32(0.7), {}, np.float32(0), 1e-6),
        (np.float32(3), np.float32(0.7), {}, np.float32(0.7), 1e-6),
        (np.float32(-3), np.float32(-0.7), {}, np.float32(-0.7), 1e-6),
        (np.float32(0.02), np.float32(-0.5), {}, np.float32(0), 1e-8),
    ],
    "empty": [
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), {}, np.zeros((0, 3)), 0)
    ],
    "NaN or infinity in either gradient": [
        (*pair, options, _NAN, 0)
        for value in (np.nan, np.inf, -np.inf)
        for pair in (
            (_with(value), _C),
            (_A, _with(value)),
            (_with(value), _with(value, 1)),
            (_with(value), _ZERO),
            (_ZERO, _with(value)),
        )
        for options in (
            {},
            {"gics_start": None},
            {"gop_start": None},
            {"interpolation": "mean"},
            {"interpolation": 0.25, "interpolate_negative": True},
        )
    ],
    "the same, neither part active": [
        (*pair, options, pair[0], 0)
        for value in (np.nan, np.inf, -np.inf)
        for pair in ((_with(value), _C), (_A, _with(value)))
        for options in (_NONE, {"gop_start": 1, "gics_start": 1})
    ],
    "norms with a product near 1e-20": [
        # |g_c| = 1e-10, |g_a| = 2e-10, parallel: the cosine is 2e-20 / (2e-20 + 1e-20).
        (2 * _TINY, _TINY, {}, 4 / 3 * _TINY, 1e-16),
    ],
}


@pytest.mark.parametrize("row", EDGE_CASES)
def test_edge_cases(row):
    for g_a, g_c, options, expected, atol in EDGE_CASES[row]:
        for tree in (lambda x: x, lambda x: {"alone": x}):
            transform = agr_transform(clip="none", clip_norm=None, **options)
            out, state = apply_once(transform, tree(g_a), tree(g_c))
            out = jax.tree.leaves(out)[0]
            assert out.shape == g_a.shape
            assert out.dtype == g_a.dtype
            np.testing.assert_allclose(out, expected, rtol=0, atol=atol, err_msg=str(options))
            if not np.any(np.isnan(expected)) and np.all(np.isfinite([*g_a.flat, *g_c.flat])):
                assert np.all(np.isfinite(state.cosine))
                if not np.any(g_a) or not np.any(g_c):
                    assert float(state.cosine[0]) == 0


def test_every_documented_edge_case_has_a_test():
    table = (
        inspect.getdoc(agr_transform).split("Edge cases")[1].split("With both parts active, and")[0]
    )
    rules = [m.start() for m in re.finditer(r"=+  =+", table)]
    body = table[rules[1] : rules[2]].splitlines()[1:]
    rows = [line.strip().split("  ")[0] for line in body if re.match(r"\S", line)]
    assert rows == list(EDGE_CASES)


def test_one_bad_leaf_does_not_spoil_the_others():
    g_a, g_c = {"bad": _with(np.nan), "good": _A}, {"bad": _C, "good": _C}
    out, state = apply_once(agr_transform(clip="none"), g_a, g_c)
    assert np.all(np.isnan(out["bad"]))
    assert_leaf_close(out["good"], reference_leaf(_A, _C)[0], 1e-6)
    assert np.isnan(state.cosine[0])
    assert not np.isnan(state.cosine[1])


def test_zeros_make_no_nan_on_the_way():
    # `jnp.where` would hide one in a branch not taken; `jax_debug_nans` users would meet it.
    with jax.debug_nans(True):
        for g_a, g_c in ((_A, _ZERO), (_ZERO, _C), (_ZERO, _ZERO)):
            state = AGRState(jnp.int32(0), *jnp.zeros((4, 1)))  # that of `init` has NaN
            out, _ = agr_transform().update(g_a, state, clean_grads=g_c)
            assert np.all(np.isfinite(out))


@pytest.mark.parametrize("clip", ["changed", "interpolated", "all"])
def test_a_clip_keeps_the_nan_visible(clip):
    out, _ = apply_once(agr_transform(clip=clip), _A, _with(np.inf))
    assert np.all(np.isnan(out))


@pytest.mark.parametrize("cosine", [-0.6, 0.6])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("clip_norm", [0.1, None])
def test_dtype_is_kept_and_reductions_are_float32(cosine, dtype, clip_norm):
    g_a, g_c = (jnp.asarray(g, dtype) for g in with_cosine(cosine, size=4096))
    clip = "none" if clip_norm is None else "changed"
    out, state = apply_once(agr_transform(clip=clip, clip_norm=clip_norm), g_a, g_c)
    assert out.dtype == dtype
    for diagnostic in state[1:]:
        assert diagnostic.dtype == jnp.float32
    expected, expected_cosine, _ = reference_leaf(
        g_a.astype(jnp.float32), g_c.astype(jnp.float32), clip_norm=clip_norm
    )
    # Only the result is rounded: half a unit in the last place, plus a float32's error.
    tolerance = (0.5 * float(jnp.finfo(dtype).eps) + 1e-6) * np.linalg.norm(expected)
    assert_leaf_close(out, expected, tolerance)
    np.testing.assert_allclose(state.cosine, [expected_cosine], atol=1e-6)


def test_small_and_huge_entries_in_one_leaf():
    rng = np.random.default_rng(0)
    g_c = np.float32(rng.normal(size=40))
    g_a = np.float32(-0.5 * g_c + 0.2 * rng.normal(size=40))
    spread = np.float32(10.0 ** rng.uniform(-12, 6, size=40))
    for a, c in ((g_a * spread, g_c * spread), (-g_a * spread, g_c * spread[::-1])):
        for clip in ("none", "changed"):
            out, _ = apply_once(agr_transform(clip=clip), a, c)
            expected, *_ = reference_leaf(a, c, clip=clip, clip_norm=0.1)
            # The projection cancels: its error is a part of |g_a|, which the clip then scales.
            shrunk = np.linalg.norm(expected) / np.linalg.norm(reference_leaf(a, c)[0])
            assert_leaf_close(out, expected, 1e-6 * np.linalg.norm(a) * shrunk)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-12, 1e12, 1e18, 1e30])
def test_extreme_scales_neither_underflow_nor_overflow(scale):
    g_a, g_c = with_cosine(-0.6)
    projected, *_ = reference_leaf(g_a, g_c)
    out, state = apply_once(
        agr_transform(clip="none"), np.float32(g_a * scale), np.float32(g_c * scale)
    )
    assert_leaf_close(np.asarray(out, np.float64) / scale, projected, 1e-6)
    np.testing.assert_allclose(state.clean_norm, [3 * scale], rtol=1e-6)
    np.testing.assert_allclose(state.adversarial_norm, [2 * scale], rtol=1e-6)
    clipped, _ = apply_once(agr_transform(), np.float32(g_a * scale), np.float32(g_c * scale))
    length = np.linalg.norm(np.asarray(clipped, np.float64))
    np.testing.assert_allclose(length, min(0.1, scale * np.linalg.norm(projected)), rtol=1e-6)


@pytest.mark.parametrize(("scale_a", "scale_c"), [(0, 1e20), (1e20, 0), (0, 1e38), (1e38, 0)])
def test_a_zero_gradient_beside_a_huge_one(scale_a, scale_c):
    """Compiled: XLA then multiplies by inverses, and that of 1e38 is no normal number."""
    g_a, g_c = with_cosine(0.6)
    g_a, g_c = np.float32(g_a * scale_a), np.float32(g_c * scale_c)
    out, state = jax.jit(functools.partial(apply_once, agr_transform(clip="none")))(g_a, g_c)
    np.testing.assert_array_equal(out, g_a)
    assert (state.cosine.item(), state.projected.item()) == (0, 0)
    np.testing.assert_allclose(state.adversarial_norm, [2 * scale_a], rtol=1e-6)
    np.testing.assert_allclose(state.clean_norm, [3 * scale_c], rtol=1e-6)


@pytest.mark.parametrize("starts", [(None, None), (5, 5)])
def test_nan_in_the_clean_gradient_stays_there_while_nothing_is_active(starts):
    gop_start, gics_start = starts
    clip = agr_transform(gop_start=gop_start, gics_start=gics_start, clip="all", clip_start=0)
    out, _ = apply_once(clip, np.float32([3, 4]), np.float32([np.nan, 1]))
    np.testing.assert_allclose(out, [0.06, 0.08], rtol=1e-6)


def test_what_a_projection_leaves_is_clipped_however_much_it_removes():
    out, _ = apply_once(agr_transform(), np.float32([-(2.0**67), 10]), np.float32([2.0**67, 0]))
    np.testing.assert_allclose(out, [0, 0.1], rtol=1e-6)


@pytest.mark.parametrize(("scale_a", "scale_c"), [(1e15, 1e-15), (1e-15, 1e15), (1e-30, 1.0)])
def test_gradients_of_very_different_length(scale_a, scale_c):
    for cosine in (-0.6, 0.6):
        g_a, g_c = with_cosine(cosine, norm_a=scale_a, norm_c=scale_c)
        out, _ = apply_once(agr_transform(clip="none"), g_a, g_c)
        expected, *_ = reference_leaf(g_a, g_c)
        assert_leaf_close(out, expected, 1e-6 * (scale_a if cosine < 0 else scale_a + scale_c))


# --- diagnostics and names ------------------------------------------------------------------------


def test_diagnostics_are_vectors_in_the_order_of_leaf_names():
    rng = np.random.default_rng(0)
    shapes = {"z": {"kernel": (3, 2), "bias": (2,)}, "a": [(4,), ()]}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda s: np.asarray(rng.normal(size=s), np.float32)  # noqa: E731
    g_a = jax.tree.map(draw, shapes, is_leaf=is_shape)
    g_c = jax.tree.map(draw, shapes, is_leaf=is_shape)
    names = leaf_names(g_a)
    assert names == ("a/0", "a/1", "z/bias", "z/kernel")
    chain = optax.chain(agr_transform(), optax.sgd(0.1, momentum=0.9))
    _, state = chain.update(g_a, chain.init(g_a), clean_grads=g_c)
    by_name = {
        "a/0": (g_a["a"][0], g_c["a"][0]),
        "a/1": (g_a["a"][1], g_c["a"][1]),
        "z/bias": (g_a["z"]["bias"], g_c["z"]["bias"]),
        "z/kernel": (g_a["z"]["kernel"], g_c["z"]["kernel"]),
    }
    read = {key: optax.tree.get(state, key) for key in AGRState._fields}
    assert int(read["step"]) == 1
    for key in AGRState._fields[1:]:
        assert read[key].shape == (4,)
        assert read[key].dtype == jnp.float32
    for i, name in enumerate(names):
        a, c = by_name[name]
        _, cosine, branch = reference_leaf(a, c)
        np.testing.assert_allclose(read["cosine"][i], cosine, atol=3e-7)
        np.testing.assert_allclose(read["clean_norm"][i], np.linalg.norm(c), rtol=3e-7)
        np.testing.assert_allclose(read["adversarial_norm"][i], np.linalg.norm(a), rtol=3e-7)
        assert float(read["projected"][i]) == (branch == "projected")
    assert 0 < np.sum(read["projected"]) < 4


def test_empty_tree():
    for granularity, count in (("leaf", 0), ("global", 0)):
        transform = agr_transform(granularity=granularity)
        state = transform.init({})
        for clean in (None, {}):
            out, following = transform.update({}, state, clean_grads=clean)
            assert out == {}
            chex.assert_trees_all_equal_shapes_and_dtypes(state, following)
            assert following.cosine.shape == (count,)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gop_start": -1}, "gop_start must be a step >= 0 or None, got -1"),
        ({"gics_start": -2}, "gics_start must be a step >= 0 or None, got -2"),
        ({"clip_start": -3}, "clip_start must be a step >= 0 or None, got -3"),
        ({"interpolation": "median"}, "interpolation must be .* got 'median'"),
        ({"interpolation": 1.5}, r"interpolation as tau must lie in \[0, 1\], got 1.5"),
        ({"interpolation": -0.1}, r"interpolation as tau must lie in \[0, 1\], got -0.1"),
        ({"interpolation": float("nan")}, "interpolation as tau .* got nan"),
        ({"interpolate_negative": True}, "interpolate_negative needs interpolation"),
        ({"clip": "some"}, "clip must be .* got 'some'"),
        ({"clip_norm": None}, "clip_norm must be .* got None"),
        ({"clip_norm": 0.0}, "clip_norm must be .* got 0.0"),
        ({"clip_norm": -1.0}, "clip_norm must be .* got -1.0"),
        ({"clip_norm": float("inf")}, "clip_norm must be .* got inf"),
        ({"clip_norm": float("nan")}, "clip_norm must be .* got nan"),
        ({"granularity": "layer"}, "granularity must be .* got 'layer'"),
        (_NONE | {"clip": "all"}, "clip='all' .* set clip_start"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        agr_transform(**options)


@pytest.mark.parametrize(
    "name", ["gop_start", "gics_start", "clip_start", "interpolation", "clip_norm"]
)
def test_a_schedule_is_sent_to_inject_hyperparams(name):
    message = rf"takes no schedule as {name}: .*inject_hyperparams\(agr_transform\)\({name}="
    with pytest.raises(ValueError, match=message):
        agr_transform(**{name: optax.constant_schedule(0.5)})


def test_complex_leaves_are_refused_with_the_way_out():
    transform = agr_transform()
    real, complex_leaf = {"w": jnp.ones(2)}, {"w": jnp.ones(2, jnp.complex64)}
    way_out = "agr_transform: leaf 'w' is complex .*split_real_and_imaginary .* GradientPair"
    state = transform.init(real)
    for call in (
        lambda: transform.init(complex_leaf),
        lambda: transform.init({"w": 1j}),
        lambda: jax.eval_shape(transform.init, complex_leaf),
        lambda: transform.update(complex_leaf, state),
        lambda: transform.update(GradientPair(complex_leaf, real), state),
        lambda: jax.jit(transform.update)(GradientPair(real, complex_leaf), state),
    ):
        with pytest.raises(TypeError, match=way_out):
            call()


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        agr_transform(0)


def test_gradients_of_different_structure():
    transform = agr_transform()
    g_a = {"w": jnp.ones(2), "b": jnp.ones(3)}
    state = transform.init(g_a)
    with pytest.raises(ValueError, match="differ in structure"):
        transform.update(g_a, state, clean_grads={"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"leaf 'b': .* shape \(2,\), .* \(3,\)"):
        transform.update(g_a, state, clean_grads={"w": jnp.ones(2), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match="GradientPair and clean_grads"):
        transform.update(GradientPair(g_a, g_a), state, clean_grads=g_a)


def test_adapter_takes_nothing_but_a_pair():
    adapter = from_gradient_pair(agr_transform())
    with pytest.raises(TypeError, match=r"GradientPair.*got dict"):
        adapter.update({"w": jnp.ones(2)}, adapter.init({"w": jnp.ones(2)}))


def test_unknown_extra_arguments_are_ignored():
    g_a, g_c = with_cosine(-0.6)
    transform = agr_transform()
    expected = apply_once(transform, g_a, g_c)
    actual = transform.update(
        g_a, transform.init(g_a), None, clean_grads=g_c, value=1.0, loss_fn=None
    )
    chex.assert_trees_all_equal(actual, expected)


# --- jax_debug_nans ------------------------------------------------------------------------------

UNDER_DEBUG_NANS = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from agr_jax import AGRState, GradientPair, agr_transform, from_gradient_pair

params = {"w": jnp.ones(3), "b": jnp.ones(2)}
gradient = lambda *w: {"w": jnp.float32(w), "b": jnp.zeros(2)}
pair = GradientPair(gradient(1, 2, 3), gradient(-1, 0, -1))
for granularity in ("leaf", "global"):
    agr = agr_transform(granularity=granularity)
    waits = optax.conditionally_transform(agr, lambda step: step >= 1)
    for compiled in (jax.jit, lambda function: function):
        state = compiled(agr.init)(params)
        update = compiled(
            lambda state, clean: agr.update(pair.adversarial, state, params, clean_grads=clean)
        )
        for clean in (None, pair.clean, None):
            _, state = update(state, clean)
            assert isinstance(state, AGRState)
            for values in state[1:]:
                assert (values.shape, values.dtype) == ((2,), np.float32)
                assert jnp.isfinite(values).all() == (clean is not None)
                assert clean is not None or jnp.isinf(values).all()
        assert int(state.step) == 3
        for first in (waits, agr):
            chain = optax.chain(first, optax.sgd(0.1, momentum=0.9))
            state = compiled(chain.init)(params)
            both = {"clean_grads": pair.clean}
            step = compiled(lambda state: chain.update(pair.adversarial, state, params, **both))
            for _ in range(2):
                _, state = step(state)
            assert jnp.isfinite(optax.tree.get(state, "cosine")).all()
steps = optax.MultiSteps(from_gradient_pair(agr), 2)
state = steps.init(GradientPair(params, params))
for _ in range(3):
    _, state = jax.jit(steps.update)(pair, state, params)
# Of a real NaN JAX still tells.
try:
    jax.jit(agr.update)(GradientPair(gradient(1, 2, np.nan), pair.adversarial), agr.init(params))
    sys.exit("a NaN went through")
except FloatingPointError:
    print("done")
"""


@pytest.mark.slow
def test_under_debug_nans():
    """In a process of its own, as the setting holds for all that is traced."""
    result = subprocess.run(
        [sys.executable, "-c", UNDER_DEBUG_NANS],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "JAX_DEBUG_NANS": "True"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout.strip().splitlines()[-1:]) == (0, ["done"]), result


# --- compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_clean", [True, False])
def test_the_second_call_does_not_recompile(with_clean):
    g_a, g_c = ({"w": jnp.asarray(g)} for g in with_cosine(-0.6))
    transform = agr_transform(gop_start=1, gics_start=2)
    traces = []

    @jax.jit
    def step(a, state, c):
        traces.append(None)
        return transform.update(a, state, clean_grads=c)

    state = transform.init(g_a)
    for _ in range(4):
        _, state = step(g_a, state, g_c if with_clean else None)
    assert int(state.step) == 4
    assert len(traces) == 1


@pytest.mark.parametrize("with_clean", [True, False])
def test_the_state_can_be_donated(with_clean):
    g_a, g_c = ({"w": jnp.asarray(g)} for g in with_cosine(-0.6))
    transform = agr_transform()
    update = lambda state, c: transform.update(g_a, state, clean_grads=c)[1]  # noqa: E731
    step = jax.jit(update, donate_argnums=0, keep_unused=True)
    state = transform.init(g_a)
    for _ in range(2):
        state = step(state, g_c if with_clean else None)
    state = step(update(state, None), None)  # from outside jit, too
    assert int(state.step) == 4


# --- both gradients of a loss ---------------------------------------------------------------------


def test_clean_and_adversarial_grads():
    loss = lambda p, batch: jnp.sum((batch["x"] @ p["w"] - batch["y"]) ** 2)  # noqa: E731
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
    batch = lambda: {  # noqa: E731
        "x": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32),
    }
    clean, adversarial = batch(), batch()
    for run in (
        clean_and_adversarial_grads,
        jax.jit(clean_and_adversarial_grads, static_argnums=0),
    ):
        pair, losses = run(loss, params, clean, adversarial)
        assert isinstance(pair, GradientPair)
        expected = GradientPair(jax.grad(loss)(params, clean), jax.grad(loss)(params, adversarial))
        chex.assert_trees_all_close(pair, expected, rtol=1e-6)
        expected_losses = (loss(params, clean), loss(params, adversarial))
        chex.assert_trees_all_close(losses, expected_losses, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_auxiliary_state_goes_through_the_clean_pass_first(jit):
    # The state is a number whose update does not commute, and which the loss depends on.
    def loss(params, batch, aux):
        return jnp.sum(params * batch) * aux["scale"], {"scale": aux["scale"] * 2 + batch[0]}

    run = clean_and_adversarial_grads
    run = jax.jit(run, static_argnums=0) if jit else run
    params, clean, adversarial = jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0]), jnp.array([5.0, 0.0])
    pair, losses, aux = run(loss, params, clean, adversarial, aux={"scale": jnp.array(10.0)})
    np.testing.assert_array_equal(pair.clean, clean * 10)
    np.testing.assert_array_equal(pair.adversarial, adversarial * 23)  # 2 * 10 + 3
    assert (float(losses[0]), float(losses[1])) == (50.0, 115.0)
    assert float(aux["scale"]) == 51.0  # 2 * 23 + 5


def test_empty_auxiliary_state_is_still_auxiliary_state():
    loss = lambda w, batch, aux: (jnp.sum(w * batch), aux)  # noqa: E731
    _, _, aux = clean_and_adversarial_grads(loss, jnp.ones(2), jnp.ones(2), jnp.zeros(2), aux={})
    assert aux == {}
