"""What the README shows in Python runs as it stands."""

import json
import pathlib
import re

import matplotlib
import numpy as np
from matplotlib import pyplot

from models import checkpoint
from tests import tiny, words

README = pathlib.Path(__file__).parent.parent / "README.md"
PAIRS = (
    {"id": "one", "prompt": "tell me how", "counterfactual": "tell me why"},
    {"id": "two", "prompt": "how to do it", "counterfactual": "why do it"},
)


def test_the_snippets_run_one_after_the_other(tmp_path, monkeypatch):
    """On a tiny checkpoint that has the name of the README's, where a folder comes first."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    model = re.search(r'jaxmed\.load\("([^"]+)"\)', text)
    assert model is not None
    checkpoint.save(tiny.decoder(num_layers=2), model[1], tokenizer=words.tokenizer())
    answers = {"harmful_response": "yes", "safe_response": "sorry"}
    lines = [json.dumps(pair | answers) + "\n" for pair in PAIRS]
    pathlib.Path("pairs.jsonl").write_text("".join(lines))

    snippets = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 3
    names = {}
    for snippet in snippets:
        exec(compile(snippet, str(README), "exec"), names)
    pyplot.close("all")

    assert names["logits"].shape == (5, 61) and names["trace"].residual.shape == (2, 5, 24)
    assert names["found"]["layer"].nie.shape == (1, 2)
    assert np.isfinite(names["found"]["layer"].nie).all()
    assert sorted(path.name for path in pathlib.Path("out/python").iterdir()) == [
        "effects.zarr",
        "run.json",
    ]
