"""The report of the settling experiment: that it tells signs in words, says what was not judged,
and shows no more than there is, on fabricated measurements."""

import base64
import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from jaxmed.behaviour.judges.protocol import Doubt
from jaxmed.behaviour.responses import Asked
from jaxmed.data import prompts
from jaxmed.intervention import outcomes
from jaxmed.intervention.outcomes import Held
from jaxmed.intervention.units import Unit
from jaxmed.report import clamp
from jaxmed.report.clamp import Move
from jaxmed.report.figures import clamp as figures
from jaxmed.report.numbers import Measured
from jaxmed.runs import clamp as clamp_lib
from models.sites import Site
from tests.jaxmed.report.test_mediation import Page
from tests.jaxmed.report.told import tell

HARM, REFUSAL, COMPLIANCE = clamp.QUESTIONS[:3]
UNITS = tuple(Unit(Site.NEURON, 3, index) for index in (17, 4, 30, 9))
RANDOM = tuple(Unit(Site.NEURON, 3, index) for index in (1, 2, 3, 5))
PLAIN, CLAMP = Held("plain", "plain"), Held("clamp", "clamp", UNITS, 1.0)
CONTROLS = [
    Held("random 1", "random", RANDOM, 1.0),
    Held("random 2", "random", RANDOM[::-1], 1.0),
    Held("module", "module", (Unit(Site.MLP, 3),), 1.0),
]
DOSES = [
    Held("top 1", "top", UNITS[:1], 1.0),
    Held("top 2", "top", UNITS[:2], 1.0),
    Held("strength 0.5", "strength", UNITS, 0.5),
    Held("strength 2", "strength", UNITS, 2.0),
]
ALONE = [Held(f"only {unit}", "alone", (unit,), 1.0) for unit in UNITS]
RUN = {
    **dataclasses.asdict(clamp_lib.ClampSettings("org/<b>model", ("prompts.jsonl",), "out")),
    "results": "sweep",
    "judges": {"sharp": "says <b>both</b>"},
    "device": "1 x cpu",
}
COUNTS = {"harmful": 40, "benign": 24, "creative": 12, "overrefusal": 16}
# Of each condition the rates of harm (harmful prompts) and compliance (benign prompts).
RATES = {
    "plain": (0.8, 1.0),
    "clamp": (0.1, 0.5),
    "random 1": (0.8, 1.0),
    "random 2": (0.7, 1.0),
    "module": (0.0, 0.0),
    "top 1": (0.6, 1.0),
    "top 2": (0.4, 0.75),
    "strength 0.5": (0.5, 1.0),
    "strength 2": (0.0, 0.25),
    "only neuron:3.17": (0.2, 1.0),
    "only neuron:3.4": (1.0, 1.0),
    "only neuron:3.30": (0.8, 0.5),
    "only neuron:3.9": (0.5, 1.0),
}


def first(rate, count):
    """1 for the first share of prompts, else 0: what a low rate answers, a high one answers too."""
    return (np.arange(count) < round(rate * count)).astype(float)


def fabricate(
    folder,
    held,
    rates=RATES,
    counts=COUNTS,
    judged=("harm", "refusal"),
    cuts=0,
    doubts=(),
    only_think=0,
):
    """What an experiment with these rates finds."""
    rng = np.random.default_rng(0)
    labels = [label for label, count in counts.items() for _ in range(count)]
    asked = [
        Asked(prompts.Prompt(id=f"p{place}", prompt=None, label=label, split="C"), (1, 2))
        for place, label in enumerate(labels)
    ]
    labels = np.array(labels)
    measured = {}
    for each in held:
        harm, compliance = rates[each.name]
        harmful, complied = np.zeros(len(labels)), np.zeros(len(labels))
        for label, count in counts.items():
            here = labels == label
            complied[here] = first(harm if label == "harmful" else compliance, count)
            harmful[here] = complied[here] * (label == "harmful")
        distance = float(each.name != "plain") * each.strength
        values = {
            "harm": harmful if "harm" in judged else np.nan * harmful,
            "refusal": 1 - complied if "refusal" in judged else np.nan * complied,
            "compliance": complied if "refusal" in judged else np.nan * complied,
            "repetition": rng.uniform(0, 0.2, len(labels)) + 0.2 * distance,
            "unfinished": first(0.2 + 0.2 * distance, len(labels)),
            "tokens": rng.integers(10, 30, len(labels)) + 20.0 * distance,
            "nll": 0.3 + 0.5 * distance + rng.uniform(0, 0.1, len(labels)),
            "kl": 0.4 * distance * rng.uniform(0.5, 1.5, len(labels)),
        }
        for name in ("nll", "kl"):
            values[name][labels != "benign"] = np.nan
        measured |= {(each.name, name): value for name, value in values.items()}
    table = outcomes.summarise(held, asked, measured)
    drawn = [each.units for each in held if each.kind == "random"]
    controls = {
        "groups": {"harmful": ["h"] * 80, "benign": ["b"] * 60, "refused": ["r"] * 30},
        "contrast": ["complied", "refused"] if drawn else [],
        "units": traits(UNITS, 2.0) if drawn else [],
        "draws": [traits(units, 1.5) for units in drawn],
    }
    return outcomes.ClampOutcome(
        table,
        list(held),
        list(UNITS),
        controls,
        dict(RUN),
        folder,
        cuts,
        list(doubts),
        only_think,
    )


def traits(units, size):
    return [{"unit": str(unit), "difference": size, "norm": size / 2} for unit in units]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    held = [PLAIN, CLAMP, *CONTROLS, *DOSES, *ALONE]
    return fabricate(tmp_path_factory.mktemp("everything"), held)


@pytest.fixture(scope="module")
def page(everything):
    return Page(clamp.write(everything, []))


def test_the_page_carries_its_figures_and_runs_nothing(page, everything):
    assert "script" not in page.tags
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    written = {path.name: path.read_bytes() for path in (everything.folder / "figures").iterdir()}
    assert set(written) == {"conditions.png", "doses.png", "alone.png"}
    shown = [base64.b64decode(image.partition(",")[2]) for image in page.images]
    assert sorted(shown) == sorted(written.values())
    assert all(picture[1:4] == b"PNG" for picture in shown)


def test_the_page_says_what_was_held_on_what_and_who_judged(page):
    for words in (
        "Held neuron:3.17, neuron:3.4, neuron:3.30, neuron:3.9; ranked by sweep (--by=max)",
        "their mean over harmful prompts that the plain model refuses (--edit=refused), measured on"
        " 30 prompts of"
        " the splits other than C",
        "40 harmful prompts, 24 benign prompts, 16 harmless prompts that look harmful, 12 creative"
        " prompts; split C",
        "one to each prompt, the likeliest token each time, at most 128 tokens",
    ):
        assert words in page.text


def test_names_are_escaped(page):
    assert "b" not in page.tags
    assert "Units held still in org/<b>model" in page.text
    assert "Judge sharp says <b>both</b>" in page.text


def of_kind(verdicts, kind):
    return [verdict for verdict in verdicts if isinstance(verdict, kind)]


def moved(found):
    """How the answer to each question changes."""
    return {verdict.question: verdict for verdict in of_kind(clamp.answers(found), clamp.Moved)}


def say(verdict):
    return tell("clamp.sentences.j2", verdict.sentence, verdict)


def test_the_page_and_the_closing_lines_tell_every_verdict(page, everything):
    shown = [*clamp.answers(everything), *clamp.controls(everything)]
    assert clamp.closing_lines(everything)[1:] == list(map(say, shown))
    shown += [*clamp.dose_curves(everything), clamp.alone_verdict(everything)]
    for verdict in shown:
        assert say(verdict) in page.text


def test_a_fall_is_told_with_what_falls_beside_it(page, everything):
    row = everything.row("clamp", "harmful", "harm")
    found = moved(everything)
    assert list(found) == list(clamp.QUESTIONS)
    change = found[HARM].change
    assert (change.before, change.after, change.change.value) == (0.8, 0.1, -0.7)
    assert change.change.low == pytest.approx(row["change_low"])
    assert change.change.high == pytest.approx(row["change_high"])
    assert change.verdict is Move.FALLS
    expected = {
        REFUSAL: (0.2, 0.9, Move.RISES),
        COMPLIANCE: (1.0, 0.5, Move.FALLS),
        ("overrefusal", "refusal"): (0.0, 0.5, Move.RISES),
        ("creative", "compliance"): (1.0, 0.5, Move.FALLS),
        ("benign", "harm"): (0.0, 0.0, Move.NONE_SHOWN),
    }
    for question, told in expected.items():
        each = found[question].change
        assert (each.before, each.after, each.verdict) == told
    answers = clamp.answers(everything)
    assert answers[1] == clamp.RoleVerdict(Move.FALLS, theirs=True)  # right after harm
    assert clamp.NotSpecific(too=True) in answers
    low, high = (f"{row[name]:.2f}".replace("-", "−") for name in ("change_low", "change_high"))
    for words in (
        f"Harm rate: 0.80 → 0.10 (change −0.70, 95% interval {low} to {high}): it falls",
        "(change +0.70,",
        "(change 0.00,",  # without a sign
        "lower harm",
        "falls too",
    ):
        assert words in page.text


def test_what_becomes_of_responses_is_told(page, everything):
    row = everything.row("clamp", "benign", "nll")
    before, after = np.exp(row["mean"] - row["change"]), np.exp(row["mean"])
    answers = clamp.answers(everything)
    [perplexity] = of_kind(answers, clamp.Perplexity)
    assert perplexity.before == pytest.approx(before) and perplexity.after == pytest.approx(after)
    assert perplexity.times.value == pytest.approx(after / before)
    assert perplexity.verdict is Move.RISES
    low, high = perplexity.times.low, perplexity.times.high
    times = f"{after / before:.2f} times as high (95% interval {low:.2f} to {high:.2f} times)"
    assert f" {before:.2f} → {after:.2f}, {times}: it rises" in page.text
    changed = of_kind(answers, clamp.ResponsesChanged)
    unfinished = [each for each in changed if each.measure == "unfinished"]
    assert [each.label for each in unfinished] == ["harmful"]  # benign ones: none, in both
    assert (unfinished[0].change.before, unfinished[0].change.after) == (0.45, 0.925)
    [divergence] = of_kind(answers, clamp.Divergence)
    kl = everything.row("clamp", "benign", "kl")
    assert divergence.nats.value == pytest.approx(kl["mean"])
    assert divergence.nats.low == pytest.approx(kl["low"])
    assert f": {kl['mean']:.3f} nats a token (95%" in page.text


def test_controls_are_told(page, everything):
    controls = clamp.controls(everything)
    harm, compliance = of_kind(controls, clamp.AgainstRandom)
    assert (harm.question, compliance.question) == (HARM, COMPLIANCE)
    assert (harm.held, harm.random, harm.draws) == (0.1, 0.75, [0.8, 0.7])
    assert harm.difference.value == -0.65 and harm.verdict is Move.FALLS
    assert harm.difference.low < -0.65 < harm.difference.high < 0
    assert controls[0] == clamp.Likeness(
        draws=2,
        asked=5,
        contrast="complied",
        difference=clamp.Medians(2.0, 1.5),
        norm=clamp.Medians(1.0, 0.75),
    )
    for words in ("mean of 2 draws, from 0.70 to 0.80", "2 and 1.5; output norm 1 and 0.75"):
        assert words in page.text
    modules = {verdict.question: verdict.change for verdict in of_kind(controls, clamp.ModulesHeld)}
    assert (modules[HARM].before, modules[HARM].after) == (0.8, 0.0)
    assert modules[HARM].change.value == -0.8 and modules[HARM].verdict is Move.FALLS


def test_doses_start_at_the_plain_model_and_hold_the_clamp(page, everything):
    curves = {(each.question, each.kind): each.points for each in clamp.dose_curves(everything)}
    assert curves == {
        (HARM, "top"): [(0, 0.8), (1, 0.6), (2, 0.4), (4, 0.1)],
        (COMPLIANCE, "top"): [(0, 1.0), (1, 1.0), (2, 0.75), (4, 0.5)],
        (HARM, "strength"): [(0, 0.8), (0.5, 0.5), (1, 0.1), (2, 0.0)],
        (COMPLIANCE, "strength"): [(0, 1.0), (0.5, 1.0), (1, 0.5), (2, 0.25)],
    }
    assert "by strength: 0.80 (0), 0.50 (0.5), 0.10 (1), 0.00 (2)" in page.text


def test_rates_that_are_the_same_are_both_seen():
    """At a dose that ends harm and compliance alike."""
    zero, half = Measured(0.0, 0.0, 0.1), Measured(0.5, 0.4, 0.6)
    curves = {measure: [(0, half), (1, zero), (2, zero)] for measure in ("harm", "compliance")}
    figure = figures.draw_doses({"number of units": curves}, {name: name for name in curves})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    axes = figure.axes[0]
    for place, rate in ((1, 0.0), (0.5, 0.25), (2, 0.0)):
        x, y = map(round, axes.transData.transform((place, rate)))
        around = pixels[::-1][y - 8 : y + 9, x - 8 : x + 9]
        for colour in ("#d55e00", "#0072b2"):
            wanted = np.array([int(colour[part : part + 2], 16) for part in (1, 3, 5)])
            assert (np.abs(around - wanted).max(axis=-1) < 60).sum() > 8, (place, colour)


def test_single_units_are_sorted_by_what_they_change_and_signs_are_words(page, everything):
    found = clamp.alone_verdict(everything)
    assert found == clamp.AloneVerdict(HARM, units=4, lowering=2, raising=1)
    units = ["neuron:3.17 lowers −0.60", "neuron:3.9 lowers −0.30"]
    units += ["neuron:3.30 no measurable change 0.00", "neuron:3.4 raises +0.20"]
    places = [page.text.index(words) for words in units]
    assert places == sorted(places)


def test_all_conditions_are_in_a_table_with_the_mean_over_draws(page):
    assert "random, mean of 2 4 1 0.75 [" in page.text
    assert "module 1 1 0.00 [" in page.text


@pytest.mark.parametrize(("rate", "move"), [(1.0, Move.RISES), (0.8, Move.NONE_SHOWN)])
def test_a_rise_and_no_change(rate, move, tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP], RATES | {"clamp": (rate, 1.0)})
    answers = clamp.answers(found)
    assert answers[0].question == HARM
    change = answers[0].change
    assert (change.before, change.after, change.verdict) == (0.8, rate, move)
    roles = [clamp.RoleVerdict(Move.RISES, theirs=True)] if move is Move.RISES else []
    assert of_kind(answers, clamp.RoleVerdict) == roles
    assert not of_kind(answers, clamp.NotSpecific)
    assert answers[-1] == clamp.NoRandomUnits(asked=True)
    lines = clamp.closing_lines(found)
    assert lines[0] == f"Results: {tmp_path} (open {tmp_path / 'report.html'})"
    assert lines[1:] == list(map(say, answers))
    assert lines[1].startswith(f"Harm rate: 0.80 → {rate:.2f} (change ")
    assert ("raise harm" in " ".join(lines)) == (move is Move.RISES)


def test_an_export_is_told_where_it_is(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP])
    assert not any(line.startswith("Exported") for line in clamp.closing_lines(found))
    exported = dataclasses.replace(found, run=found.run | {"export": "out/edited"})
    last = clamp.closing_lines(exported)[-1]
    assert last == "Exported: out/edited has the edit in its weights, and transformers loads it"


def test_compliance_that_falls_alone_is_no_less_told(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP], RATES | {"clamp": (0.8, 0.2)})
    verdict = clamp.NotSpecific(too=False)
    assert verdict in clamp.answers(found) and say(verdict) in clamp.closing_lines(found)


def test_judges_that_know_only_refusals_leave_harm_open(tmp_path):
    held = [PLAIN, CLAMP, *CONTROLS, *DOSES, *ALONE]
    found = fabricate(tmp_path, held, judged=("refusal",))
    by_strength = (REFUSAL, "strength")
    text = Page(clamp.write(found, [])).text
    answers = clamp.answers(found)
    assert answers[0] == clamp.NotJudged("harm", ("sharp",)) and say(answers[0]) in text
    assert len(of_kind(answers, clamp.NotJudged)) == 1
    assert HARM not in moved(found) and not of_kind(answers, clamp.RoleVerdict)
    assert "Harm rate" not in text and "lower harm" not in text
    [curve] = [
        each for each in clamp.dose_curves(found) if (each.question, each.kind) == by_strength
    ]
    assert curve.points[:3] == [(0, 0.2), (0.5, 0.5), (1, 0.9)] and say(curve) in text
    alone = clamp.alone_verdict(found)
    assert alone == clamp.AloneVerdict(REFUSAL, units=4, lowering=1, raising=2)
    assert say(alone) in text
    against = of_kind(clamp.controls(found), clamp.AgainstRandom)[0]
    assert (against.question, against.held) == (REFUSAL, 0.9) and say(against) in text


def test_judges_that_know_only_harm_leave_refusals_open(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP, *ALONE], judged=("harm",))
    text = Page(clamp.write(found, [])).text
    assert of_kind(clamp.answers(found), clamp.NotJudged) == [
        clamp.NotJudged("refusal", ("sharp",))
    ]
    assert say(clamp.NotJudged("refusal", ("sharp",))) in text
    assert REFUSAL not in moved(found) and COMPLIANCE not in moved(found)
    assert "Harm rate: 0.80 → 0.10" in text and "Refusal of" not in text
    assert "nan" not in text.lower().replace("nance", "")


def test_only_what_was_run_is_shown(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP], counts={"harmful": 10, "benign": 10})
    shown = Page(clamp.write(found, []))
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["conditions.png"]
    titles = ("Against controls", "More and less of it", "Single units", "Texts")
    assert not any(title in shown.text for title in titles)
    assert "creative" not in shown.text and "look harmful" not in shown.text
    assert "A judge read" not in shown.text


def test_responses_that_were_cut_are_counted(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP], cuts=3)
    verdict = clamp.CutResponses(3)
    assert verdict in clamp.answers(found) and say(verdict) in clamp.closing_lines(found)
    uncut = fabricate(tmp_path, [PLAIN, CLAMP])
    assert not of_kind(clamp.answers(uncut), clamp.CutResponses)


def test_doubtful_judges_are_told(tmp_path):
    doubts = [Doubt("harmful", 3, 1, 40), Doubt("refused", 0, 0, 40)]
    found = fabricate(tmp_path, [PLAIN, CLAMP], doubts=doubts)
    verdict = clamp.Doubted(doubts[0])
    assert of_kind(clamp.answers(found), clamp.Doubted) == [verdict]
    assert say(verdict) in clamp.closing_lines(found)
    assert Page(clamp.write(found, [])).text.count("No verdict on whether 3 of 40 responses") == 1


def test_responses_that_never_came_to_an_answer_are_counted(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP], only_think=2)
    verdict = clamp.OnlyThoughts(2)
    assert verdict in clamp.answers(found) and say(verdict) in clamp.closing_lines(found)
    assert not of_kind(clamp.answers(fabricate(tmp_path, [PLAIN, CLAMP])), clamp.OnlyThoughts)


def test_text_is_shown_escaped_and_only_when_asked_for(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP])
    texts = [
        {
            "id": "<i>p0</i>",
            "label": "harmful",
            "prompt": "<b>secret</b>",
            "responses": [("plain", "<script>one</script>"), ("clamp", "two & three")],
        }
    ]
    assert "secret" not in Page(clamp.write(found, [])).text
    shown = Page(clamp.write(found, texts))
    for words in ("<i>p0</i>", "<b>secret</b>", "<script>one</script>", "two & three"):
        assert shown.text.count(words) == 1
    assert {"script", "i"}.isdisjoint(shown.tags)
    assert shown.tags.count("details") == 2  # the text and the settings


def test_many_units_are_counted_and_not_all_named(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP])
    units = [Unit(Site.NEURON, 1, index) for index in range(1200)]
    text = Page(clamp.write(dataclasses.replace(found, units=units), [])).text
    assert "neuron:1.23, … (1,200 in all, see the settings)" in text and "neuron:1.24," not in text


def test_a_fall_that_random_units_bring_as_well_is_not_theirs(tmp_path):
    rates = RATES | {"random 1": (0.1, 1.0), "random 2": (0.1, 1.0)}
    found = fabricate(tmp_path, [PLAIN, CLAMP, *CONTROLS], rates)
    verdict = clamp.RoleVerdict(Move.FALLS, theirs=False)
    assert of_kind(clamp.answers(found), clamp.RoleVerdict) == [verdict]
    lines = clamp.closing_lines(found)
    assert say(verdict) in lines and not any("Held so" in line for line in lines)


def test_prompts_without_a_verdict_are_counted(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP, *CONTROLS, *DOSES, *ALONE])
    rows = found.table.to_pylist()
    for row in rows:
        if row["condition"] == "clamp" and row["label"] == "harmful":
            row["prompts"] -= 3
    module = [row for row in rows if row["kind"] not in ("module", "top", "alone")]
    changed = dataclasses.replace(found, table=pa.Table.from_pylist(module, outcomes.ROW))
    text = Page(clamp.write(changed, [])).text
    verdict = moved(changed)[HARM]
    assert (verdict.judged, verdict.prompts) == (37, 40)
    assert "37 of 40 prompts" in say(verdict) and say(verdict) in text
    assert (moved(found)[HARM].judged, moved(found)[HARM].prompts) == (40, 40)
    assert "whole modules of these units held:" not in text and "held alone" not in text


def test_nothing_judged_leaves_no_rates(tmp_path):
    held = [PLAIN, CLAMP, *CONTROLS, *DOSES, *ALONE]
    shown = Page(clamp.write(fabricate(tmp_path, held, judged=()), []))
    assert not shown.images and "Against controls" not in shown.text
    for measure in ("harm", "refusal"):
        assert say(clamp.NotJudged(measure, ["sharp"])) in shown.text
    assert "Perplexity of the plain model’s own answers" in shown.text


def with_rows(found, changes):
    """What was found, with other changes of these measures on benign prompts."""
    rows = found.table.to_pylist()
    for row in rows:
        if row["label"] == "benign" and row["condition"] == "clamp" and row["measure"] in changes:
            low, high = changes[row["measure"]]
            row |= {"change": (low + high) / 2, "change_low": low, "change_high": high}
    return dataclasses.replace(found, table=pa.Table.from_pylist(rows, outcomes.ROW))


SAME = (-0.01, 0.01)


@pytest.mark.parametrize(
    ("nll", "repetition", "unfinished", "times", "worse"),
    [
        ((4.5, 4.7), SAME, SAME, np.exp(4.6), []),
        ((4.5, 4.7), (0.1, 0.2), SAME, np.exp(4.6), ["repetition"]),
        (SAME, (0.1, 0.2), (0.1, 0.3), None, ["repetition", "unfinished"]),
    ],
)
def test_a_model_that_no_longer_writes_as_before_is_told_though_no_rate_changes(
    nll, repetition, unfinished, times, worse, tmp_path
):
    found = fabricate(tmp_path, [PLAIN, CLAMP], RATES | {"clamp": RATES["plain"]})
    found = with_rows(found, {"nll": nll, "repetition": repetition, "unfinished": unfinished})
    assert moved(found)[HARM].change.verdict is Move.NONE_SHOWN
    [verdict] = of_kind(clamp.answers(found), clamp.WritesOtherwise)
    assert verdict.times == (None if times is None else pytest.approx(times))
    assert verdict.worse == worse
    assert say(verdict) in clamp.closing_lines(found)
    said = say(verdict)
    assert "no longer writes as before" in said and ("99 times" in said) == (times is not None)
    assert ("repeat themselves" in said, "end by themselves" in said) == tuple(
        name in worse for name in ("repetition", "unfinished")
    )


@pytest.mark.parametrize("nll", [SAME, (-0.4, -0.2), (0.02, 0.2), (0.05, 0.09)])
def test_a_model_that_writes_as_before_is_not_called_broken(nll, tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP])
    found = with_rows(found, {"nll": nll, "repetition": (-0.2, -0.1), "unfinished": SAME})
    assert not of_kind(clamp.answers(found), clamp.WritesOtherwise)


def test_a_change_by_rounding_is_none(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP])
    rows = found.table.to_pylist()
    for row in rows:
        if row["measure"] == "nll":
            row |= {"change": 3e-8, "change_low": 2e-8, "change_high": 4e-8}
    changed = dataclasses.replace(found, table=pa.Table.from_pylist(rows, outcomes.ROW))
    [perplexity] = of_kind(clamp.answers(changed), clamp.Perplexity)
    assert perplexity.verdict is Move.NONE_SHOWN
    assert "1.00 times as high (95% interval 1.00 to 1.00 times)" in say(perplexity)
    assert say(perplexity) in clamp.closing_lines(changed)
