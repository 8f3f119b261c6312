"""Every rule: compiled, batched, and with any of its operands unchanged."""

import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax import lax

from jaxmed.question.metrics import logsumexp_last_axis
from models.layers import inverse_rms_last_axis, softmax_last_axis
from tests.jaxmed.engine.blocks import difference, log_softmax_last_axis

SHAPE = (3, 4)
BATCH = 3


def _positive(f):
    """f of numbers that stay above 0 when they change, as x and x + d are within [-3, 3]."""
    return lambda x: f(x + 4.0)


# Functions of one operand [3, 4].
UNARY = {
    name: getattr(lax, name)
    for name in """exp exp2 expm1 logistic tanh sin cos erf erfc abs neg square cbrt
    sign floor ceil""".split()
} | {
    "round": jnp.round,
    **{name: _positive(getattr(lax, name)) for name in ["log", "log1p", "sqrt", "rsqrt"]},
    **{f"power {n}": lambda x, n=n: lax.integer_pow(x, n) for n in (0, 1, 2, 3, 5, 8)},
    **{f"power {n}": _positive(lambda x, n=n: lax.integer_pow(x, n)) for n in (-1, -2, -3)},
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu tanh": jax.nn.gelu,
    "gelu exact": lambda x: jax.nn.gelu(x, approximate=False),
    "softplus": jax.nn.softplus,
    "softmax": softmax_last_axis,
    "log-softmax": log_softmax_last_axis,
    "log-sum-exp": logsumexp_last_axis,
    "inverse rms": lambda x: inverse_rms_last_axis(x, 1e-5),
    "unnamed softmax": lambda x: jax.nn.softmax(x),
    "unnamed log-sum-exp": lambda x: jax.nn.logsumexp(x, axis=0),
    "variance": lambda x: jnp.var(x, axis=0),
    "sum": jnp.sum,
    "mean": lambda x: jnp.mean(x, axis=1),
    "max": lambda x: jnp.max(x, axis=0),
    "min": lambda x: jnp.min(x, axis=(0, 1)),
    "prod": lambda x: jnp.prod(x, axis=1),
    "prod of all": lambda x: jnp.prod(x),
    "cumsum": lambda x: jnp.cumsum(x, axis=1),
    "cumprod": lambda x: lax.cumprod(x, axis=0),
    "reversed cumprod": lambda x: lax.cumprod(x, axis=1, reverse=True),
    "cummax": lambda x: lax.cummax(x, axis=1),
    "cummin": lambda x: lax.cummin(x, axis=0, reverse=True),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x, axis=1),
    "argmax": lambda x: jnp.argmax(x, axis=1),
    "largest": lambda x: jnp.take_along_axis(x, jnp.argmax(x, axis=1)[:, None], axis=1),
    "sort": lambda x: jnp.sort(x, axis=1),
    "argsort": lambda x: jnp.argsort(x, axis=0),
    "reshape": lambda x: x.reshape(2, 6).T[::-1],
    "pad": lambda x: jnp.pad(x[:, None], ((1, 0), (0, 0), (0, 2)), constant_values=2.0),
    "split": lambda x: jnp.split(x, 2, axis=1),
    "roll": lambda x: jnp.roll(x, 1, axis=0),
    "dynamic slice": lambda x: lax.dynamic_slice(x, (1, 2), (2, 2)),
    "slice that moves": lambda x: lax.dynamic_slice_in_dim(
        x, jnp.floor(jnp.abs(x[0, 0])).astype(int), 1
    ),
    "gather": lambda x: x[jnp.array([2, 0, 2]), jnp.array([1, 1, 3])],
    "gather outside": lambda x: jnp.take(x, jnp.array([1, 7]), axis=0, fill_value=5.0, mode="fill"),
    "embedding of a changed token": lambda x: x[jnp.argmax(x[:, 0])],
    "where": lambda x: jnp.where(x > 0.5, x * 10, -x),
    "where of constants": lambda x: jnp.where(x > 0.5, 1.0, -2.0),
    "where of infinities": lambda x: jnp.where(jnp.arange(4) < 2, x, jnp.inf)[:, :2],
    "clip": lambda x: jnp.clip(x, -0.5, 1.0),
    "nan_to_num": jnp.nan_to_num,
    "rem": lambda x: lax.rem(x, jnp.full_like(x, 0.7)),
    "mod": lambda x: jnp.mod(x, 0.7),
    "integers": lambda x: (jnp.floor(x).astype(int) * 3 - 1) ** 2 % 5,
    "integer to float": lambda x: jnp.floor(x).astype(int) * 0.5 + x,
    "mask": lambda x: (x > 0).astype(x.dtype) * x,
    "logic": lambda x: (x > 0) & ~(x < 1.0) | (x == 2.0) | jnp.isfinite(x),
    "float powers": lambda x: jnp.power(jnp.full_like(x, 2.0), x),
    "narrow": lambda x: lax.reduce_precision(x, 11, 52),
}

# Functions of two operands, [3, 4] each.
BINARY = {
    "add": jnp.add,
    "sub": jnp.subtract,
    "mul": jnp.multiply,
    "div": lambda a, b: a / (b + 4.0),
    "max": jnp.maximum,
    "min": jnp.minimum,
    "rem": lambda a, b: lax.rem(a, b + 4.0),
    "pow": lambda a, b: lax.pow(a + 4.0, b),
    "less": operator.lt,
    "at least": operator.ge,
    "clamp": lambda a, b: lax.clamp(b, a, b + 1.0),
    "matmul": lambda a, b: a @ b.T,
    "batched matmul": lambda a, b: jnp.einsum("bi,bj->bij", a, b),
    "concatenate": lambda a, b: jnp.concatenate([a, b], axis=1),
    "stack": lambda a, b: jnp.stack([a, b]),
    "where": lambda a, b: jnp.where(a > b, a, b * 2),
    "select": lambda a, b: jnp.where(jnp.arange(4) < 2, a, b),
    "scatter": lambda a, b: a.at[jnp.array([0, 2])].set(b[:2]),
    "scatter-add": lambda a, b: a.at[jnp.array([1, 1])].add(b[:2]),
    "scatter where a number says": lambda a, b: a.at[jnp.argmax(b[:, 0])].set(b[1]),
    "dynamic update": lambda a, b: lax.dynamic_update_slice(a, b[:1, :2], (1, 1)),
    "sort by key": lambda a, b: lax.sort((a, b), dimension=1, num_keys=1),
    "logaddexp": jnp.logaddexp,
    "cosine": lambda a, b: jnp.sum(a * b, 1) * inverse_rms_last_axis(a, 0.1)[:, 0],
}

# Several functions are compiled together, which is what takes time.
GROUP = 12
UNARY_GROUPS = [
    dict(list(UNARY.items())[start : start + GROUP]) for start in range(0, len(UNARY), GROUP)
]


def numbers(*shape: int):
    """Multiples of 1/1024 within [-3, 3]: x + d is exact, so that a step is on the same side of it
    for everyone."""
    return arrays(np.int64, shape, elements=st.integers(-3 * 1024, 3 * 1024)).map(
        lambda whole: whole / 1024
    )


def check(functions, mask):
    """All functions of a group, with the operands changing that the mask says."""
    count = len(mask)

    def f(*x):
        return {name: function(*x) for name, function in functions.items()}

    def one(values, differences):
        given = tuple(d if moves else None for d, moves in zip(differences, mask, strict=True))
        return difference(f)(values, given)[1]

    @jax.jit
    def run(values, differences):
        in_batch = jax.vmap(one, (None, 0), axis_size=BATCH)(values, differences)
        alone = one(values, tuple(d[1] for d in differences))
        moved = [v + d * moves for v, d, moves in zip(values, differences, mask, strict=True)]
        after = jax.vmap(f)(*(jnp.broadcast_to(m, (BATCH, *SHAPE)) for m in moved))
        return in_batch, alone, f(*values), after

    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(numbers(count, *SHAPE), numbers(2, count, *SHAPE))
    def compare(values, targets):
        # No difference; of any size; small.
        differences = np.stack([0 * values, targets[0] - values, 2.0**-30 * targets[1]])
        values, differences = tuple(values), tuple(np.moveaxis(differences, 1, 0))
        in_batch, alone, before, after = run(values, differences)
        for name in functions:
            leaves = [jax.tree.leaves(part[name]) for part in (in_batch, alone, before, after)]
            for parts in zip(*leaves, strict=True):
                changes, single, old, new = map(np.asarray, parts)
                np.testing.assert_allclose(changes[1], single, rtol=1e-12, atol=1e-18)
                if np.issubdtype(old.dtype, np.inexact):
                    assert not np.any(changes[0]), name
                    scale = 1 + np.max(np.abs(old)) + np.max(np.abs(new))
                    error = np.abs(changes - (new - old))
                    assert np.all(error <= 2e-14 * scale), name
                else:
                    np.testing.assert_array_equal(changes, new, err_msg=name)

    with jax.enable_x64(True):
        compare()


@pytest.mark.parametrize("group", UNARY_GROUPS, ids=lambda group: next(iter(group)))
def test_rules_of_one_operand_agree_with_evaluation_on_both_sides(group):
    check(group, (True,))


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=2)))
def test_rules_of_two_operands_agree_with_evaluation_on_both_sides(mask):
    check(BINARY, mask)


def test_a_comparison_sees_a_difference_that_its_operand_would_round_away():
    def f(x):
        return jnp.where(x > 2.0, x - 2.0, 0.0), jnp.maximum(x, 2.0)

    x, d = jnp.array([2.0, 2.0]), jnp.array([1e-30, -1e-30])
    for change in difference(f)((x,), (d,))[1]:
        np.testing.assert_array_equal(change, jnp.array([1e-30, 0.0]))


def test_a_case_that_stays_selected_may_be_infinite():
    def f(x):
        return jnp.where(x > 0.0, x, jnp.inf)

    x, d = jnp.array([-1.0, -1.0, 1.0]), jnp.array([2.0, 0.5, 0.5])
    _, change = difference(f)((x,), (d,))
    np.testing.assert_array_equal(change, jnp.array([-jnp.inf, 0.0, 0.5]))
