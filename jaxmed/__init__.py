"""Exact causal mediation analysis of language models.

    decoder, tokenizer = jaxmed.load("meta-llama/Llama-3.2-1B-Instruct")
    pairs = jaxmed.read_pairs("pairs.jsonl", tokenizer)
    found = jaxmed.scan(decoder, pairs, granularity=("neuron", "head"))
    found["neuron"].nie

Names are loaded when they are first asked for: `import jaxmed` alone loads no JAX. Nothing in the
package imports this face; it only gathers what a user needs.
"""

import importlib
from typing import TYPE_CHECKING

import models  # noqa: F401 (before transformers, whose word on torch it takes back)

if TYPE_CHECKING:
    from jaxmed.analysis.findings import Findings, open_run
    from jaxmed.data.pairs import Pair
    from jaxmed.data.pairs import read as read_pairs
    from jaxmed.engine.difference import difference
    from jaxmed.question.effects import Effects, Status
    from jaxmed.question.metrics import LogitDifference, OfLogits, ResponseLogprobDifference
    from jaxmed.question.positions import Align, Positions
    from jaxmed.report import plot
    from jaxmed.runs.scan import scan
    from jaxmed.version import __version__
    from models.checkpoint import load
    from models.decoder import Decoder
    from models.edits import Edit
    from models.errors import InputError
    from models.sites import Site

# By name: the module that has it, and what it is called there; "" for the module itself.
_HOMES = {
    "Align": ("jaxmed.question.positions", "Align"),
    "Decoder": ("models.decoder", "Decoder"),
    "Edit": ("models.edits", "Edit"),
    "Effects": ("jaxmed.question.effects", "Effects"),
    "Findings": ("jaxmed.analysis.findings", "Findings"),
    "InputError": ("models.errors", "InputError"),
    "LogitDifference": ("jaxmed.question.metrics", "LogitDifference"),
    "OfLogits": ("jaxmed.question.metrics", "OfLogits"),
    "Pair": ("jaxmed.data.pairs", "Pair"),
    "Positions": ("jaxmed.question.positions", "Positions"),
    "ResponseLogprobDifference": ("jaxmed.question.metrics", "ResponseLogprobDifference"),
    "Site": ("models.sites", "Site"),
    "Status": ("jaxmed.question.effects", "Status"),
    "__version__": ("jaxmed.version", "__version__"),
    "difference": ("jaxmed.engine.difference", "difference"),
    "load": ("models.checkpoint", "load"),
    "open_run": ("jaxmed.analysis.findings", "open_run"),
    "plot": ("jaxmed.report.plot", ""),
    "read_pairs": ("jaxmed.data.pairs", "read"),
    "scan": ("jaxmed.runs.scan", "scan"),
}
__all__ = [
    "Align",
    "Decoder",
    "Edit",
    "Effects",
    "Findings",
    "InputError",
    "LogitDifference",
    "OfLogits",
    "Pair",
    "Positions",
    "ResponseLogprobDifference",
    "Site",
    "Status",
    "__version__",
    "difference",
    "load",
    "open_run",
    "plot",
    "read_pairs",
    "scan",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, own_name = _HOMES[name]
    home = importlib.import_module(module)
    return getattr(home, own_name) if own_name else home


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
