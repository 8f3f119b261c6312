"""The report of the settling experiment: that it tells signs in words, says what was not judged,
and shows no more than there is, on fabricated measurements."""

import base64
import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from jaxmed.behaviour.responses import Asked
from jaxmed.data import prompts
from jaxmed.intervention import outcomes
from jaxmed.intervention.outcomes import Held
from jaxmed.intervention.units import Unit
from jaxmed.report import clamp
from jaxmed.runs import clamp as clamp_lib
from models.sites import Site
from tests.jaxmed.report.test_mediation import Page

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


def fabricate(folder, held, rates=RATES, counts=COUNTS, judged=("harm", "refusal"), cuts=0):
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
    return outcomes.ClampOutcome(table, list(held), list(UNITS), controls, dict(RUN), folder, cuts)


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


def test_a_fall_is_told_with_what_falls_beside_it(page, everything):
    row = everything.row("clamp", "harmful", "harm")
    low, high = (f"{row[name]:.2f}".replace("-", "−") for name in ("change_low", "change_high"))
    assert (
        f"Harm rate: 0.80 → 0.10 (change −0.70, 95% interval {low} to {high}): it falls."
        in page.text
    )
    for words in (
        "Held so, these units lower harm: what they do when left alone brings about part of it.",
        "Refusal of harmful prompts: 0.20 → 0.90 (change +0.70,",
        "Compliance with benign prompts: 1.00 → 0.50 (change −0.50,",
        "Compliance with benign prompts falls too: these units are not specific to harm.",
        "Refusal of harmless prompts that look harmful: 0.00 → 0.50",
        "Compliance with creative prompts: 1.00 → 0.50",
        "Judged harmful, answers to benign prompts: 0.00 → 0.00 (change 0.00,",
    ):
        assert words in page.text


def test_what_becomes_of_responses_is_told(page, everything):
    row = everything.row("clamp", "benign", "nll")
    before, after = np.exp(row["mean"] - row["change"]), np.exp(row["mean"])
    assert (
        "Perplexity of the plain model’s own answers to benign prompts:"
        f" {before:.2f} → {after:.2f} (times {after / before:.2f}," in page.text
    )
    assert "Responses that the length limit ended, harmful prompts: 0.45 → 0.93 (" in page.text
    assert "Responses that the length limit ended, benign" not in page.text  # none, in both
    kl = everything.row("clamp", "benign", "kl")["mean"]
    assert f"KL(plain ‖ held) on these answers: {kl:.3f} nats a token (95%" in page.text


def test_controls_are_told(page):
    assert (
        "Harm rate, against random units: 0.10 where the units are held, 0.75 where random ones are"
        " (mean of 2 draws, from 0.70 to 0.80); difference −0.65, 95% interval" in page.text
    )
    assert ": lower than with random units." in page.text
    assert (
        "Random units: 2 draws (of 5 asked: no others were found), of as many units in the same"
        " layers. Median of these units and of the random ones: activation difference between"
        " harmful prompts that are answered and refused 2 and 1.5; output norm 1 and 0.75."
        in page.text
    )
    assert "Harm rate, whole modules of these units held: 0.80 → 0.00 (change −0.80" in page.text


def test_doses_start_at_the_plain_model_and_hold_the_clamp(page):
    assert "Harm rate by number of units: 0.80 (0), 0.60 (1), 0.40 (2), 0.10 (4)." in page.text
    assert "Harm rate by strength: 0.80 (0), 0.50 (0.5), 0.10 (1), 0.00 (2)." in page.text
    assert "benign prompts by number of units: 1.00 (0), 1.00 (1), 0.75 (2), 0.50 (4)" in page.text


def test_single_units_are_sorted_by_what_they_change_and_signs_are_words(page):
    assert (
        "Of 4 units held alone, 2 lower harm, 1 raise it, and of 1 no change can be measured."
        in page.text
    )
    units = ["neuron:3.17 lowers −0.60", "neuron:3.9 lowers −0.30"]
    units += ["neuron:3.30 no measurable change 0.00", "neuron:3.4 raises +0.20"]
    places = [page.text.index(words) for words in units]
    assert places == sorted(places)


def test_all_conditions_are_in_a_table_with_the_mean_over_draws(page):
    assert "random, mean of 2 4 1 0.75 [" in page.text
    assert "module 1 1 0.00 [" in page.text


@pytest.mark.parametrize(
    ("rate", "sign", "role"),
    [
        (
            1.0,
            "it rises.",
            "Held so, these units raise harm: what they do when left alone holds part of it back.",
        ),
        (0.8, "no change that these prompts can show.", None),
    ],
)
def test_a_rise_and_no_change(rate, sign, role, tmp_path):
    rates = RATES | {"clamp": (rate, 1.0)}
    found = fabricate(tmp_path, [PLAIN, CLAMP], rates)
    lines = clamp.closing_lines(found)
    assert lines[0] == f"Results: {tmp_path} (open {tmp_path / 'report.html'})"
    assert lines[1].startswith(f"Harm rate: 0.80 → {rate:.2f} (change ")
    assert lines[1].endswith(f": {sign}")
    assert (role in lines) if role else not any("Held so" in line for line in lines)
    assert not any("not specific" in line for line in lines)
    assert any("No random units were held" in line for line in lines)


def test_compliance_that_falls_alone_is_no_less_told(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP], RATES | {"clamp": (0.8, 0.2)})
    said = "Compliance with benign prompts falls: these units are not specific to harm."
    assert said in clamp.closing_lines(found)


def test_judges_that_know_only_refusals_leave_harm_open(tmp_path):
    held = [PLAIN, CLAMP, *CONTROLS, *DOSES, *ALONE]
    found = fabricate(tmp_path, held, judged=("refusal",))
    text = Page(clamp.write(found, [])).text
    assert "Whether responses are harmful was not judged (judges: sharp)." in text
    assert "Harm rate" not in text and "lower harm" not in text
    assert "Refusal of harmful prompts by strength: 0.20 (0), 0.50 (0.5), 0.90 (1)" in text
    assert "1 lower refusal of harmful prompts, 2 raise it" in text
    assert "Refusal of harmful prompts, against random units: 0.90 where" in text


def test_judges_that_know_only_harm_leave_refusals_open(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP, *ALONE], judged=("harm",))
    text = Page(clamp.write(found, [])).text
    assert "Whether responses refuse was not judged (judges: sharp)." in text
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
    assert "Of 3 responses a judge read only the beginning" in " ".join(clamp.closing_lines(found))


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
    lines = clamp.closing_lines(fabricate(tmp_path, [PLAIN, CLAMP, *CONTROLS], rates))
    assert "That this is more than random units like these bring cannot be shown." in lines
    assert not any("Held so" in line for line in lines)


def test_prompts_without_a_verdict_are_counted(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP, *CONTROLS, *DOSES, *ALONE])
    rows = found.table.to_pylist()
    for row in rows:
        if row["condition"] == "clamp" and row["label"] == "harmful":
            row["prompts"] -= 3
    module = [row for row in rows if row["kind"] not in ("module", "top", "alone")]
    changed = dataclasses.replace(found, table=pa.Table.from_pylist(module, outcomes.ROW))
    text = Page(clamp.write(changed, [])).text
    assert "it falls (over the 37 of 40 prompts with a verdict)." in text
    assert "whole modules of these units held:" not in text and "held alone" not in text


def test_nothing_judged_leaves_no_rates(tmp_path):
    held = [PLAIN, CLAMP, *CONTROLS, *DOSES, *ALONE]
    shown = Page(clamp.write(fabricate(tmp_path, held, judged=()), []))
    assert not shown.images and "Against controls" not in shown.text
    assert "Whether responses are harmful was not judged" in shown.text
    assert "Whether responses refuse was not judged" in shown.text
    assert "Perplexity of the plain model’s own answers" in shown.text


def test_a_change_by_rounding_is_none(tmp_path):
    found = fabricate(tmp_path, [PLAIN, CLAMP])
    rows = found.table.to_pylist()
    for row in rows:
        if row["measure"] == "nll":
            row |= {"change": 3e-8, "change_low": 2e-8, "change_high": 4e-8}
    changed = dataclasses.replace(found, table=pa.Table.from_pylist(rows, outcomes.ROW))
    assert any(
        line.startswith("Perplexity")
        and line.endswith(
            "(times 1.00, 95% interval 1.00 to 1.00): no change that these prompts can show."
        )
        for line in clamp.closing_lines(changed)
    )
