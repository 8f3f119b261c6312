"""The plain definition itself: by hand, on its own, and as what catches a fault of the engine."""

import ast
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from jaxmed.engine import scan
from jaxmed.files import reading
from jaxmed.question import metrics, positions
from jaxmed.question.positions import Align, Edited, Positions
from jaxmed.question.question import Question
from jaxmed.reference import definition
from models.edits import Edit
from tests import tiny
from tests.jaxmed.scans import UNEQUAL, define, worst


def test_the_definition_is_an_explicit_patch():
    """One unit of each direction, patched by hand."""
    question = Question(metrics.LogitDifference(), Positions.PROMPT)
    with jax.enable_x64(True):
        decoder = tiny.decoder("llama", dtype="float64")
        found = definition.define_pair(decoder, UNEQUAL, question, ["neuron", "head", "token"])
        base, source = np.array(UNEQUAL.prompt_ids), np.array(UNEQUAL.counterfactual_ids)

        def value(tokens, *edits):
            logits = decoder(tokens, edits=list(edits))[0]
            return float(logits[-1, UNEQUAL.harmful_ids[0]] - logits[-1, UNEQUAL.safe_ids[0]])

        base_trace, source_trace = decoder(base)[1], decoder(source)[1]
        # The last 11 of 12 positions correspond.
        aligned = np.arange(12) >= 1
        moved = np.concatenate([np.zeros((1, 40)), source_trace.neuron[1]])
        edit = Edit.patch("neuron", 1, aligned, moved, np.arange(40) == 17)
        assert found.nie["neuron"][1, 17] == pytest.approx(value(base, edit) - value(base))
        edit = Edit.patch("head", 2, np.ones(11, bool), base_trace.head[2, 1:], np.arange(4) == 3)
        assert found.tie["head"][2, 3] == pytest.approx(value(source) - value(source, edit))
        at = np.arange(12) == 12 - 1 - 4
        moved = np.concatenate([np.zeros((1, 24)), source_trace.mlp[0]])
        edit = Edit.patch("mlp", 0, at, moved)
        assert found.nie["token"][0, 2, 4] == pytest.approx(value(base, edit) - value(base))
        assert found.y_base == pytest.approx(value(base))
        assert found.y_source == pytest.approx(value(source))


def imported(module):
    """Every module of jaxmed that a module imports, itself or through others; also those that it
    imports inside of functions, or for types alone."""
    seen, left = set(), [module]
    while left:
        name = left.pop()
        spec = importlib.util.find_spec(name)
        if name in seen or spec is None:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(pathlib.Path(spec.origin).read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for other in names:
                package = importlib.util.find_spec(other.rpartition(".")[0] or other)
                if other.startswith("jaxmed.") and package.submodule_search_locations:
                    left.append(other)
    return seen


def test_nothing_of_the_engine_is_imported():
    found = imported("jaxmed.reference.definition")
    assert "jaxmed.question.metrics" in found
    assert "jaxmed.engine.plan" in imported("jaxmed.engine.scan")
    assert not [name for name in found if name.startswith("jaxmed.engine")]


def one_too_early(pair, asked, how=Align.END, response_length=0):
    """Each position takes the source value of the one before."""
    right = EDITED(pair, asked, how, response_length)
    return Edited(right.base, np.maximum(right.source - 1, 0))


def one_too_few(pair, asked, how=Align.END, response_length=0):
    """The first position is left out."""
    right = EDITED(pair, asked, how, response_length)
    return Edited(right.base[1:], right.source[1:])


def not_swapped(self):
    """TIE edits the positions that NIE does."""
    return self


EDITED = positions.edited


@pytest.mark.parametrize(
    "owner, name, wrong",
    [
        (positions, "edited", one_too_early),
        (positions, "edited", one_too_few),
        (positions.Edited, "swapped", not_swapped),
    ],
)
def test_a_fault_in_the_engine_s_alignment_shows(owner, name, wrong, monkeypatch):
    """It is found out twice, and not by the same code."""
    decoder = tiny.decoder("llama")
    question = Question(metrics.LogitDifference(), Positions.PROMPT)
    right = scan.scan_pair(decoder, UNEQUAL, question, ["layer"])
    monkeypatch.setattr(owner, name, wrong)
    reference = define(decoder, UNEQUAL, question, ["layer"])
    assert worst(right, reference) <= 1e-5
    assert worst(scan.scan_pair(decoder, UNEQUAL, question, ["layer"]), reference) > 1e-2


def test_positions_that_do_not_pair_up_are_refused():
    decoder = tiny.decoder("llama")
    question = Question(metrics.LogitDifference(), Positions.LAST, Align.START)
    with pytest.raises(reading.DataError, match="ends do not correspond"):
        definition.define_pair(decoder, UNEQUAL, question, ["layer"])
    question = Question(metrics.LogitDifference(), Positions.PROMPT, Align.SPAN)
    with pytest.raises(reading.DataError, match="no spans"):
        definition.define_pair(decoder, UNEQUAL, question, ["layer"])
