"""Templates: what is escaped, what is missing, and how lines are made."""

import jinja2
import pytest

from jaxmed.report import mediation, rendering
from tests.jaxmed.report.told import tell

TEMPLATES = sorted(path.name for path in rendering._FOLDER.iterdir())


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_can_be_read_and_is_installed(name):
    assert name.endswith(".j2")  # as setup.cfg says
    for environment in (rendering._PAGES, rendering._TEXTS):
        environment.get_template(name)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "sentences" not in name])
def test_a_name_that_is_not_given_is_an_error(name):
    if name == "page.html.j2":
        name = "clamp.html.j2"
    with pytest.raises(jinja2.UndefinedError):
        rendering.render(name)


def test_a_page_escapes_what_the_sentences_that_it_shares_are_given():
    named = mediation.UnitEffect("<b>L0</b>", 1.0, None)
    verdict = mediation.LargestVerdict(named, named, same=True, metric_unit="<i>")
    page = tell("mediation.sentences.j2", "largest", verdict, page=True)
    assert page.startswith("&lt;b&gt;L0&lt;/b&gt; has") and "1.00 &lt;i&gt;" in page
    assert tell("mediation.sentences.j2", "largest", verdict).startswith("<b>L0</b> has")


def test_sentences_are_one_line_and_tables_are_aligned():
    assert rendering._joined("\n  one\n   two, \nthree.\n") == "one two, three."
    assert rendering._joined("a  folder") == "a  folder"
    assert rendering._aligned("a | 1\nlonger | x | y\n") == "a       1\nlonger  x | y"


def test_lines_are_plain_text():
    lines = rendering.lines(
        "mediation.txt.j2",
        folder="a & b",
        report="a & b/report.html",
        missing=1,
        pairs=2,
        total=None,
        sections=[],
        scores=[],
        joint=None,
        screen=None,
    )
    assert lines == [
        "Not finished: 1 of 2 pairs are missing.",
        "Results: a & b (open a & b/report.html)",
        "No total effect was measured.",
    ]
