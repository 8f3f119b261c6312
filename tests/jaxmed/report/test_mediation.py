"""The report: that it says what was measured, and no more, on fabricated results."""

import base64
import errno
import html.parser
import math
import pathlib
import re
import types

import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxmed.analysis.summary import read_summary
from jaxmed.files.places import PlaceError
from jaxmed.question import sites
from jaxmed.question.effects import Status
from jaxmed.report import mediation, pages
from jaxmed.store import results
from jaxmed.validation import scoring
from tests.jaxmed.fabricated import JOINT, LAYERS, PAIRS, RUN, SIZES, TRUTH, fabricate
from tests.jaxmed.report.told import tell

AUDIT = {
    "threshold": 4.9,
    "hits": 1,
    "estimate": 6.0,
    "bound": 17,
    "uncomputed": 180,
    "confidence": 0.95,
    "candidates": 6,
    "sampled": 6,
    "spearman": 0.625,
}


def screen(made, audit=AUDIT):
    """Makes the first candidates and samples of the audit exact, by layer, and the rest estimates
    that are far too large."""
    status = np.full(SIZES.shape("neuron"), Status.ESTIMATED)
    status.flat[: audit["candidates"] + audit["sampled"]] = Status.EXACT
    for pair, effects in enumerate(zip(*made.effects("neuron"), strict=True)):
        estimates = [np.full(SIZES.shape("neuron"), 99.0)] * 2
        made.write_estimates(pair, *estimates)
        both = [
            np.where(status == Status.EXACT, *side) for side in zip(effects, estimates, strict=True)
        ]
        made.write(pair, "neuron", *both, status)
    made.record({"audit": audit})
    return made


def say(macro, verdict):
    return tell("mediation.sentences.j2", macro, verdict)


class Page(html.parser.HTMLParser):
    """The tags, the text and the image sources of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.images, self.addresses, text = [], [], [], []
        self.handle_data = text.append
        self.feed(pathlib.Path(path).read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", " ".join(text))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes["src"])
        self.addresses += [attributes[name] for name in ("href", "src") if name in attributes]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    made = fabricate(tmp_path_factory.mktemp("planted"))
    made.record({"joint": JOINT, "truth": TRUTH})
    return made


@pytest.fixture(scope="module")
def page(planted):
    return Page(mediation.write(planted.folder))


def test_the_page_carries_its_figures_and_runs_nothing(page, planted):
    assert "script" not in page.tags
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    written = sorted(path.read_bytes() for path in (planted.place.folder / "figures").iterdir())
    shown = sorted(base64.b64decode(image.partition(",")[2]) for image in page.images)
    assert len(shown) == len(sites.GRANULARITIES) + 1  # and the joint path
    assert shown == written and all(picture[1:4] == b"PNG" for picture in shown)


def test_the_page_escapes_the_text_that_it_is_given(page):
    assert "org/<script>alert(1)</script>" in page.text
    assert "pair 3 <script>" in page.text


def test_the_page_says_what_was_asked_and_found(page):
    for words in (
        "prompt: all aligned prompt tokens",
        "Device cpu",
        "Pairs 8",
        "a negative effect means that patching moves the answer towards the safe one",
    ):
        assert words in page.text
    assert "not finished" not in page.text


def test_verdicts_are_measured_and_the_page_shows_all_of_them(page, planted):
    summary = read_summary(planted)
    total = mediation.total_verdict(planted, summary)
    assert (total.negative, total.complies, total.pairs) == (PAIRS, PAIRS, PAIRS)
    assert total.te.value == pytest.approx(planted.te.mean())
    assert say("total", total) in page.text
    tables = mediation.unit_tables(planted, summary, total)
    assert list(tables) == list(sites.GRANULARITIES)
    heads = mediation.largest_verdict(tables["head"], "logits")
    assert heads.same and heads.nie.unit == heads.tie.unit == "L2.h1"
    assert heads.nie.share == pytest.approx(0.9) and "90% of TE" in say("largest", heads)
    neurons = mediation.largest_verdict(tables["neuron"], "logits")
    assert not neurons.same
    assert neurons.nie.unit.startswith("L5.n") and neurons.tie.unit.startswith("L0.n")
    spread = mediation.spread_verdict(tables["neuron"], screened=False)
    assert (spread.units, spread.screened) == (192, False)
    assert spread.significant.nie >= 4 and spread.significant.tie >= 3  # what is planted
    assert f"Neurons: {say('largest', neurons)} {say('spread', spread)}" in page.text
    for granularity in set(tables) - {"token"}:
        verdict = mediation.largest_verdict(tables[granularity], "logits")
        assert say("largest", verdict) in page.text


def test_the_ranking_of_tokens_leaves_out_the_residual_stream(page):
    assert "Layers × tokens: L2 attention, last token has the largest" in page.text
    assert "residual, last token" not in page.text


def test_the_planted_truth_and_the_joint_path_are_shown(page):
    assert "for the contrast: H to B" in page.text
    # The second pick is ordinary: it outranks 6 of the 7 planted neurons, among 185 ordinary ones.
    assert f"greedy joint set {1 - 6 / (7 * 185):.3f} {6 / 7:.3f}" in page.text
    assert re.search(r"1 L5\.n3 ● 95% 0% 2 L1\.n2 96% 31%", page.text)


def test_groups_hold_the_planted_neurons_of_their_members(tmp_path):
    neurons = [[layer, 10 * group + 7] for layer, group in TRUTH["neurons"]]
    truth = {"neurons": neurons, "contrast": "H to B"}
    made = fabricate(tmp_path, {**RUN, "group_size": 10, "truth": truth}, ["neuron"])
    assert scoring.score(made)["neuron"]["max"]["precision_at_k"] == 1
    shown = Page(mediation.write(tmp_path))
    assert "L5.n30 ●" in shown.text and "a group of 10 adjacent neurons" in shown.text


def test_directions_are_named_by_layer_site_and_number(tmp_path):
    made = fabricate(tmp_path, {**RUN, "directions": "sae.npz"}, ["direction"])
    shown = Page(mediation.write(tmp_path))
    name = "L3 residual, direction 12"
    summary = read_summary(made)
    tables = mediation.unit_tables(made, summary, mediation.total_verdict(made, summary))
    verdict = mediation.largest_verdict(tables["direction"], "logits")
    assert verdict.same and verdict.nie.unit == name and say("largest", verdict) in shown.text
    assert "Directions sae.npz" in shown.text
    assert [path.name for path in (made.place.folder / "figures").iterdir()] == ["direction.png"]
    assert mediation.closing_lines(made)[2] == f"Directions: {say('largest', verdict)}"


def test_a_screen_is_told_in_words_and_its_estimates_are_not_ranked(tmp_path):
    made = screen(fabricate(tmp_path, {**RUN, "screen": 3, "truth": TRUTH}, ["neuron"]))
    shown = Page(mediation.write(tmp_path))
    verdict = mediation.screen_verdict(made)
    assert verdict.verdict is mediation.Audited.BOUNDED
    assert (verdict.units, verdict.candidates, verdict.sampled) == (192, 6, 6)
    assert (verdict.bound, verdict.wanted, verdict.threshold, verdict.hits) == (17, 3, 4.9, 1)
    assert (verdict.confidence, verdict.spearman) == (0.95, 0.625)
    assert say("screen", verdict) in shown.text
    assert f"Screen: {say('screen', verdict)}" in mediation.closing_lines(made)
    assert "The 10 largest of 12 (those computed exactly) by" in shown.text
    summary = read_summary(made)
    tables = mediation.unit_tables(made, summary, mediation.total_verdict(made, summary))
    spread = mediation.spread_verdict(tables["neuron"], screened=True)
    assert (spread.units, spread.screened) == (12, True) and say("spread", spread) in shown.text
    assert "99.0" not in re.sub(r"\{.*", "", shown.text)  # no estimate, before the settings
    # Two of the planted neurons were computed; the other five rank below all that were.
    assert scoring.score(made)["neuron"]["max"]["precision_at_k"] == 2 / 7
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"neuron.png", "screen.png"} and len(shown.images) == 2
    assert "neuron 96 1,440 0 0" in shown.text


@pytest.mark.parametrize(
    ("sampled", "left", "verdict"),
    [(186, 0, mediation.Audited.COMPLETE), (0, 186, mediation.Audited.NOT_AUDITED)],
)
def test_a_screen_without_a_bound_says_so(sampled, left, verdict, tmp_path):
    made = fabricate(tmp_path, {**RUN, "screen": 3}, ["neuron"])
    audit = AUDIT | {"sampled": sampled, "uncomputed": left, "bound": left, "spearman": math.nan}
    screen(made, audit)
    found = mediation.screen_verdict(made)
    assert (found.verdict, found.uncomputed, found.units) == (verdict, left, 192)
    said = mediation.closing_lines(made)[-1]
    assert said == f"Screen: {say('screen', found)}" and "nan" not in said


def test_only_what_was_run_is_shown(tmp_path):
    made = fabricate(tmp_path, granularities=["layer"])
    shown = Page(mediation.write(tmp_path))
    assert [path.name for path in (made.place.folder / "figures").iterdir()] == ["layer.png"]
    assert len(shown.images) == 1
    assert "Attention heads" not in shown.text and "planted" not in shown.text
    assert "not finished" not in shown.text


def test_no_share_and_no_interval_where_there_is_none(tmp_path):
    made = fabricate(tmp_path, granularities=["head"], te=-0.05, pairs=1)
    summary = read_summary(made)
    total = mediation.total_verdict(made, summary)
    assert not total.te.has_interval
    heads = mediation.unit_tables(made, summary, total)["head"]
    verdict = mediation.largest_verdict(heads, "logits")
    assert verdict.nie.share is None and verdict.tie.share is None
    assert mediation.spread_verdict(heads, screened=False).significant is None
    text = Page(mediation.write(tmp_path)).text
    assert "too few to test them" in text
    assert "% of TE" not in text and "nan" not in text.lower()


def test_a_run_that_has_measured_nothing_yet_can_be_reported(tmp_path):
    made = results.Results.create(tmp_path, RUN, SIZES, ["a"], ["layer", "neuron"])
    made.write(0, "layer", *np.full((2, LAYERS), math.nan))
    text = Page(mediation.write(tmp_path)).text
    assert mediation.total_verdict(made, read_summary(made)) is None
    assert say("total", None) in text and "not finished" in text
    assert "layer 0 0 6 0 0" in text and "neuron 0 0 0 0 192" in text  # failed, and not run


def test_text_is_shown_only_when_asked_for(planted):
    pairs = [
        types.SimpleNamespace(id=pair_id, prompt_text="<b>secret</b>", counterfactual_text=None)
        for pair_id in planted.pair_ids
    ]
    assert "secret" not in Page(mediation.write(planted.folder, pairs=pairs)).text
    shown = Page(mediation.write(planted.folder, show_text=True, pairs=pairs))
    assert shown.text.count("<b>secret</b>") == PAIRS
    with pytest.raises(ValueError, match="show_text needs pairs"):
        mediation.write(planted.folder, show_text=True)


def test_the_closing_lines_are_measured(planted):
    lines = mediation.closing_lines(planted)
    assert str(planted.folder) in lines[0]
    mean = f"{planted.te.mean():.2f}".replace("-", "−")
    assert f" {mean} [" in lines[1] and f" {PAIRS} of {PAIRS} pairs" in lines[1]
    assert lines[1] == say("total", mediation.total_verdict(planted, read_summary(planted)))
    found = [line.partition(": ")[0] for line in lines[2:9]]
    assert found == [
        "Layers",
        "Modules",
        "Attention heads",
        "Layers × tokens",
        "Neurons",
        "Directions",
        "Joint set",
    ]
    assert lines[6].startswith("Neurons: L5.n")
    joint = mediation.joint_verdict(planted)
    assert (joint.neurons, joint.share_nie, joint.share_tie) == (2, 0.96, 0.31)
    assert joint.sought == 0.9 and not joint.reached
    confirmed = joint.confirmed
    assert (confirmed.share_nie, confirmed.share_tie, confirmed.pairs) == (0.94, 0.3, 3)
    assert lines[8] == f"Joint set: {say('joint', joint)}"
    scores = mediation.scores(planted)
    assert [score.planted for score in scores] == [3, 1, 7]
    best = scores[0].rankings[-1]
    assert (best.title, best.auroc, best.precision_at_k) == ("larger of both", 1, 1)
    assert lines[9:] == [say("score", score) for score in scores]
    assert len(lines) == 12 and "greedy joint set" in lines[11]


def test_an_unfinished_run_says_so(tmp_path):
    made = results.Results.create(tmp_path, RUN, SIZES, ["a", "b"], ["layer"])
    made.write(0, "layer", np.ones(LAYERS), np.ones(LAYERS))
    assert mediation.closing_lines(made)[0] == "Not finished: 1 of 2 pairs are missing."


def test_no_share_where_the_total_effect_may_be_0(tmp_path):
    made = fabricate(tmp_path, granularities=["layer"])
    for pair in range(PAIRS):
        made.write_totals(pair, y_base=3.0, y_source=3.0 + (-1) ** pair * (5.0 + pair))
    assert "% of TE" not in "".join(mediation.closing_lines(made))


def test_a_disk_that_is_full_leaves_no_half_of_a_figure(tmp_path, monkeypatch):
    made = fabricate(tmp_path / "out")
    write = pathlib.Path.write_bytes

    def full(path, data):
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    told = pytest.raises(PlaceError, match=r"out: cannot be written to \(No space left on device\)")
    with told, made.place.written_locally() as folder:
        pages.save(Figure(), folder, "layer")
    assert list((tmp_path / "out" / "figures").iterdir()) == []
