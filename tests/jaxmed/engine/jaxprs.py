"""Looking into jaxprs."""

from collections.abc import Iterator, Sequence

from jax.extend import core


def equations(jaxpr) -> Iterator[core.JaxprEqn]:
    """All equations, also those of the jaxprs that they call."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else [parameter]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)


def loops(jaxpr) -> Iterator[core.JaxprEqn]:
    """The loops in it."""
    return (e for e in equations(jaxpr) if e.primitive.name in ("while", "scan"))


def followed(loop: core.JaxprEqn) -> Iterator[tuple[core.JaxprEqn, list[bool]]]:
    """The equations of a `while` loop's body, and which operands of each depend on what it carries
    from turn to turn."""
    body, constants = loop.params["body_jaxpr"], loop.params["body_nconsts"]
    depends = [index >= constants for index in range(len(body.jaxpr.invars))]
    return _followed(body.jaxpr, depends)[1]


def _followed(jaxpr, depends: Sequence[bool]) -> tuple[list[bool], Iterator]:
    known = dict(zip(jaxpr.invars, depends, strict=True))
    found = []

    def read(atom) -> bool:
        return not isinstance(atom, core.Literal) and known.get(atom, False)

    for equation in jaxpr.eqns:
        operands = list(map(read, equation.invars))
        found.append((equation, operands))
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        outputs = [any(operands)] * len(equation.outvars)
        if hasattr(inner, "jaxpr") and equation.primitive.name != "scan":
            outputs, deeper = _followed(inner.jaxpr, operands)
            found.extend(deeper)
        known.update(zip(equation.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars)), iter(found)
