"""The demo: that what it names for going on is there."""

import pathlib

from jaxmed.runs import demo
from tests import shared_organism


def test_the_demo_names_model_pairs_prompts_and_edit(tmp_path, tmp_path_factory):
    organism = shared_organism.organism(tmp_path / "decoys", tmp_path_factory)
    asked = demo.DemoSettings(out=str(tmp_path / "out"))
    named = dict(line.split(maxsplit=1) for line in demo._where(asked, organism)[1:])
    model, pairs, prompts = (
        pathlib.Path(named[name].partition(" (")[0]) for name in ("Model:", "Pairs:", "Prompts:")
    )
    assert (model / "config.json").is_file() and pairs.is_file() and prompts.is_file()
    assert named["Edited:"].startswith(f"{tmp_path / 'out' / 'edited'},")
