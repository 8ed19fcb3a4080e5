"""AGR inside every optax wrapper: equal to a loop in NumPy, or an error; never silently other.

Three ways for the two gradients to come in: "pair" (`update(GradientPair(...))`), "clean_grads"
(`update(adversarial, ..., clean_grads=clean)`) and "adapter" (`from_gradient_pair` around it all).
Where a wrapper cannot know and gives something else, the test shows the wrong result beside the
right one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from optax.experimental import aggregating
from optax.transforms import selective_transform

from agr_jax import AGRState, GradientPair, agr_transform, from_gradient_pair

LR, MOMENTUM, DECAY, CLIP_NORM = 0.1, 0.9, 0.05, 0.5
PARAMS = {"a": np.float32([1, -2, 3]), "b": np.float32([[0.5, -1], [2, 0.3]])}
PAIR, CLEAN, ADAPTER = "pair", "clean_grads", "adapter"
STRUCTURE = (ValueError, "pytree structure error")
BRANCHES = (TypeError, "branch outputs must have the same pytree structure")
NOT_MASKED = (ValueError, "clean and the adversarial gradient differ in structure")


def gradient_pairs(count=4, seed=1):
    rng = np.random.default_rng(seed)
    draw = lambda: {k: np.float32(rng.normal(size=v.shape)) for k, v in PARAMS.items()}  # noqa: E731
    return [GradientPair(draw(), draw()) for _ in range(count)]


PAIRS = gradient_pairs()


def reconstruct(clean, adversarial):
    """AGR with its defaults on one leaf, in NumPy float64."""
    c, a = np.float64(clean), np.float64(adversarial)
    cosine = np.vdot(a, c) / (np.linalg.norm(a) * np.linalg.norm(c))
    combined = a - np.vdot(a, c) / np.vdot(c, c) * c if cosine < 0 else cosine * (c - a) + a
    return combined * (CLIP_NORM / max(CLIP_NORM, np.linalg.norm(combined)))


def reference(pairs=None, *, acts=lambda name, step: True, gradient_scale=lambda step: 1):
    """AGR, then weight decay and momentum, as a loop: the parameters after the last pair."""
    params = {k: np.float64(v) for k, v in PARAMS.items()}
    momentum = dict.fromkeys(params, 0.0)
    for step, (clean, adversarial) in enumerate(PAIRS if pairs is None else pairs):
        for k in PARAMS:
            g = np.float64(adversarial[k])
            if acts(k, step):
                g = reconstruct(clean[k], adversarial[k])
            momentum[k] = MOMENTUM * momentum[k] + g * gradient_scale(step) + DECAY * params[k]
            params[k] = params[k] - LR * momentum[k]
    return params


def agr():
    return agr_transform(clip_norm=CLIP_NORM)


def sgd(learning_rate=LR):
    return optax.chain(
        optax.add_decayed_weights(DECAY),
        optax.trace(MOMENTUM),
        optax.scale_by_learning_rate(learning_rate),
    )


def whole():
    return optax.chain(agr(), sgd())


def train(transform, form, pairs=None, pair_in_init=False, **extra_args):
    """The parameters after one update for every pair, and the last state."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = transform.init(GradientPair(params, params) if pair_in_init else params)

    @jax.jit
    def step(params, state, pair):
        if form == CLEAN:
            updates, state = transform.update(
                pair.adversarial, state, params, clean_grads=pair.clean, **extra_args
            )
        else:
            updates, state = transform.update(pair, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    for pair in PAIRS if pairs is None else pairs:
        params, state = step(params, state, pair)
    return params, state


def distance(actual, expected):
    return max(np.abs(np.float64(actual[k]) - expected[k]).max() for k in PARAMS)


TOLERANCE = 1e-6  # parameters near 1 after 4 steps: measured 2.4e-7


def masked_to(names):
    """A mask function for any tree that holds the parameters' names."""
    return lambda tree: jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key in names, tree)


def labels_of(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, tree)


MASK, LABELS = {"a": True, "b": False}, {"a": "a", "b": "b"}
ALL_BRANCHES = lambda: {"a": whole(), "b": whole()}  # noqa: E731
ONE_BRANCH = lambda: {"a": whole(), "b": sgd()}  # noqa: E731
MASKING = {"mask_compatible_extra_args": True}
NOT_NUMERIC = ("gop_start", "gics_start", "clip_start", "interpolate_negative", "clip_norm")
EVERYWHERE = reference()
ONLY_A = reference(acts=lambda name, step: name == "a")
FROM_STEP_2 = reference(acts=lambda name, step: step >= 2)
ZERO_UNTIL_2 = reference(gradient_scale=lambda step: float(step >= 2))

# row: (build, the expected parameters, the forms that raise)
ROWS = {
    "chain": (whole, EVERYWHERE, {}),
    "named_chain": (lambda: optax.named_chain(("agr", agr()), ("sgd", sgd())), EVERYWHERE, {}),
    "inject_hyperparams, whole optimizer": (
        lambda: optax.inject_hyperparams(lambda rate: optax.chain(agr(), sgd(rate)))(rate=LR),
        EVERYWHERE,
        {},
    ),
    "inject_hyperparams, AGR, its arguments static": (
        lambda: optax.chain(
            optax.inject_hyperparams(agr_transform, static_args=NOT_NUMERIC)(clip_norm=CLIP_NORM),
            sgd(),
        ),
        EVERYWHERE,
        {},
    ),
    "inject_hyperparams, AGR": (
        lambda: optax.chain(optax.inject_hyperparams(agr_transform)(clip_norm=CLIP_NORM), sgd()),
        EVERYWHERE,
        {},
    ),
    "inject_hyperparams, AGR, a schedule of the clip norm": (
        lambda: optax.chain(
            optax.inject_hyperparams(agr_transform)(clip_norm=lambda step: CLIP_NORM + 0 * step),
            sgd(),
        ),
        EVERYWHERE,
        {},
    ),
    "masked, tree": (
        lambda: optax.chain(optax.masked(agr(), MASK, **MASKING), sgd()),
        ONLY_A,
        {PAIR: STRUCTURE},
    ),
    "masked, function": (
        lambda: optax.chain(optax.masked(agr(), masked_to("a"), **MASKING), sgd()),
        ONLY_A,
        {PAIR: STRUCTURE},
    ),
    "masked without the flag": (
        lambda: optax.chain(optax.masked(agr(), MASK), sgd()),
        ONLY_A,
        {PAIR: STRUCTURE, CLEAN: NOT_MASKED, ADAPTER: NOT_MASKED},
    ),
    "partition, tree, AGR in all branches": (
        lambda: optax.partition(ALL_BRANCHES(), LABELS, **MASKING),
        EVERYWHERE,
        {PAIR: STRUCTURE},
    ),
    "partition, function, AGR in all branches": (
        lambda: optax.partition(ALL_BRANCHES(), labels_of, **MASKING),
        EVERYWHERE,
        {PAIR: STRUCTURE},
    ),
    "partition, tree, AGR in one branch": (
        lambda: optax.partition(ONE_BRANCH(), LABELS, **MASKING),
        ONLY_A,
        {PAIR: STRUCTURE},
    ),
    "partition, function, AGR in one branch": (
        lambda: optax.partition(ONE_BRANCH(), labels_of, **MASKING),
        ONLY_A,
        {PAIR: STRUCTURE},
    ),
    "partition without the flag": (
        lambda: optax.partition(ONE_BRANCH(), LABELS),
        ONLY_A,
        {PAIR: STRUCTURE, CLEAN: NOT_MASKED, ADAPTER: NOT_MASKED},
    ),
    "selective_transform": (
        lambda: selective_transform(whole(), freeze_mask={"a": False, "b": True}),
        None,
        {PAIR: STRUCTURE, CLEAN: NOT_MASKED, ADAPTER: NOT_MASKED},
    ),
    "AGR before a partition": (
        lambda: optax.chain(agr(), optax.partition({"a": sgd(), "b": sgd()}, LABELS)),
        EVERYWHERE,
        {},
    ),
    "apply_if_finite, all finite": (
        lambda: optax.apply_if_finite(whole(), 3),
        EVERYWHERE,
        {PAIR: BRANCHES},
    ),
    "AGR before apply_if_finite": (
        lambda: optax.chain(agr(), optax.apply_if_finite(sgd(), 3)),
        EVERYWHERE,
        {},
    ),
    "conditionally_transform": (
        lambda: optax.chain(optax.conditionally_transform(agr(), lambda step: step >= 2), sgd()),
        FROM_STEP_2,
        {PAIR: BRANCHES},
    ),
    "conditionally_mask": (
        lambda: optax.chain(optax.conditionally_mask(agr(), lambda step: step >= 2), sgd()),
        ZERO_UNTIL_2,
        {PAIR: BRANCHES},
    ),
    "flatten": (
        lambda: optax.flatten(whole()),
        EVERYWHERE,
        {PAIR: (TypeError, "incompatible shapes"), CLEAN: NOT_MASKED, ADAPTER: NOT_MASKED},
    ),
    "snapshot after AGR": (
        lambda: optax.chain(agr(), optax.snapshot("norm", optax.tree.norm), sgd()),
        EVERYWHERE,
        {},
    ),
    "snapshot before AGR": (
        lambda: optax.chain(optax.snapshot("norm", optax.tree.norm), agr(), sgd()),
        EVERYWHERE,
        {},
    ),
    "reduce_on_plateau": (
        lambda: optax.with_extra_args_support(optax.chain(whole(), contrib.reduce_on_plateau())),
        EVERYWHERE,
        {},
    ),
    "aggregating.process": (
        lambda: aggregating.process(optax.identity(), agr(), sgd()),
        EVERYWHERE,
        dict.fromkeys((CLEAN, ADAPTER), (TypeError, "unexpected keyword argument 'clean_grads'")),
    ),
}


@pytest.mark.parametrize("form", [PAIR, CLEAN, ADAPTER])
@pytest.mark.parametrize("row", ROWS)
def test_wrapper(row, form):
    build, expected, errors = ROWS[row]
    transform = from_gradient_pair(build()) if form == ADAPTER else build()
    extra_args = {"value": 1.0} if row == "reduce_on_plateau" else {}
    if form in errors:
        error, message = errors[form]
        with pytest.raises(error, match=message):
            train(transform, form, **extra_args)
    else:
        params, _ = train(transform, form, **extra_args)
        assert distance(params, expected) < TOLERANCE


def test_the_references_differ():
    # Guards the tests above: AGR matters in these numbers, both of its branches occur.
    results = [EVERYWHERE, ONLY_A, FROM_STEP_2, ZERO_UNTIL_2]
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert distance(one, other) > 0.05
    conflicts = {np.vdot(p.clean[k], p.adversarial[k]) < 0 for p in PAIRS for k in PARAMS}
    assert conflicts == {True, False}


TAUS = (0.9, 0.2, 0.5, 0.3)


@pytest.mark.parametrize("static", [(), ("gop_start", "gics_start", "clip_start")])
def test_schedules_of_all_numbers(static):
    """The same updates as AGR made anew for every step with the numbers of that step."""
    at = lambda values: lambda step: jnp.asarray(values)[step]  # noqa: E731
    norms = np.float32([0.5, 0.1, 2.0, 0.3])
    scheduled = optax.inject_hyperparams(agr_transform, static_args=static)(
        gop_start=1, gics_start=2, interpolation=at(TAUS), clip_norm=at(norms)
    )
    for update in (jax.jit(scheduled.update), scheduled.update):
        state = scheduled.init(PARAMS)
        inner = state.inner_state
        for step, pair in enumerate(PAIRS):
            fixed = agr_transform(
                gop_start=1, gics_start=2, interpolation=TAUS[step], clip_norm=float(norms[step])
            )
            expected, inner = fixed.update(pair, inner)
            got, state = update(pair, state, PARAMS)
            assert distance(got, expected) < TOLERANCE


def test_a_negative_clip_norm_of_a_schedule_is_seen():
    scheduled = optax.inject_hyperparams(agr_transform)(clip_norm=lambda step: 0.5 - step)
    state = scheduled.init(PARAMS)
    first, state = jax.jit(scheduled.update)(PAIRS[0], state, PARAMS)
    second, _ = jax.jit(scheduled.update)(PAIRS[1], state, PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in first.values())
    assert all(np.isnan(leaf).all() for leaf in second.values())


# --- MultiSteps -----------------------------------------------------------------------------------


def averaged(pairs):
    return [
        jax.tree.map(lambda x, y: (x + y) / 2, one, two)
        for one, two in zip(pairs[::2], pairs[1::2], strict=True)
    ]


def test_multi_steps_averages_both_gradients_with_the_adapter_only():
    pairs = gradient_pairs(8)
    right = reference(averaged(pairs))
    outside = optax.MultiSteps(from_gradient_pair(whole()), 2)
    params, _ = train(outside, PAIR, pairs, pair_in_init=True)
    assert distance(params, right) < TOLERANCE

    # Plain `clean_grads=` silently takes the clean gradient of the last micro-batch alone.
    params, _ = train(optax.MultiSteps(whole(), 2), CLEAN, pairs)
    last_clean = [
        GradientPair(last.clean, mean.adversarial)
        for last, mean in zip(pairs[1::2], averaged(pairs), strict=True)
    ]
    assert distance(params, reference(last_clean)) < TOLERANCE
    assert distance(params, right) > 0.02


@pytest.mark.parametrize("adapter", [False, True])
def test_multi_steps_refuses_a_pair_when_it_was_set_up_for_parameters(adapter):
    inner = from_gradient_pair(whole()) if adapter else whole()
    with pytest.raises(ValueError, match="pytree structure error"):
        train(optax.MultiSteps(inner, 2), PAIR)


# --- gradients that are not finite ----------------------------------------------------------------


def with_nan(part):
    """The pairs, with one NaN in the second: in its clean or its adversarial leaf `a`."""
    pairs = gradient_pairs()
    getattr(pairs[1], part)["a"][0] = np.nan
    return pairs


@pytest.mark.parametrize("part", ["clean", "adversarial"])
@pytest.mark.parametrize("form", [PAIR, CLEAN, ADAPTER])
def test_apply_if_finite_after_agr_skips_the_step(form, part):
    transform = optax.chain(agr(), optax.apply_if_finite(sgd(), 3))
    transform = from_gradient_pair(transform) if form == ADAPTER else transform
    params, state = train(transform, form, with_nan(part))
    rest = [PAIRS[0], *PAIRS[2:]]
    assert distance(params, reference(rest)) < TOLERANCE
    assert int(optax.tree.get(state, "total_notfinite")) == 1


def test_apply_if_finite_around_agr_lets_a_nan_in_the_clean_gradient_through():
    transform = optax.apply_if_finite(whole(), 3)
    params, state = train(transform, CLEAN, with_nan("clean"))
    assert np.all(np.isnan(params["a"]))  # silently wrong, as the docstring warns
    assert int(state.total_notfinite) == 0
    params, _ = train(transform, CLEAN, with_nan("adversarial"))
    assert distance(params, reference([PAIRS[0], *PAIRS[2:]])) < TOLERANCE


def test_apply_if_finite_around_the_adapter_is_an_error():
    with pytest.raises(TypeError, match=BRANCHES[1]):
        train(optax.apply_if_finite(from_gradient_pair(whole()), 3), PAIR)


# --- wrappers with an interface of their own ------------------------------------------------------


def train_lookahead(inner, form):
    transform = optax.lookahead(inner, sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(jax.tree.map(jnp.asarray, PARAMS))
    state = transform.init(params)
    for pair in PAIRS:
        if form == CLEAN:
            updates, state = transform.update(
                pair.adversarial, state, params, clean_grads=pair.clean
            )
        else:
            updates, state = transform.update(pair, state, params)
        params = optax.apply_updates(params, updates)
    return params.slow


def lookahead_reference():
    slow = {k: np.float64(v) for k, v in PARAMS.items()}
    fast, momentum = dict(slow), dict.fromkeys(slow, 0.0)
    for step, (clean, adversarial) in enumerate(PAIRS):
        for k in PARAMS:
            g = reconstruct(clean[k], adversarial[k]) + DECAY * fast[k]
            momentum[k] = MOMENTUM * momentum[k] + g
            fast[k] = fast[k] - LR * momentum[k]
            if step % 2 == 1:
                slow[k] = fast[k] = slow[k] + 0.5 * (fast[k] - slow[k])
    return slow


@pytest.mark.parametrize("inner", [whole, lambda: from_gradient_pair(whole())])
def test_lookahead_of_a_pair(inner):
    assert distance(train_lookahead(inner(), PAIR), lookahead_reference()) < TOLERANCE


def test_lookahead_takes_no_clean_grads():
    with pytest.raises(TypeError, match="clean_grads"):
        train_lookahead(whole(), CLEAN)


@pytest.mark.parametrize(
    "without_extra_args",
    [
        lambda: optax.MultiSteps(whole(), 1),
        lambda: optax.lookahead(whole(), 2, 0.5),
        lambda: contrib.sam(whole(), optax.sgd(0.1)),
        lambda: contrib.sam(whole(), optax.sgd(0.1), opaque_mode=True),
    ],
)
def test_the_adapter_refuses_what_would_drop_the_clean_gradient(without_extra_args):
    # `optax.with_extra_args_support` would swallow `clean_grads`: adversarial training, unsaid.
    with pytest.raises(TypeError, match=r"no clean gradient.*: put from_gradient_pair .* with AGR"):
        from_gradient_pair(without_extra_args())


def reconstructed_pairs():
    """Pairs whose adversarial part already is AGR's result, for optimisers without AGR."""
    g = [{k: np.float32(reconstruct(c[k], a[k])) for k in PARAMS} for c, a in PAIRS]
    return [GradientPair(clean=x, adversarial=x) for x in g]


@pytest.mark.parametrize("form", [PAIR, CLEAN, ADAPTER])
def test_schedule_free(form):
    transform = contrib.schedule_free(whole(), LR)
    params, _ = train(from_gradient_pair(transform) if form == ADAPTER else transform, form)
    # No AGR in the optimiser here: it is given AGR's result, `clean_grads` is ignored.
    expected, _ = train(contrib.schedule_free(sgd(), LR), CLEAN, reconstructed_pairs())
    assert distance(params, {k: np.float64(v) for k, v in expected.items()}) < TOLERANCE


def test_mechanize():
    expected, _ = train(contrib.mechanize(sgd(), s_init=1.0), CLEAN, reconstructed_pairs())
    expected = {k: np.float64(v) for k, v in expected.items()}
    after = optax.chain(agr(), contrib.mechanize(sgd(), s_init=1.0))
    for form in (PAIR, CLEAN):
        params, _ = train(after, form)
        assert distance(params, expected) < TOLERANCE
    # Around AGR it tunes its step by the adversarial gradient, which is not what AGR descends.
    around = contrib.mechanize(whole(), s_init=1.0)
    params, _ = train(around, CLEAN)
    assert distance(params, expected) > 1e-3
    with pytest.raises(ValueError, match="pytree structure error"):
        train(around, PAIR)


def test_train_state_with_the_adapter():
    train_state = pytest.importorskip("flax.training.train_state")
    state = train_state.TrainState.create(
        apply_fn=None, params=jax.tree.map(jnp.asarray, PARAMS), tx=from_gradient_pair(whole())
    )
    step = jax.jit(lambda state, pair: state.apply_gradients(grads=pair))
    for pair in PAIRS:
        state = step(state, pair)
    assert int(state.step) == 4
    assert distance(state.params, EVERYWHERE) < TOLERANCE
    assert int(optax.tree.get(state.opt_state, "cosine").size) == 2
    with pytest.raises(TypeError, match="takes a GradientPair"):
        state.apply_gradients(grads=PAIRS[0].adversarial)


def test_train_state_without_the_adapter():
    train_state = pytest.importorskip("flax.training.train_state")
    state = train_state.TrainState.create(
        apply_fn=None, params=jax.tree.map(jnp.asarray, PARAMS), tx=whole()
    )
    with pytest.raises(TypeError, match="clean_grads"):
        state.apply_gradients(grads=PAIRS[0].adversarial, clean_grads=PAIRS[0].clean)
    for pair in PAIRS:
        state = state.apply_gradients(grads=pair)
    assert distance(state.params, EVERYWHERE) < TOLERANCE


def test_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.Param(jnp.asarray(PARAMS[k])) for k in "ab")

    as_state = lambda tree: nnx.State({k: nnx.Param(jnp.asarray(tree[k])) for k in "ab"})  # noqa: E731
    model = Model()
    optimizer = nnx.Optimizer(model, whole(), wrt=nnx.Param)
    for clean, adversarial in PAIRS:
        optimizer.update(model, as_state(adversarial), clean_grads=as_state(clean))
    params = {k: np.asarray(getattr(model, k)[...]) for k in "ab"}
    assert distance(params, EVERYWHERE) < TOLERANCE

    # nnx turns a pair into a State of its own, so both forms with a pair are errors.
    pair = GradientPair(as_state(PAIRS[0].clean), as_state(PAIRS[0].adversarial))
    with pytest.raises(ValueError, match="structure"):
        optimizer.update(model, pair)
    adapted = nnx.Optimizer(model, from_gradient_pair(whole()), wrt=nnx.Param)
    with pytest.raises(TypeError, match="takes a GradientPair"):
        adapted.update(model, pair)


@pytest.mark.parametrize("form", [PAIR, CLEAN, ADAPTER])
def test_scan(form):
    transform = from_gradient_pair(whole()) if form == ADAPTER else whole()
    params = jax.tree.map(jnp.asarray, PARAMS)

    def step(carry, pair):
        params, state = carry
        if form == CLEAN:
            updates, state = transform.update(
                pair.adversarial, state, params, clean_grads=pair.clean
            )
        else:
            updates, state = transform.update(pair, state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.get(state, "cosine")

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *PAIRS)
    (params, _), cosines = jax.lax.scan(step, (params, transform.init(params)), stacked)
    assert distance(params, EVERYWHERE) < TOLERANCE
    assert cosines.shape == (4, 2)


def test_snapshot_after_agr_sees_its_result():
    chain = optax.chain(agr(), optax.snapshot("norms", lambda g: jax.tree.map(jnp.linalg.norm, g)))
    _, state = train(chain, CLEAN, PAIRS[:1])
    norms = optax.tree.get(state, "norms")
    for k in PARAMS:
        expected = np.linalg.norm(reconstruct(PAIRS[0].clean[k], PAIRS[0].adversarial[k]))
        np.testing.assert_allclose(norms[k], expected, rtol=1e-6)


# --- diagnostics are no parameters ----------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_map_params_leaves_the_diagnostics_alone(adapter):
    transform = from_gradient_pair(whole()) if adapter else whole()
    _, state = train(transform, ADAPTER if adapter else PAIR, PAIRS[:1])
    marked = optax.tree.map_params(
        transform, lambda _: "parameter", state, transform_non_params=lambda _: "other"
    )
    assert optax.tree.get(marked, "trace") == {"a": "parameter", "b": "parameter"}
    for field in AGRState._fields:
        assert optax.tree.get(marked, field) == "other"


def test_every_partition_has_its_diagnostics():
    _, state = train(optax.partition(ALL_BRANCHES(), LABELS, **MASKING), CLEAN, PAIRS[:1])
    found = optax.tree.get_all_with_path(state, "cosine")
    assert len(found) == 2
    for _, cosine in found:
        assert cosine.shape == (1,)
        assert np.isfinite(cosine[0])
