"""Elementwise rules of difference propagation against many digits.

The contract: for |a| <= 150 and |d| from 1e-12 |a| to 200, the relative error of f(a + d) - f(a) is
at most 10 machine epsilons times the condition number of (a, d) -> f(a + d) - f(a), and nothing is
infinite or undefined where direct evaluation is not.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax import lax
from mpmath import mpf

from tests.jaxmed.engine.blocks import difference

LARGEST_ERROR = 10


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of one number.

    Attributes:
        jax: what is differenced.
        exact: the same in mpmath.
        slope: its derivative in mpmath.
        domain: where a and a + d must lie: "all", "positive" or "above -1".
        digits: what the reference needs for a difference of the smallest normal number.
        steps: where the function is not smooth, and a + d should come close.
        amplifies: by how much it multiplies intermediate results, which may have been flushed to 0.
    """

    jax: Callable
    exact: Callable
    slope: Callable
    domain: str = "all"
    digits: int = 120
    steps: tuple[float, ...] = ()
    amplifies: float = 1


def _sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def _integer_power(n):
    return Function(
        lambda x: lax.integer_pow(x, n), lambda x: x**n, lambda x: n * x ** (n - 1) if n else mpf(0)
    )


def _power(c, domain="positive"):
    # The exponent as the computer has it.
    def jax_power(x):
        return lax.pow(x, jnp.full_like(x, c))

    return Function(jax_power, lambda x: x ** mpf(c), lambda x: c * x ** (mpf(c) - 1), domain)


FUNCTIONS = {
    "exp": Function(jnp.exp, mpmath.exp, mpmath.exp),
    "exp2": Function(jnp.exp2, lambda x: mpf(2) ** x, lambda x: mpf(2) ** x * mpmath.log(2)),
    "expm1": Function(jnp.expm1, mpmath.expm1, mpmath.exp),
    "log": Function(jnp.log, mpmath.log, lambda x: 1 / x, "positive"),
    "log1p": Function(jnp.log1p, mpmath.log1p, lambda x: 1 / (1 + x), "above -1"),
    "logistic": Function(lax.logistic, _sigmoid, lambda x: _sigmoid(x) * _sigmoid(-x)),
    "tanh": Function(jnp.tanh, mpmath.tanh, lambda x: mpmath.sech(x) ** 2, digits=180, amplifies=2),
    "erf": Function(
        lax.erf,
        mpmath.erf,
        lambda x: 2 / mpmath.sqrt(mpmath.pi) * mpmath.exp(-x * x),
        digits=350,
    ),
    "erfc": Function(
        lax.erfc,
        mpmath.erfc,
        lambda x: -2 / mpmath.sqrt(mpmath.pi) * mpmath.exp(-x * x),
        digits=350,
    ),
    "sin": Function(jnp.sin, mpmath.sin, mpmath.cos),
    "cos": Function(jnp.cos, mpmath.cos, lambda x: -mpmath.sin(x), digits=260),
    "sqrt": Function(jnp.sqrt, mpmath.sqrt, lambda x: 1 / (2 * mpmath.sqrt(x)), "positive"),
    "rsqrt": Function(
        lax.rsqrt, lambda x: 1 / mpmath.sqrt(x), lambda x: -1 / (2 * x * mpmath.sqrt(x)), "positive"
    ),
    "cbrt": Function(
        jnp.cbrt,
        lambda x: mpmath.sign(x) * mpmath.cbrt(abs(x)),
        lambda x: 1 / (3 * mpmath.cbrt(x * x)),
    ),
    "square": Function(jnp.square, lambda x: x * x, lambda x: 2 * x),
    **{f"power {n}": _integer_power(n) for n in (0, 1, 3, 4, 5, 10, -1, -2, -3, -7)},
    **{f"power {c}": _power(c) for c in (2.5, 0.25, -1.5)},
    "floating power 3.0": _power(3.0, "all"),
    "reciprocal": Function(lambda x: 1 / x, lambda x: 1 / x, lambda x: -1 / x**2),
    "abs": Function(jnp.abs, abs, lambda x: mpmath.sign(x), steps=(0.0,)),
    "relu": Function(jax.nn.relu, lambda x: max(x, mpf(0)), lambda x: mpf(x > 0), steps=(0.0,)),
    "min": Function(
        lambda x: jnp.minimum(x, 2.0), lambda x: min(x, mpf(2)), lambda x: mpf(x < 2), steps=(2.0,)
    ),
    "clamp": Function(
        lambda x: jnp.clip(x, -1.0, 2.0),
        lambda x: min(max(x, mpf(-1)), mpf(2)),
        lambda x: mpf(-1 < x < 2),
        steps=(-1.0, 2.0),
    ),
    "where": Function(
        lambda x: jnp.where(x > 2.0, x - 2.0, 0.0),
        lambda x: max(x - 2, mpf(0)),
        lambda x: mpf(x > 2),
        steps=(2.0,),
    ),
    "rem": Function(
        lambda x: lax.rem(x, jnp.full_like(x, 3.0)),
        lambda x: mpmath.sign(x) * mpmath.fmod(abs(x), 3),
        lambda x: mpf(1),
    ),
    "silu": Function(
        jax.nn.silu,
        lambda x: x * _sigmoid(x),
        lambda x: _sigmoid(x) * (1 + x * _sigmoid(-x)),
        amplifies=150,
    ),
}


def samples(function: Function, dtype, count: int, seed: int = 0):
    """Values and differences of all sizes, and those that meet in an awkward place."""
    generator = np.random.default_rng(seed)

    def sign():
        return generator.choice([-1, 1], count)

    smallest = 1e-20 if dtype == "float32" else 1e-60
    size = np.exp(generator.uniform(np.log(smallest), np.log(150), count))
    a = np.where(generator.random(count) < 0.5, size * sign(), generator.uniform(-150, 150, count))
    if function.domain == "positive":
        a = np.abs(a)
    elif function.domain == "above -1":
        a = np.where(a > -1, a, np.abs(a))
    a = a.astype(dtype).astype(float)
    least = np.maximum(np.abs(a), smallest) * 1e-12
    any_size = np.exp(generator.uniform(np.log(least), np.log(200))) * sign()
    # As large as a, from much smaller to much larger.
    like_a = a * np.exp(generator.uniform(-12, 3, count)) * sign()
    moderate = generator.uniform(-3, 3, count)
    step = generator.choice([0.0, *function.steps], count)
    off = np.exp(generator.uniform(-25, 0, count)) * sign()
    # a + d close to 0, to -a, or to where the function has a step.
    meeting = generator.choice([-a, -2 * a, step - a]) * (1 + off)
    d = generator.choice([any_size, like_a, moderate, meeting])
    d = np.where(np.abs(d) > 200, moderate, d).astype(dtype).astype(float)
    low = {"all": -np.inf, "positive": 0, "above -1": -1}[function.domain]
    after = a + d
    d = np.where(after > low, d, np.abs(d))
    kept = (np.abs(d) >= least) & (np.abs(d) <= 200) & (a > low)
    return a[kept].astype(dtype), d[kept].astype(dtype)


def worst_error(function: Function, dtype, count: int, seed: int = 0):
    """Of all samples the largest error, in epsilons times condition, with its a and d."""
    limits = np.finfo(dtype)
    tiny, largest = float(limits.tiny), float(limits.max)
    with jax.enable_x64(True):
        a, d = samples(function, dtype, count, seed)
        found = jax.jit(difference(function.jax))((a,), (d,))[1]
        assert found.dtype == dtype
        found = np.asarray(found, np.float64)
        before, after = (np.asarray(jax.jit(function.jax)(x)) for x in (a, a + d))
    with np.errstate(invalid="ignore", over="ignore"):
        direct = after - before
    worst = 0.0, None, None
    with mpmath.workdps(function.digits):
        for x, step, change, subtracted in zip(a, d, found, direct, strict=True):
            x, step = mpf(float(x)), mpf(float(step))
            if x == 0 and function.domain == "positive":
                continue
            if not np.isfinite(subtracted):
                continue
            assert np.isfinite(change), (x, step, change)
            try:
                slopes = function.slope(x), function.slope(x + step)
                old, new = function.exact(x), function.exact(x + step)
            except ZeroDivisionError:
                continue
            want = new - old
            if max(abs(old), abs(new)) > largest:
                continue
            # The CPU flushes what is smaller to 0, in intermediate results as well.
            if abs(change - want) <= tiny * function.amplifies:
                continue
            condition = (abs(x * (slopes[1] - slopes[0])) + abs(step * slopes[1])) / abs(want)
            error = abs((mpf(change) - want) / want) / (float(limits.eps) * max(condition, 1))
            if error > worst[0]:
                worst = float(error), float(x), float(step)
    return worst


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_elementwise_difference_is_accurate_to_rounding(name, dtype):
    error, a, d = worst_error(FUNCTIONS[name], dtype, count=400)
    assert error <= LARGEST_ERROR, (a, d)


@dataclasses.dataclass(frozen=True)
class Binary:
    """A function of two numbers: what is differenced, in mpmath, and its two slopes in mpmath."""

    jax: Callable
    exact: Callable
    slopes: Callable
    positive: bool = False


BINARY = {
    "add": Binary(jnp.add, lambda a, b: a + b, lambda a, b: (1, 1)),
    "sub": Binary(jnp.subtract, lambda a, b: a - b, lambda a, b: (1, -1)),
    "mul": Binary(jnp.multiply, lambda a, b: a * b, lambda a, b: (b, a)),
    "div": Binary(jnp.divide, lambda a, b: a / b, lambda a, b: (1 / b, -a / b**2)),
    "max": Binary(jnp.maximum, max, lambda a, b: (a >= b, a < b)),
    "min": Binary(jnp.minimum, min, lambda a, b: (a <= b, a > b)),
    "pow": Binary(
        lax.pow,
        lambda a, c: a**c,
        lambda a, c: (c * a ** (c - 1), a**c * mpmath.log(a)),
        positive=True,
    ),
}


@pytest.mark.parametrize("changing", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", BINARY)
def test_a_difference_of_two_operands_is_accurate_to_rounding(name, dtype, changing):
    function, limits = BINARY[name], np.finfo(dtype)
    generator = np.random.default_rng(0)
    count = 300

    def numbers(largest=150.0):
        size = np.exp(generator.uniform(np.log(1e-6), np.log(largest), count))
        return size * generator.choice([-1, 1], count)

    x = [numbers(), numbers(4.0 if name == "pow" else 150.0)]
    if function.positive:
        x[0] = np.abs(x[0])
    x = [part.astype(dtype) for part in x]
    d = []
    for part in x:
        relative = np.exp(generator.uniform(np.log(1e-12), np.log(1e3), count))
        step = part * relative * generator.choice([-1, 1], count)
        cancelling = -part * (1 + np.exp(generator.uniform(-25, 0, count)))
        step = generator.choice([step, cancelling])
        step = np.where(np.abs(step) > 200, numbers(), step).astype(dtype)
        d.append(step)
    if function.positive:
        d[0] = np.where(x[0] + d[0] > 0, d[0], np.abs(d[0]))
    given = tuple(step if moves else None for step, moves in zip(d, changing, strict=True))
    with jax.enable_x64(True):
        found = np.asarray(jax.jit(difference(function.jax))(tuple(x), given)[1], np.float64)
    checked = 0
    for row in range(count):
        with mpmath.workdps(60):
            before = [mpf(float(part[row])) for part in x]
            steps = [mpf(float(p[row])) * m for p, m in zip(d, changing, strict=True)]
            after = [v + s for v, s in zip(before, steps, strict=True)]
            old, new = function.exact(*before), function.exact(*after)
            want = new - old
            if max(abs(old), abs(new)) > limits.max or abs(found[row] - want) <= limits.tiny:
                continue
            slopes = function.slopes(*before), function.slopes(*after)
            condition = sum(
                abs(v * (s1 - s0)) + abs(step * s1)
                for v, step, s0, s1 in zip(before, steps, *slopes, strict=True)
            ) / abs(want)
            error = abs((found[row] - want) / want)
        assert error <= LARGEST_ERROR * float(limits.eps) * max(condition, 1), (before, steps)
        checked += 1
    # What is exact has been passed over.
    assert checked > 20 or name in ("add", "sub", "max", "min")
