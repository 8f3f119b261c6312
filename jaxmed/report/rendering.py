"""Templates, which hold all sentences that a reader sees; code hands them verdicts and numbers.

A verdict is a small dataclass whose `sentence` is the name of the macro that tells it. Pages
(`*.html.j2`) escape all text, the macros that they share with closing lines included; closing
lines, tables and cards (other names) are plain text.
"""

import pathlib
import re

import jinja2

from jaxmed.report import numbers

_FOLDER = pathlib.Path(__file__).parent / "templates"


def render(template: str, **content) -> str:
    """A template of `templates/`, filled in.

    Args:
        template: its name.
        content: what it names; a name that it has and this has not is an error.
    """
    environment = _PAGES if template.endswith(".html.j2") else _TEXTS
    return environment.get_template(template).render(**content)


def lines(template: str, **content) -> list[str]:
    """A template of plain text, filled in, line by line."""
    return render(template, **content).splitlines()


def _joined(text: str) -> str:
    """A sentence on one line, however the template breaks it."""
    return re.sub(r"\s*\n\s*", " ", text.strip())


def _aligned(table: str) -> str:
    """Rows of a name and a value, with a bar between, the values below each other."""
    rows = [line.split("|", maxsplit=1) for line in table.strip().splitlines()]
    width = max(len(name.strip()) for name, _ in rows)
    return "\n".join(f"{name.strip():<{width}}  {value.strip()}" for name, value in rows)


def _environment(escapes: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=escapes,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "aligned": _aligned,
        "counted": numbers.counted,
        "fixed": numbers.fixed,
        "interval": numbers.interval,
        "joined": _joined,
        "number": numbers.number,
        "ordinal": numbers.ordinal,
        "percent": numbers.percent,
        "q_value": numbers.q_value,
        "rounded": numbers.rounded,
        "signed": numbers.signed,
        "whole": numbers.whole,
        "with_interval": numbers.with_interval,
    }
    return environment


_PAGES, _TEXTS = _environment(escapes=True), _environment(escapes=False)
