"""Exact finite differences: from f, a value x and a difference d to f(x) and f(x + d) - f(x).

This is no derivative: d may be of any size, and the result is the exact change of f, computed
without ever subtracting two nearly equal numbers, so that the rounding error is relative to the
difference and not to the value. `difference` is a transformation of a jaxpr, as `jax.jvp` is: each
primitive maps (value, difference) to (value, difference) by an identity, it composes with `jit` and
`vmap`, and a `vmap` over d alone leaves the computation of f(x) unbatched. It knows nothing of what
f is for.

    from jaxmed.engine.difference import difference
    y, dy = difference(f)((x,), (d,))               # dy = f(x + d) - f(x)
    dys = jax.vmap(lambda d: difference(f)((x,), (d,))[1])(ds)      # f(x) is computed once

The identities, with b = a + d (they follow from algebra and addition theorems; those with a source
are marked):

    linear                    A d
    a1 a2, dot_general        d1 a2 + (a1 + d1) d2, or for numbers d1 (a2 + d2) + a1 d2
    a1 / a2                   (d1 - (a1 / a2) d2) / (a2 + d2)
    a^n                       d (b^(n-1) + b^(n-2) a + ... + a^(n-1)), by repeated squaring
    a^-n                      the same for 1 / a, whose difference is -d / (a b)
    sqrt, cbrt, a^(-1/2)      d / (sqrt(a) + sqrt(b)), and alike
    exp                       exp(a) expm1(d)                                           [K]
    log                       log1p(d / a)                                              [K]
    a^c                       a^c expm1(c log1p(d / a))                                 [K]
    logistic s                s(-a) s(b) (-expm1(-d)), where s(-x) = 1 - s(x) is not subtracted
    tanh                      2 s(2 a) - 1, so twice the logistic's at 2 a and 2 d
    sin, cos                  2 cos(a + d/2) sin(d/2), -2 sin(a + d/2) sin(d/2)         [H]
    erf, erfc                 the integral's power series about the midpoint a + d/2
    log-sum-exp               log1p(s), s = sum of p expm1(d) with p = softmax(a)       [B]
    softmax                   p (expm1(d) - s) / (1 + s)                                [B]
    max, select, sort, a[i]   (what is chosen now - what was chosen, at a) + its d

Most hold to rounding only where d is small beside a or beside 1. Elsewhere the two values differ by
a factor, direct evaluation loses nothing, and it is used instead; a + d is then exact where it
cancels (Sterbenz' lemma [S]). Both are selected before a transcendental function where they can
be, and expm1 is a polynomial where it is known to be of a small number: batched differences then
cost one exponential, not several.

    [B] Blanchard, Higham, Higham: Accurately computing the log-sum-exp and softmax functions, IMA
        Journal of Numerical Analysis 41 (2021): what shifting costs; the change is derived here.
    [H] Higham: Accuracy and Stability of Numerical Algorithms, 2nd edition, SIAM 2002, chapter 1:
        cancellation, and rewriting so as to avoid it.
    [K] expm1 and log1p as functions of their own are Kahan's; see [H], section 1.14.
    [S] Sterbenz: Floating-Point Computation, Prentice-Hall 1974; [H], theorem 2.5.

An operand that does not change has the symbolic difference None, and no work is done for it. An
integer or boolean that changes carries its *changed value* in place of a difference. Rounding to
another floating-point type counts as linear: it is not f's rounding errors whose change is sought.

Some functions need a rule as a whole, since no composition of rules is both accurate and free of
overflow: softmax, log-softmax, log-sum-exp and the norm's 1 / sqrt(mean(x^2) + eps), and a s(a).
The rules are here (`softmax`, `log_softmax`, `logsumexp`, `inverse_rms`, `silu`); which functions
they are of, the caller says:

    difference(f, rules={my_softmax: softmax})          # my_softmax is compiled (jax.jit)

What cannot be avoided: a difference that all but cancels its value (d near -x) is known only to the
rounding of x + d, as in direct evaluation, and not to that of the result. In a composition this
meets intermediate values too: with gelu's 1 + tanh driven from 1 to 0 by a large d, what is left of
it is known to epsilon, times d in the result.
"""

import dataclasses
import inspect
import math
import operator
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

# What a rule is given: a number of a traced program, or one that NumPy holds.
Value = Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Policy:
    """What holds for a whole propagation.

    Attributes:
        fallback: evaluate a primitive that has no rule on both sides, and subtract.
        named: by their names, functions that have a rule as a whole: the file that each is written
            in, and the rule.
    """

    fallback: bool
    named: Mapping[str, tuple[str, "Several"]]


# From the policy, an equation of the jaxpr, its operands' values and their differences to the
# values of its outputs and their differences.
Rule = Callable[[Policy, core.JaxprEqn, list, list], tuple[list, list]]

# Of a function whose first argument changes: from that argument, its difference and the other
# arguments to the function's output and its difference.
NamedRule = Callable[..., tuple[Value, Value]]


@dataclasses.dataclass(frozen=True)
class Several:
    """A rule of a function whose first arguments change, any of them.

    Attributes:
        rule: from these arguments, their differences and the other arguments to the function's
            output and its difference.
        changing: how many they are.
    """

    rule: NamedRule
    changing: int


_RULES: dict[str, Rule] = {}
# Those that know what to do with a discrete operand that changes.
_TAKES_DISCRETE: set[str] = set()


def difference(
    f: Callable,
    *,
    rules: Mapping[Callable, NamedRule | Several] = types.MappingProxyType({}),
    fallback: bool = False,
) -> Callable[[tuple, tuple], tuple[PyTree, PyTree]]:
    """The function (x, d) -> (f(x), f(x + d) - f(x)).

    Args:
        f: a function of arrays (or pytrees of them), made of primitives that have a rule.
        rules: of compiled functions (`jax.jit`) that f may call, as wholes; each applies where the
            first argument alone changes. A jaxpr holds no functions, but the name of each and
            where it is written: a function is known by its name and its file. `Several` has a rule
            of a function whose first arguments change.
        fallback: evaluate a primitive that has no rule at both x and x + d, and subtract: correct,
            but rounded relative to the value.

    Returns:
        A function of two tuples, the arguments x of f and their differences d, as `jax.jvp` takes
        them. A difference of None says that the argument, or that part of it, does not change.
        Where d is 0 the returned difference is exactly 0.

    Raises:
        NotImplementedError: a primitive whose operands change has no rule.
        TypeError: values and differences are no tuples of equal length.
        ValueError: two functions that are given rules have the same name.
    """
    policy = Policy(fallback, _by_name(rules))

    def differenced(values: tuple, differences: tuple):
        both = values, differences
        if not all(isinstance(x, tuple) for x in both) or len(values) != len(differences):
            raise TypeError("values and differences are tuples of f's arguments, equally long")
        jaxpr, shape = jax.make_jaxpr(f, return_shape=True)(*values)
        leaves = jax.tree.leaves(values)
        changes = jax.tree.leaves(
            jax.tree.broadcast(differences, values, is_leaf=_is_none), is_leaf=_is_none
        )
        changes = [_like(x, d) for x, d in zip(leaves, changes, strict=True)]
        outputs, output_changes = _propagate(policy, jaxpr.jaxpr, jaxpr.consts, leaves, changes)
        instantiated = [_dense(o, d) for o, d in zip(outputs, output_changes, strict=True)]
        tree = jax.tree.structure(shape)
        return tree.unflatten(outputs), tree.unflatten(instantiated)

    return differenced


def _by_name(rules: Mapping[Callable, NamedRule | Several]) -> dict[str, tuple[str, Several]]:
    """The rules as `Policy.named` has them."""
    named = {}
    for function, rule in rules.items():
        rule = rule if isinstance(rule, Several) else Several(rule, changing=1)
        written = inspect.unwrap(function)
        if written.__name__ in named:
            raise ValueError(f"two functions named '{written.__name__}' are given rules")
        named[written.__name__] = inspect.getfile(written), rule
    return named


def _is_none(x) -> bool:
    return x is None


def _like(value, change):
    """A given difference in its value's shape and type."""
    if change is None or _is_discrete(value):
        return change
    return jnp.broadcast_to(jnp.asarray(change, jnp.result_type(value)), jnp.shape(value))


def _propagate(policy: Policy, jaxpr: core.Jaxpr, consts, values, changes) -> tuple[list, list]:
    """Evaluates a jaxpr on values and differences."""
    known = {}

    def read(atom):
        return (atom.val, None) if isinstance(atom, core.Literal) else known[atom]

    def write(variables, outputs, output_changes):
        for variable, output, change in zip(variables, outputs, output_changes, strict=True):
            known[variable] = (output, change)

    write(jaxpr.constvars, consts, [None] * len(consts))
    write(jaxpr.invars, values, changes)
    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inputs, input_changes = [o[0] for o in operands], [o[1] for o in operands]
        if all(change is None for change in input_changes):
            outputs = evaluate(equation, inputs)
            output_changes = [None] * len(outputs)
        else:
            rule = _rule(policy, equation, inputs, input_changes)
            outputs, output_changes = rule(policy, equation, inputs, input_changes)
        write(equation.outvars, outputs, output_changes)
    final = [read(atom) for atom in jaxpr.outvars]
    return [f[0] for f in final], [f[1] for f in final]


def _rule(policy: Policy, equation, inputs, changes) -> Rule:
    name = equation.primitive.name
    named = _named_rule(policy, equation) if name == "jit" else None
    if named and all(change is None for change in changes[named.changing :]):
        return _as_a_whole(named)
    if name in _TAKES_DISCRETE:
        return _RULES[name]
    # A change of an integer is never small, so that direct evaluation is the accurate one.
    discrete_changes = any(
        _is_discrete(x) and d is not None for x, d in zip(inputs, changes, strict=True)
    )
    if discrete_changes or all(_is_discrete(variable.aval) for variable in equation.outvars):
        return _direct
    if name in _RULES:
        return _RULES[name]
    if policy.fallback:
        return _direct
    raise NotImplementedError(
        f"difference propagation has no rule for the primitive '{name}'; add one to "
        "jaxmed/engine/difference.py, or have it evaluated on both sides by "
        "difference(f, fallback=True)"
    )


def _named_rule(policy: Policy, equation) -> Several | None:
    """The rule of the compiled function that an equation calls, if it was given one."""
    file, rule = policy.named.get(equation.params["name"], (None, None))
    where = _open(equation.params["jaxpr"])[0].debug_info.func_src_info
    return rule if file is not None and (where is None or file in where) else None


def _as_a_whole(named: Several) -> Rule:
    def rule(policy, equation, inputs, changes):
        first, others = inputs[: named.changing], inputs[named.changing :]
        output, change = named.rule(*first, *map(_dense, first, changes), *others)
        return [output], [change]

    return rule


def evaluate(equation, inputs, **params) -> list:
    """The primitive's plain outputs, always as a list; `params` take the place of its own."""
    primitive = equation.primitive
    outputs = primitive.bind(*inputs, **primitive.get_bind_params(equation.params | params))
    return list(outputs) if primitive.multiple_results else [outputs]


def _is_discrete(value) -> bool:
    return not jnp.issubdtype(jnp.result_type(value), jnp.inexact)


def _dense(value, change):
    """The difference as an array."""
    if change is not None:
        return change
    return value if _is_discrete(value) else jnp.zeros_like(value)


def _changed(value, change):
    """The value after its change."""
    if change is None:
        return value
    return change if _is_discrete(value) else value + change


def _subtracted(after, before):
    """The change from a value to another."""
    return after if _is_discrete(before) else after - before


def _direct(policy, equation, inputs, changes):
    """The primitive on both sides, subtracted."""
    outputs = evaluate(equation, inputs)
    after = evaluate(equation, list(map(_changed, inputs, changes)))
    return outputs, list(map(_subtracted, after, outputs))


# --- Structure ---------------------------------------------------------------------------------


def _linear(*names: str, **params) -> None:
    """Primitives that are linear in their floating-point operands together: A(x + d) - A x = A d.

    Operands that do not change are taken as zeros. Where indices change, A does, into A':
    A'(x + d) - A x = (A' x - A x) + A' d. `params` are those that A d needs where A x has others.
    """

    def rule(policy, equation, inputs, changes):
        outputs = evaluate(equation, inputs)
        if all(map(_is_discrete, outputs)):
            return _direct(policy, equation, inputs, changes)
        pairs = list(zip(inputs, changes, strict=True))
        terms = []
        if any(_is_discrete(x) and d is not None for x, d in pairs):
            moved = [_dense(x, d) if _is_discrete(x) else x for x, d in pairs]
            after = evaluate(equation, moved)
            terms.append([a - o for a, o in zip(after, outputs, strict=True)])
        if any(not _is_discrete(x) and d is not None for x, d in pairs):
            terms.append(evaluate(equation, [_dense(x, d) for x, d in pairs], **params))
        return outputs, [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]

    _RULES.update(dict.fromkeys(names, rule))
    _TAKES_DISCRETE.update(names)


_linear("neg", "reduce_sum", "cumsum", "reshape", "squeeze", "transpose", "copy")
_linear("broadcast_in_dim", "slice", "rev", "concatenate", "pad", "split", "stack", "unstack")
_linear("dynamic_slice", "dynamic_update_slice", "scatter", "scatter-add", "tile")
_linear("convert_element_type", "reduce_precision", "stop_gradient", "sharding_constraint")
_linear("device_put", "reshard")
# What is gathered from outside the array is a constant.
_linear("gather", fill_value=0)


def _optimization_barrier(policy, equation, inputs, changes):
    outputs = evaluate(equation, inputs)
    held = iter(lax.optimization_barrier([d for d in changes if d is not None]))
    return outputs, [None if d is None else next(held) for d in changes]


_RULES["optimization_barrier"] = _optimization_barrier
_TAKES_DISCRETE.add("optimization_barrier")


def _select_n(policy, equation, inputs, changes):
    """Where another case is selected, the step between the cases adds to the case's own change."""
    (predicate, *cases), (new_predicate, *case_changes) = inputs, changes
    output = lax.select_n(predicate, *cases)
    if _is_discrete(output):
        return _direct(policy, equation, inputs, changes)
    chosen = predicate if new_predicate is None else new_predicate
    change = 0
    if any(d is not None for d in case_changes):
        change = lax.select_n(chosen, *map(_dense, cases, case_changes))
    if new_predicate is not None:
        step = lax.select_n(chosen, *cases) - output
        # Not subtracted where the case is the same: it may be infinite.
        change = jnp.where(chosen == predicate, 0, step) + change
    return [output], [change]


_RULES["select_n"] = _select_n
_TAKES_DISCRETE.add("select_n")


def _sort(policy, equation, inputs, changes):
    """Values and differences are carried along with the sorted changed operands."""
    outputs = evaluate(equation, inputs)
    count = len(inputs)
    carried = [*map(_changed, inputs, changes), *inputs, *map(_dense, inputs, changes)]
    permuted = evaluate(equation, carried)
    after, values, differences = permuted[:count], permuted[count : 2 * count], permuted[-count:]
    return outputs, [
        a if _is_discrete(o) else (v - o) + d
        for a, v, d, o in zip(after, values, differences, outputs, strict=True)
    ]


_RULES["sort"] = _sort
_TAKES_DISCRETE.add("sort")


def _comparison(name: str, compare: Callable) -> None:
    """a + da < b + db is decided as a - b < db - da, which does not round the differences away."""

    def rule(policy, equation, inputs, changes):
        if _is_discrete(inputs[0]):
            return _direct(policy, equation, inputs, changes)
        (a, b), (da, db) = inputs, changes
        gap = a - b
        exact = compare(gap, _or_0(db) - _or_0(da))
        # Equal infinities have no gap.
        after = jnp.where(jnp.isnan(gap), compare(_changed(a, da), _changed(b, db)), exact)
        return evaluate(equation, inputs), [after]

    _RULES[name] = rule
    _TAKES_DISCRETE.add(name)


def _or_0(change):
    return 0 if change is None else change


for _name in ["lt", "le", "gt", "ge", "eq", "ne"]:
    _comparison(_name, getattr(operator, _name))


# --- Control flow ------------------------------------------------------------------------------


def _open(jaxpr) -> tuple[core.Jaxpr, list]:
    """A jaxpr and its constants; some primitives hold it closed over them, some have none."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, [])


def _run(policy: Policy, jaxpr, values, changes) -> tuple[list, list]:
    return _propagate(policy, *_open(jaxpr), values, changes)


def _plain(jaxpr, values) -> list:
    """A jaxpr evaluated on values alone."""
    return core.jaxpr_as_fun(jaxpr)(*values)


def _which_change(policy: Policy, jaxpr, changing: list[bool]) -> list[bool]:
    """Which outputs of a jaxpr change if those inputs do."""
    found = []

    def run(values, changes):
        outputs, output_changes = _run(policy, jaxpr, values, changes)
        found.extend(change is not None for change in output_changes)
        return outputs

    avals = [_shape(variable) for variable in _open(jaxpr)[0].invars]
    jax.eval_shape(run, avals, [a if c else None for a, c in zip(avals, changing, strict=True)])
    return found


def _shape(variable) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def _carries_that_change(policy: Policy, body, before, carried, after) -> list[bool]:
    """Which carries of a loop change: a fixpoint, since a pass may pass a change on to others.

    `before`, `carried` and `after` say which constants, carries and slices change at first.
    """
    while True:
        outputs = _which_change(policy, body, [*before, *carried, *after])[: len(carried)]
        union = [c or o for c, o in zip(carried, outputs, strict=True)]
        if union == carried:
            return carried
        carried = union


def _dense_where(changing: list[bool], values, changes) -> list:
    return [_dense(v, d) if c else None for c, v, d in zip(changing, values, changes, strict=True)]


def _change_mask(changes) -> list[bool]:
    return [change is not None for change in changes]


def _divided(items: list, *sizes: int) -> list[list]:
    """The list cut into pieces of those sizes, and the rest."""
    pieces = []
    for size in sizes:
        pieces.append(items[:size])
        items = items[size:]
    return [*pieces, items]


def _call(name: str, jaxpr_parameter: str) -> None:
    """Primitives that call a jaxpr, which is propagated through in place."""

    def rule(policy, equation, inputs, changes):
        return _run(policy, equation.params[jaxpr_parameter], inputs, changes)

    _RULES[name] = rule
    _TAKES_DISCRETE.add(name)


_call("jit", "jaxpr")
_call("remat2", "jaxpr")
for _name in ["call", "closed_call", "custom_jvp_call", "custom_vjp_call"]:
    _call(_name, "call_jaxpr")


def _scan_sizes(params) -> tuple[int, int]:
    """How many constants and how many carries a scan has."""
    if "ft_in" in params:  # jax >= 0.11
        constants, carry, _ = params["ft_in"].unpack()
        return len(constants), len(carry)
    return params["num_consts"], params["num_carry"]


def _scan(policy, equation, inputs, changes):
    params = equation.params
    body, sizes = params["jaxpr"], _scan_sizes(params)
    constants, carry, slices = _divided(inputs, *sizes)
    constant_changes, carry_changes, slice_changes = _divided(changes, *sizes)
    changing = _carries_that_change(
        policy, body, *map(_change_mask, (constant_changes, carry_changes, slice_changes))
    )

    def step(state, at):
        (values, differences), (xs, dxs) = state, at
        outputs, output_changes = _run(
            policy, body, [*constants, *values, *xs], [*constant_changes, *differences, *dxs]
        )
        values, ys = _divided(outputs, sizes[1])
        differences, dys = _divided(output_changes, sizes[1])
        return (values, _dense_where(changing, values, differences)), (ys, dys)

    (values, differences), (ys, dys) = lax.scan(
        step,
        (carry, _dense_where(changing, carry, carry_changes)),
        (slices, slice_changes),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*values, *ys], [*differences, *dys]


def _while(policy, equation, inputs, changes):
    """Both sides go on together while both are in the loop; then the changed one, if it has to."""
    predicate, body = equation.params["cond_jaxpr"], equation.params["body_jaxpr"]
    sizes = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    cond_constants, body_constants, carry = _divided(inputs, *sizes)
    cond_changes, body_changes, carry_changes = _divided(changes, *sizes)
    changing = _carries_that_change(
        policy, body, _change_mask(body_changes), _change_mask(carry_changes), []
    )

    def ask(state):
        values, differences = state
        answer, new_answer = _run(
            policy, predicate, [*cond_constants, *values], [*cond_changes, *differences]
        )
        return answer[0], new_answer[0]

    def step(state):
        values, differences = state
        values, differences = _run(
            policy, body, [*body_constants, *values], [*body_changes, *differences]
        )
        return values, _dense_where(changing, values, differences)

    state = (carry, _dense_where(changing, carry, carry_changes))
    if not _which_change(policy, predicate, [*_change_mask(cond_changes), *changing])[0]:
        return lax.while_loop(lambda state: ask(state)[0], step, state)

    outputs = evaluate(equation, inputs)
    values, differences = lax.while_loop(lambda state: operator.and_(*ask(state)), step, state)
    moved = list(map(_changed, values, differences))
    after = evaluate(
        equation,
        [
            *map(_changed, cond_constants, cond_changes),
            *map(_changed, body_constants, body_changes),
            *moved,
        ],
    )
    together = ~operator.or_(*ask((values, differences)))
    return outputs, [
        jnp.where(together, _dense(value, d), _subtracted(a, output))
        for value, d, a, output in zip(values, differences, after, outputs, strict=True)
    ]


def _cond(policy, equation, inputs, changes):
    """Where another branch is taken, both are evaluated directly."""
    (index, *operands), (new_index, *operand_changes) = inputs, changes
    branches = equation.params["branches"]
    masks = [_which_change(policy, branch, _change_mask(operand_changes)) for branch in branches]
    changing = list(map(any, zip(*masks, strict=True)))

    def propagated(branch):
        def run(values, differences):
            outputs, output_changes = _run(policy, branch, values, differences)
            return outputs, _dense_where(changing, outputs, output_changes)

        return run

    outputs, output_changes = lax.switch(
        index, list(map(propagated, branches)), operands, operand_changes
    )
    if new_index is None:
        return outputs, output_changes
    after = evaluate(equation, [new_index, *map(_changed, operands, operand_changes)])
    return outputs, [
        jnp.where(index == new_index, _dense(output, d), _subtracted(a, output))
        for output, d, a in zip(outputs, output_changes, after, strict=True)
    ]


_RULES.update({"scan": _scan, "while": _while, "cond": _cond})
_TAKES_DISCRETE.update(["scan", "while", "cond"])


# --- Arithmetic --------------------------------------------------------------------------------


def _elementwise(name: str):
    """Registers a rule of one output: a function of (parameters, output, operands, differences).

    Differences may be None, but not all of them.
    """

    def register(change: Callable) -> Callable:
        def rule(policy, equation, inputs, changes):
            (output,) = evaluate(equation, inputs)
            found = change(equation.params, output, *inputs, *changes)
            return [output], [jnp.broadcast_to(found, output.shape)]

        _RULES[name] = rule
        return change

    return register


def _product_change(product: Callable, a, b, da, db):
    """f(a + da, b + db) - f(a, b) = f(da, b) + f(a + da, db) for a bilinear f.

    In a batch of differences the first of both products has one operand for all of them.
    """
    if da is None:
        return product(a, db)
    if db is None:
        return product(da, b)
    return product(da, b) + product(a + da, db)


@_elementwise("mul")
def _mul(params, output, a, b, da, db):
    return _multiplied(a, b, da, db)


def _multiplied(a, b, da, db):
    """Of the two ways to share out da db, the one whose terms are smaller."""
    if da is None or db is None:
        return _product_change(operator.mul, a, b, da, db)
    new_a, new_b = a + da, b + db
    smaller = jnp.abs(new_a * b) < jnp.abs(a * new_b)
    return da * jnp.where(smaller, b, new_b) + jnp.where(smaller, new_a, a) * db


def _dot_general(policy, equation, inputs, changes):
    def product(a, b):
        return evaluate(equation, [a, b])[0]

    return [product(*inputs)], [_product_change(product, *inputs, *changes)]


_RULES["dot_general"] = _dot_general


@_elementwise("add")
@_elementwise("add_any")
def _add(params, output, a, b, da, db):
    return _or_0(da) + _or_0(db)


@_elementwise("sub")
def _sub(params, output, a, b, da, db):
    return _or_0(da) - _or_0(db)


@_elementwise("div")
def _div(params, output, a, b, da, db):
    if db is None:
        return da / b
    if da is None:
        return -output * (db / (b + db))
    return (da - output * db) / (b + db)


@_elementwise("rem")
def _rem(params, output, a, b, da, db):
    """With one divisor the change is da less a multiple of it, which direct evaluation tells."""
    direct = lax.rem(*jnp.broadcast_arrays(_changed(a, da), _changed(b, db))) - output
    if db is not None:
        return direct
    return da - jnp.round((da - direct) / b) * b


@_elementwise("max")
def _max(params, output, a, b, da, db):
    return _max_change(a, b, _or_0(da), _or_0(db))


@_elementwise("min")
def _min(params, output, a, b, da, db):
    return _min_change(a, b, _or_0(da), _or_0(db))


def _max_change(a, b, da, db):
    gap = a - b
    was_a, is_a = gap >= 0, gap >= db - da
    return jnp.where(was_a, jnp.where(is_a, da, db - gap), jnp.where(is_a, gap + da, db))


def _min_change(a, b, da, db):
    return -_max_change(-a, -b, -da, -db)


@_elementwise("clamp")
def _clamp(params, output, low, x, high, d_low, d, d_high):
    """min(max(x, low), high)."""
    raised = _max_change(x, low, _or_0(d), _or_0(d_low))
    return _min_change(jnp.maximum(x, low), high, raised, _or_0(d_high))


@_elementwise("abs")
def _abs(params, output, a, d):
    sign = jnp.where(a >= 0, 1, -1).astype(a.dtype)
    return sign * jnp.where((a >= 0) == (d >= -a), d, -(2 * a + d))


# Constant between steps.
_RULES.update(dict.fromkeys(["sign", "floor", "ceil", "round"], _direct))


@_elementwise("square")
def _square(params, output, a, d):
    return d * (2 * a + d)


@_elementwise("integer_pow")
def _integer_pow(params, output, a, d):
    n = params["y"]
    if n == 0:
        return jnp.zeros_like(a)
    if n > 0:
        return _power_change(a, a + d, d, n)
    u, v = 1 / a, 1 / (a + d)
    # v - u = -d u v; the smaller factor comes first, so that only the result can overflow.
    ordered = jnp.abs(u) < jnp.abs(v)
    smaller, larger = jnp.where(ordered, u, v), jnp.where(ordered, v, u)
    return _power_change(u, v, -(d * smaller) * larger, -n)


def _power_change(a, b, d, n: int):
    """b^n - a^n for b = a + d and n > 0: d times a sum, formed along with the powers of a and b."""
    power_a, power_b, total = a, b, jnp.ones_like(a)
    for bit in bin(n)[3:]:
        total = total * (power_a + power_b)
        power_a, power_b = power_a * power_a, power_b * power_b
        if bit == "1":
            total = total * b + power_a
            power_a, power_b = power_a * a, power_b * b
    return d * total


@_elementwise("pow")
def _pow(params, output, a, c, da, dc):
    """a^c expm1(e), where e is the change of c log|a|, unless a changes its sign."""
    b, exponent = _changed(a, da), jnp.asarray(_changed(c, dc), output.dtype)
    e = exponent * _log_change(jnp.abs(a), jnp.abs(b), jnp.sign(a) * _or_0(da))
    if dc is not None:
        # Not a number where a is negative; its power then jumps from one exponent to the next.
        e = e + dc * jnp.log(a)
    near = ((a > 0) == (b > 0)) & (jnp.abs(e) < 1)
    change = output * _small_expm1(jnp.where(near, e, 0))
    return jnp.where(near, change, jnp.power(b, exponent) - output)


# --- Roots and logarithms ----------------------------------------------------------------------


@_elementwise("sqrt")
def _sqrt(params, output, a, d):
    return jnp.where(d == 0, 0, d / (output + jnp.sqrt(a + d)))


@_elementwise("cbrt")
def _cbrt(params, output, a, d):
    changed = jnp.cbrt(a + d)
    return jnp.where(d == 0, 0, d / (output * (output + changed) + changed * changed))


@_elementwise("rsqrt")
def _rsqrt(params, output, a, d):
    return _rsqrt_change(a, a + d, d)


def _rsqrt_change(a, b, d):
    """b^(-1/2) - a^(-1/2), where b = a + d is known to its own rounding.

    Directly where they differ by a factor: added to the value, the change then gives back the
    changed value's last digits, which matter where it multiplies something large.
    """
    root_a, root_b = jnp.sqrt(a), jnp.sqrt(b)
    near = (d > -0.5 * a) & (d < a)
    change = -(d / (root_a + root_b)) / (root_a * root_b)
    return jnp.where(d == 0, 0, jnp.where(near, change, lax.rsqrt(b) - lax.rsqrt(a)))


@_elementwise("log")
def _log(params, output, a, d):
    return _log_change(a, a + d, d)


@_elementwise("log1p")
def _log1p(params, output, a, d):
    return _log_change(1 + a, 1 + (a + d), d)


def _log_change(a, b, d):
    """log(b) - log(a) for b = a + d, which are both known to rounding."""
    ratio = d / a
    direct = jnp.where(jnp.isfinite(ratio), jnp.log(b / a), jnp.log(b) - jnp.log(a))
    change = jnp.where((ratio > -0.25) & jnp.isfinite(ratio), jnp.log1p(ratio), direct)
    return jnp.where(a >= 0, change, jnp.nan)


# --- Exponentials ------------------------------------------------------------------------------


def _small_expm1(x):
    """expm1(x) for |x| <= 1 by its power series: cheap, since it needs no range reduction."""
    degree = 18 if x.dtype == jnp.float64 else 10
    total = jnp.full((), 1 / math.factorial(degree), x.dtype)
    for n in range(degree - 1, 0, -1):
        total = total * x + 1 / math.factorial(n)
    return total * x


def exp_change(before: Value, after: Value, d: Value) -> Array:
    """after - before, two exponentials whose logarithms differ by d."""
    near = jnp.abs(d) < 1
    return jnp.where(near, before * _small_expm1(jnp.where(near, d, 0)), after - before)


@_elementwise("exp")
def _exp(params, output, a, d):
    return exp_change(output, jnp.exp(a + d), d)


@_elementwise("expm1")
def _expm1(params, output, a, d):
    return exp_change(jnp.exp(a), jnp.exp(a + d), d)


@_elementwise("exp2")
def _exp2(params, output, a, d):
    return exp_change(output, jnp.exp2(a + d), d * math.log(2))


def _logistic_pair(x):
    """s(x) and s(-x), both to rounding."""
    w = jnp.exp(-jnp.abs(x))
    high = 1 / (1 + w)
    low = w * high
    return jnp.where(x >= 0, high, low), jnp.where(x >= 0, low, high)


def _logistic_change(a, d, s_a):
    """s(b) - s(a) for b = a + d; directly, as s(-a) - s(-b) where that is the smaller pair."""
    b = a + d
    (_, s_minus_a), (s_b, s_minus_b) = _logistic_pair(a), _logistic_pair(b)
    near = jnp.abs(d) < 1
    change = -s_minus_a * s_b * _small_expm1(jnp.where(near, -d, 0))
    return jnp.where(near, change, jnp.where(a + b > 0, s_minus_a - s_minus_b, s_b - s_a))


@_elementwise("logistic")
def _logistic(params, output, a, d):
    return _logistic_change(a, d, output)


@_elementwise("tanh")
def _tanh(params, output, a, d):
    return 2 * _logistic_change(2 * a, 2 * d, lax.logistic(2 * a))


# --- Error function ----------------------------------------------------------------------------


@_elementwise("erf")
def _erf(params, output, a, d):
    return _erf_change(a, d)


@_elementwise("erfc")
def _erfc(params, output, a, d):
    return -_erf_change(a, d)


def _erf_change(a, d):
    """2 / sqrt(pi) times the integral of exp(-t^2) from a to b = a + d.

    With t = m + h s about the midpoint m, h = d / 2, it is exp(-m^2) d times the mean over
    -1 < s < 1 of exp(-h^2 s^2) cosh(2 m h s), a power series in h^2 and (m d)^2. Where these are
    not small, erfc(|a|) and erfc(|b|) differ by a factor, or a and b have opposite signs.
    """
    b, m = a + d, a + d / 2
    near = jnp.abs(d) * (1 + jnp.abs(m)) < 0.5
    v = jnp.where(near, d * d / 4, 0)
    u = jnp.where(near, (m * d) ** 2, 0)
    order = 8 if a.dtype == jnp.float64 else 4
    mean = jnp.zeros_like(v)
    for i in range(order, -1, -1):
        inner = jnp.zeros_like(u)
        for j in range(order - i, -1, -1):
            inner = inner * u + 1 / (math.factorial(2 * j) * (2 * (i + j) + 1))
        mean = inner - mean * v / (i + 1)
    series = 2 / math.sqrt(math.pi) * jnp.exp(-m * m) * d * mean
    tail_a, tail_b = lax.erfc(jnp.abs(a)), lax.erfc(jnp.abs(b))
    one_side = jnp.where(a >= 0, tail_a - tail_b, tail_b - tail_a)
    across = jnp.where(a >= 0, -1, 1) * (2 - tail_a - tail_b)
    return jnp.where(near, series, jnp.where((a >= 0) == (b >= 0), one_side, across))


# --- Trigonometric functions -------------------------------------------------------------------


@_elementwise("sin")
def _sin(params, output, a, d):
    return 2 * jnp.cos(a + d / 2) * jnp.sin(d / 2)


@_elementwise("cos")
def _cos(params, output, a, d):
    return -2 * jnp.sin(a + d / 2) * jnp.sin(d / 2)


# --- Reductions and cumulations ----------------------------------------------------------------


def _extreme(name: str, reduce: Callable) -> None:
    """max(a + d) - max(a) is the maximum of (a - max(a)) + d, which is exact where it is d."""

    def rule(policy, equation, inputs, changes):
        (output,), (a,), (d,) = evaluate(equation, inputs), inputs, changes
        axes = equation.params["axes"]
        extreme = jnp.expand_dims(output, axes)
        below = jnp.where(a == extreme, 0, a - extreme)
        return [output], [reduce(below + d, axis=axes)]

    _RULES[name] = rule


_extreme("reduce_max", jnp.max)
_extreme("reduce_min", jnp.min)


def _cumulative(name: str, combine: Callable) -> None:
    """A cumulative operation, as a scan of its two-operand rule (a, b, da, db) -> (value, change).

    The scan's values do not depend on its differences, so that they stay unbatched.
    """

    def rule(policy, equation, inputs, changes):
        change = _accumulated(combine, inputs[0], changes[0], **equation.params)
        return evaluate(equation, inputs), [change]

    _RULES[name] = rule


def _accumulated(combine: Callable, value: Array, change: Array, axis: int, reverse: bool):
    """The changes of all partial results along an axis."""

    def pair(left, right):
        return combine(left[0], right[0], left[1], right[1])

    return lax.associative_scan(pair, (value, change), reverse=reverse, axis=axis)[1]


def _product_step(a, b, da, db):
    return a * b, _multiplied(a, b, da, db)


def _log_added(a, b, da, db):
    stacked = _Exponentials(jnp.stack([a, b], axis=-1), jnp.stack([da, db], axis=-1))
    return jnp.logaddexp(a, b), stacked.logsumexp_change()


_cumulative("cumprod", _product_step)
_cumulative("cumlogsumexp", _log_added)
_cumulative("cummax", lambda *at: (jnp.maximum(*at[:2]), _max_change(*at)))
_cumulative("cummin", lambda *at: (jnp.minimum(*at[:2]), _min_change(*at)))


def _reduce_prod(policy, equation, inputs, changes):
    """The last of the cumulative products."""
    axes = equation.params["axes"]
    kept = inputs[0].ndim - len(axes)

    def flat(x):
        moved = jnp.moveaxis(x, axes, range(kept, x.ndim))
        return moved.reshape(*moved.shape[:kept], -1)

    change = _accumulated(_product_step, flat(inputs[0]), flat(changes[0]), kept, reverse=False)
    return evaluate(equation, inputs), [change[..., -1]]


_RULES["reduce_prod"] = _reduce_prod


# --- Functions as wholes -------------------------------------------------------------------------


class _Exponentials:
    """What the changes of softmax and log-sum-exp over the last axis have in common.

    Of the probabilities p = softmax(a), w = exp(log p + d) is what becomes of them before they are
    normalised again, by the factor 1 / (1 + s) where s = sum(w - p), the changes w - p being known
    to rounding. Where s is near -1, the sum of w itself is accurate; where w is out of range, it is
    taken relative to the largest changed score.

    Softmax does not see a constant that is subtracted from all of d. Where one probability is
    near 1, that is the constant that leaves it unchanged: its change is then made of the others'
    changes, and not what is left of its own.
    """

    def __init__(self, a: Value, d: Value):
        largest = jnp.max(a, axis=-1, keepdims=True)
        largest = jnp.where(jnp.isfinite(largest), largest, 0)
        # Kept apart from the largest, which would swallow it where every score is masked.
        rest = jnp.log(jnp.sum(jnp.exp(a - largest), axis=-1, keepdims=True))
        rest = jnp.where(jnp.isfinite(rest), rest, 0)
        self.log_p = (a - largest) - rest
        self.p = jnp.exp(self.log_p)
        # At most one is, whatever the rounding.
        dominant = self.p > 0.6
        constant = jnp.sum(jnp.where(dominant, d, 0), axis=-1, keepdims=True)
        self.d = d - constant

        # a + d comes first: it is exact where d lifts a masked score back.
        changed = a + d
        highest = jnp.max(changed, axis=-1, keepdims=True)
        origin = largest + constant
        self.outside = jnp.abs((highest - origin) - rest) > 10
        log_w = (changed - jnp.where(self.outside, highest, origin)) - jnp.where(
            self.outside, 0, rest
        )
        self.w = jnp.exp(log_w)
        self.change = exp_change(self.p, self.w, self.d)
        self.s = jnp.sum(self.change, axis=-1, keepdims=True)
        self.far = self.outside | (self.s < -0.25)
        self.scale = jnp.where(self.far, jnp.sum(self.w, axis=-1, keepdims=True), 1 + self.s)
        near = jnp.log1p(jnp.where(self.far, 0, self.s))
        self.log_scale = jnp.where(self.far, jnp.log(self.scale), near)
        self.new_log_p = log_w - self.log_scale
        lifted = jnp.where(self.outside, (highest - largest) - rest, constant)
        self.log_total_change = self.log_scale + lifted

    def softmax_change(self) -> Array:
        near, far = self.change - self.p * self.s, self.w - self.p * self.scale
        return jnp.where(self.far, far, near) / self.scale

    def log_softmax_change(self, d: Value) -> Array:
        """Where both changes are larger than log p, their difference would lose it."""
        far = jnp.where(
            jnp.abs(d) > jnp.abs(self.log_p), self.new_log_p - self.log_p, d - self.log_total_change
        )
        return jnp.where(self.outside, far, self.d - self.log_scale)

    def logsumexp_change(self) -> Array:
        return self.log_total_change[..., 0]


def softmax(a: Value, d: Value) -> tuple[Array, Array]:
    """The rule of softmax over the last axis."""
    return jax.nn.softmax(a, axis=-1), _Exponentials(a, d).softmax_change()


def log_softmax(a: Value, d: Value) -> tuple[Array, Array]:
    """The rule of log-softmax over the last axis."""
    return jax.nn.log_softmax(a, axis=-1), _Exponentials(a, d).log_softmax_change(d)


def logsumexp(a: Value, d: Value) -> tuple[Array, Array]:
    """The rule of log-sum-exp over the last axis."""
    return jax.nn.logsumexp(a, axis=-1), _Exponentials(a, d).logsumexp_change()


def inverse_rms(
    a: Value, d: Value, eps: ArrayLike, *, mean: Callable[[Value], Array]
) -> tuple[Array, Array]:
    """The rule of 1 / sqrt(mean(a^2) + eps) over the last axis, which is kept.

    The changed mean square is formed from a + d, so that no large entry is left behind in it.
    `mean` is the last axis' mean, kept, in the form that is fast on the device.
    """
    mean_square = mean(jnp.square(a)) + eps
    change = mean(d * (2 * a + d))
    changed = mean(jnp.square(a + d)) + eps
    return lax.rsqrt(mean_square), _rsqrt_change(mean_square, changed, change)


def silu(a: Value, d: Value) -> tuple[Value, Value]:
    """The rule of a s(a); s(a + d) is known to its own rounding even where it all but vanishes."""
    s_a = lax.logistic(a)
    s_b, _ = _logistic_pair(a + d)
    return a * s_a, d * s_b + a * _logistic_change(a, d, s_a)
