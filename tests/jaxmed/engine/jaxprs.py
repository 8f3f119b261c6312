"""Looking into jaxprs."""

from collections.abc import Iterator

from jax.extend import core


def equations(jaxpr) -> Iterator[core.JaxprEqn]:
    """All equations, also those of the jaxprs that they call."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else [parameter]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)
