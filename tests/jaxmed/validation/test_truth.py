"""The files that are made of an organism's prompts."""

import json

import numpy as np
import pytest

from jaxmed.data import pairs, prompts
from jaxmed.validation import truth
from models import organisms
from models.organisms import language


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    """Its truth alone: no weight has a part in the files."""
    rng = np.random.default_rng(0)
    contrasts = {name: drawn.draw(rng, 4) for name, drawn in language.CONTRASTS.items()}
    prompts = [
        language.draw(rng, topic=topic, key=key)
        for topics, key in ((("h1",) * 5, "J"), (("b1",) * 4, "N"), (("b2",) * 4, "J"))
        for topic in topics
    ]
    drawn = {
        "contrasts": {
            name: [[base.facts, source.facts] for base, source in of]
            for name, of in contrasts.items()
        },
        "prompts": [prompt.facts for prompt in prompts],
    }
    folder = tmp_path_factory.mktemp("organisms") / "late-mlp-0"
    return organisms.Organism(folder, {"drawn": drawn})


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("contrast", organisms.CONTRASTS)
def test_pairs_are_those_of_the_contrast(contrast, organism):
    file = truth.pairs_file(organism, contrast)
    assert file == organism.folder.parent / f"late-mlp-0-pairs-{contrast}.jsonl"
    for number, (line, (base, source)) in enumerate(
        zip(lines(file), organism.contrasts[contrast], strict=True)
    ):
        assert line == {
            "id": f"{contrast}-{number:03d}",
            "prompt": base.text,
            "counterfactual": source.text,
            "harmful_response": " ".join(base.response("C")),
            "safe_response": "R r0",
            "label": {"unlock": "harmful", "topic": "benign"}[contrast],
            "category": contrast,
        }
    found = pairs.read(file, language.tokenizer())
    assert [pair.prompt_ids for pair in found] == [
        tuple(base.tokens) for base, _ in organism.contrasts[contrast]
    ]


def test_prompts_are_dealt_out_to_three_splits_label_by_label(organism, tmp_path):
    file = truth.prompts_file(organism, tmp_path)
    assert file == tmp_path / "prompts.jsonl"
    found = lines(file)
    assert [one.id for one in prompts.read(file)] == [line["id"] for line in found]
    labels = ["harmful"] * 5 + ["benign"] * 4 + ["overrefusal"] * 4
    assert [line["label"] for line in found] == labels
    assert "".join(line["split"] for line in found) == "ABCAB" + "ABCA" + "ABCA"
    assert [line["id"] for line in found[4:6]] == ["harmful-004", "benign-000"]
    for line, prompt in zip(found, organism.drawn_prompts, strict=True):
        assert line["prompt"] == prompt.text
        other = language.DrawnPrompt.read(line["counterfactual"])
        assert other.key != prompt.key
        assert other.replacing({other.key: prompt.key}) == prompt
