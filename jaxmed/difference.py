"""Exact finite differences: from f, a value x and a difference d to f(x) and f(x + d) - f(x).

This is no derivative: d may be of any size, and the result is the exact change of f, computed
without ever subtracting two nearly equal numbers. Each primitive maps (value, difference) to
(value, difference) by an algebraic identity, for instance

    a b        ->  da (b + db) + a db
    exp(a)     ->  sign(d) exp(max(a, a + d)) (-expm1(-|d|))
    a^(-1/2)   ->  a^(-1/2) expm1(-log1p(d / a) / 2)

so that the rounding error is relative to the difference and not to the value. It is a
transformation of a jaxpr, as `jax.jvp` is: it composes with `jit` and `vmap`, and a `vmap` over d
alone leaves the computation of f(x) unbatched.

An operand that does not change has the symbolic difference None, and no work is done for it. An
integer or boolean that changes carries its *changed value* in place of a difference.

Some functions have rules as a whole, since no composition of rules is both accurate and free of
overflow: softmax, log-softmax, log-sum-exp and the norm's 1 / sqrt(mean(x^2) + eps). They are
recognised as the compiled functions (`jax.jit`) named `softmax_last_axis`,
`log_softmax_last_axis`, `logsumexp_last_axis` and `inverse_rms_last_axis`.

What cannot be avoided: a difference that all but cancels its value (d near -x) is known only to the
rounding of x + d, as in direct evaluation, and not to that of the result.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array, PyTree

# From a primitive's parameters, values and differences to its outputs' values and differences.
Rule = Callable[..., tuple[list, list]]

_RULES: dict[str, Rule] = {}
_NAMED_RULES: dict[str, Rule] = {}


def difference(f: Callable) -> Callable[[tuple, tuple], tuple[PyTree, PyTree]]:
    """The function (x, d) -> (f(x), f(x + d) - f(x)).

    Args:
        f: a function of arrays (or pytrees of them), made of primitives that have a rule.

    Returns:
        A function of two tuples, the arguments x of f and their differences d, as `jax.jvp` takes
        them. A difference of None says that the argument, or that part of it, does not change.
        Where d is 0 the returned difference is exactly 0.

    Raises:
        NotImplementedError: a primitive whose operands change has no rule.
    """

    def differenced(values: tuple, differences: tuple):
        jaxpr, shape = jax.make_jaxpr(f, return_shape=True)(*values)
        leaves, tree = jax.tree.flatten(values)
        changes = jax.tree.leaves(
            jax.tree.broadcast(differences, values, is_leaf=lambda d: d is None),
            is_leaf=lambda d: d is None,
        )
        outputs, output_changes = _propagate(jaxpr.jaxpr, jaxpr.consts, leaves, changes)
        instantiated = [_dense(o, d) for o, d in zip(outputs, output_changes, strict=True)]
        tree = jax.tree.structure(shape)
        return tree.unflatten(outputs), tree.unflatten(instantiated)

    return differenced


def _propagate(jaxpr: core.Jaxpr, consts, values, differences) -> tuple[list, list]:
    """Evaluates a jaxpr on values and differences."""
    known = {}

    def read(atom):
        return (atom.val, None) if isinstance(atom, core.Literal) else known[atom]

    def write(variables, outputs, changes):
        for variable, output, change in zip(variables, outputs, changes, strict=True):
            known[variable] = (output, change)

    write(jaxpr.constvars, consts, [None] * len(consts))
    write(jaxpr.invars, values, differences)
    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inputs, changes = [o[0] for o in operands], [o[1] for o in operands]
        if all(change is None for change in changes):
            outputs = _evaluate(equation.primitive, equation.params, inputs)
            output_changes = [None] * len(outputs)
        else:
            outputs, output_changes = _rule(equation)(equation, inputs, changes)
        write(equation.outvars, outputs, output_changes)
    final = [read(atom) for atom in jaxpr.outvars]
    return [f[0] for f in final], [f[1] for f in final]


def _rule(equation) -> Rule:
    name = equation.primitive.name
    if name == "jit" and equation.params["name"] in _NAMED_RULES:
        return _NAMED_RULES[equation.params["name"]]
    if name not in _RULES:
        raise NotImplementedError(
            f"difference propagation has no rule for the primitive '{name}'; "
            "add one to jaxmed/difference.py"
        )
    return _RULES[name]


def _evaluate(primitive, params, inputs) -> list:
    """The primitive's plain outputs, always as a list."""
    outputs = primitive.bind(*inputs, **primitive.get_bind_params(params))
    return list(outputs) if primitive.multiple_results else [outputs]


def _dense(value, change):
    """The difference as an array."""
    if change is not None:
        return change
    return value if _is_discrete(value) else jnp.zeros_like(value)


def _is_discrete(value) -> bool:
    return not jnp.issubdtype(jnp.result_type(value), jnp.inexact)


def _changed(value, change):
    """The value after its change."""
    if change is None:
        return value
    return change if _is_discrete(value) else value + change


# --- Rules -------------------------------------------------------------------------------------


def _linear(*names: str) -> None:
    """Primitives that are linear in their floating-point operands together: A(x + d) - A x = A d.

    Operands that do not change are taken as zeros; integer operands (indices) must not change.
    """

    def rule(equation, inputs, changes):
        if any(_is_discrete(x) and d is not None for x, d in zip(inputs, changes, strict=True)):
            return _reevaluated(equation, inputs, changes)
        outputs = _evaluate(equation.primitive, equation.params, inputs)
        if _is_discrete(outputs[0]):
            return _reevaluated(equation, inputs, changes)
        moved = [
            x if _is_discrete(x) else _dense(x, d) for x, d in zip(inputs, changes, strict=True)
        ]
        return outputs, _evaluate(equation.primitive, equation.params, moved)

    _RULES.update(dict.fromkeys(names, rule))


def _reevaluated(equation, inputs, changes):
    """Discrete outputs: their changed value is the primitive at the changed operands."""
    outputs = _evaluate(equation.primitive, equation.params, inputs)
    if not all(_is_discrete(output) for output in outputs):
        raise NotImplementedError(
            f"difference propagation has no rule for '{equation.primitive.name}' with changed "
            "integer operands; add one to jaxmed/difference.py"
        )
    moved = [_changed(x, d) for x, d in zip(inputs, changes, strict=True)]
    return outputs, _evaluate(equation.primitive, equation.params, moved)


_linear("neg", "reduce_sum", "cumsum", "reshape", "squeeze", "transpose", "broadcast_in_dim")
_linear("slice", "rev", "concatenate", "pad", "split", "dynamic_slice", "gather", "copy", "copy_p")
_linear("convert_element_type", "add_any", "reduce_precision", "stack", "unstack")
_RULES.update(dict.fromkeys(["lt", "le", "gt", "ge", "eq", "ne"], _reevaluated))
_RULES.update(dict.fromkeys(["and", "or", "not", "xor", "sign", "is_finite"], _reevaluated))


def _nested(name: str, jaxpr_parameter: str) -> None:
    """Primitives that call a jaxpr, which is propagated through in place."""

    def rule(equation, inputs, changes):
        closed = equation.params[jaxpr_parameter]
        return _propagate(closed.jaxpr, closed.consts, inputs, changes)

    _RULES[name] = rule


_nested("jit", "jaxpr")
_nested("custom_jvp_call", "call_jaxpr")


def _elementary(name: str):
    """Registers a difference of one operand: a function of (parameters, a, d, f(a))."""

    def register(change: Callable) -> Callable:
        def rule(equation, inputs, changes):
            outputs = _evaluate(equation.primitive, equation.params, inputs)
            return outputs, [change(equation.params, inputs[0], changes[0], outputs[0])]

        _RULES[name] = rule
        return change

    return register


def _bilinear(name: str):
    """Registers a product: f(a + da, b + db) - f(a, b) = f(da, b + db) + f(a, db)."""

    def rule(equation, inputs, changes):
        def product(left, right):
            return _evaluate(equation.primitive, equation.params, [left, right])[0]

        (a, b), (da, db) = inputs, changes
        output = product(a, b)
        if da is None:
            return [output], [product(a, db)]
        if db is None:
            return [output], [product(da, b)]
        return [output], [product(da, b + db) + product(a, db)]

    _RULES[name] = rule


_bilinear("mul")
_bilinear("dot_general")


def _sum(name: str, sign: int) -> None:
    def rule(equation, inputs, changes):
        output = _evaluate(equation.primitive, equation.params, inputs)
        da, db = changes
        if db is None:
            change = da
        elif da is None:
            change = sign * db
        else:
            change = da + sign * db
        return output, [jnp.broadcast_to(change, output[0].shape)]

    _RULES[name] = rule


_sum("add", 1)
_sum("sub", -1)


def _div(equation, inputs, changes):
    (a, b), (da, db) = inputs, changes
    quotient = lax.div(a, b)
    if db is None:
        return [quotient], [da / b]
    numerator = -quotient * db if da is None else da - quotient * db
    return [quotient], [numerator / (b + db)]


_RULES["div"] = _div


def _select_n(equation, inputs, changes):
    """select(new predicate, c + dc) - select(old predicate, c)."""
    predicate, *cases = inputs
    output = lax.select_n(predicate, *cases)
    if _is_discrete(output):
        return _reevaluated(equation, inputs, changes)
    if changes[0] is None:
        return [output], [lax.select_n(predicate, *map(_dense, cases, changes[1:]))]
    return [output], [lax.select_n(changes[0], *map(_changed, cases, changes[1:])) - output]


_RULES["select_n"] = _select_n


@_elementary("square")
def _square(params, a, d, output):
    return d * (2 * a + d)


@_elementary("integer_pow")
def _integer_pow(params, a, d, output):
    """(a + d)^n - a^n = d sum_j (a + d)^j a^(n-1-j); for a negative power through 1 / a^|n|."""
    n = abs(params["y"])
    total = jnp.zeros_like(a + d)
    for j in range(n):
        total = total + lax.integer_pow(a + d, j) * lax.integer_pow(a, n - 1 - j)
    change = d * total
    return change if params["y"] >= 0 else -change * output / lax.integer_pow(a + d, n)


def _exp_difference(a: Array, d: Array) -> Array:
    """exp(a + d) - exp(a), which overflows only where the result does."""
    return jnp.sign(d) * jnp.exp(jnp.maximum(a, a + d)) * -jnp.expm1(-jnp.abs(d))


@_elementary("exp")
def _exp(params, a, d, output):
    return _exp_difference(a, d)


# Where d < -a / 2 the difference is not small beside the value, a + d is exact (Sterbenz), and the
# identity in d / a would lose what is left of a: there direct evaluation is the accurate one.


@_elementary("log")
def _log(params, a, d, output):
    return jnp.where(d > -a / 2, jnp.log1p(d / a), jnp.log((a + d) / a))


@_elementary("rsqrt")
def _rsqrt(params, a, d, output):
    return _rsqrt_difference(a, d, a + d)


def _rsqrt_difference(a: Array, d: Array, changed: Array) -> Array:
    """changed^(-1/2) - a^(-1/2), where changed = a + d is known to its own rounding."""
    small = d > -a / 2
    ratio = jnp.where(small, d / a, 0)
    direct = lax.rsqrt(changed) - lax.rsqrt(a)
    return jnp.where(small, lax.rsqrt(a) * jnp.expm1(-0.5 * jnp.log1p(ratio)), direct)


@_elementary("sqrt")
def _sqrt(params, a, d, output):
    total = output + jnp.sqrt(a + d)
    return jnp.where(d == 0, 0, d / jnp.where(d == 0, 1, total))


def _logistic_difference(a: Array, d: Array) -> Array:
    """s(a + d) - s(a) for s(a) = 1 / (1 + exp(-a))."""
    high, low = jnp.maximum(a, a + d), jnp.minimum(a, a + d)
    return jnp.sign(d) * lax.logistic(high) * lax.logistic(-low) * -jnp.expm1(-jnp.abs(d))


@_elementary("logistic")
def _logistic(params, a, d, output):
    return _logistic_difference(a, d)


@_elementary("tanh")
def _tanh(params, a, d, output):
    """tanh(a) = 2 s(2 a) - 1."""
    return 2 * _logistic_difference(2 * a, 2 * d)


# --- Named functions ---------------------------------------------------------------------------


def _logsumexp_difference(log_p: Array, d: Array) -> Array:
    """logsumexp(a + d) - logsumexp(a) over the last axis (kept), given log p = log_softmax(a).

    It is log(1 + s) with s = sum(exp(log p + d) - p). Where s is near -1 or overflows, the
    difference is not small, and logsumexp(log p + d) is accurate instead.
    """
    s = jnp.sum(_exp_difference(log_p, d), axis=-1, keepdims=True)
    small = (s > -0.5) & (s < jnp.sqrt(jnp.finfo(s.dtype).max))
    direct = jax.nn.logsumexp(log_p + d, axis=-1, keepdims=True)
    return jnp.where(small, jnp.log1p(jnp.where(small, s, 0)), direct)


def _named(name: str):
    """Registers the difference of a compiled function of that name, whose first operand changes.

    The rule is a function of that operand, its difference, and the other operands.
    """

    def register(rule: Callable) -> Callable:
        def wrapped(equation, inputs, changes):
            if any(change is not None for change in changes[1:]):
                raise NotImplementedError(
                    f"difference propagation has no rule for '{name}' with more than its first "
                    "operand changed; add one to jaxmed/difference.py"
                )
            output, change = rule(inputs[0], changes[0], *inputs[1:])
            return [output], [change]

        _NAMED_RULES[name] = wrapped
        return rule

    return register


@_named("softmax_last_axis")
def _softmax(a, d):
    log_p = jax.nn.log_softmax(a, axis=-1)
    change = d - _logsumexp_difference(log_p, d)
    return jax.nn.softmax(a, axis=-1), _exp_difference(log_p, change)


@_named("log_softmax_last_axis")
def _log_softmax(a, d):
    log_p = jax.nn.log_softmax(a, axis=-1)
    return log_p, d - _logsumexp_difference(log_p, d)


@_named("logsumexp_last_axis")
def _logsumexp(a, d):
    log_p = jax.nn.log_softmax(a, axis=-1)
    total = jax.nn.logsumexp(a, axis=-1)
    return total, _logsumexp_difference(log_p, d)[..., 0]


@_named("inverse_rms_last_axis")
def _inverse_rms(a, d, eps):
    """The changed mean square is formed from a + d, so that no large entry is left behind in it."""
    mean_square = jnp.mean(jnp.square(a), axis=-1, keepdims=True) + eps
    change = jnp.mean(d * (2 * a + d), axis=-1, keepdims=True)
    changed = jnp.mean(jnp.square(a + d), axis=-1, keepdims=True) + eps
    return lax.rsqrt(mean_square), _rsqrt_difference(mean_square, change, changed)
