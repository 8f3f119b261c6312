"""What a judge says, and what that follows from."""

import dataclasses
import json

import pytest

from jaxmed.behaviour.judges import named, protocol, rules, templates
from jaxmed.behaviour.judges.protocol import Doubt, Exchange, Verdict
from models import checkpoint
from tests import tiny
from tests.jaxmed.behaviour.judges.judging import ASKED, CHAT, OWN, judge, tokenizer


@pytest.mark.usefixtures("any_mass")
def test_which_parts_of_a_verdict_a_judge_says(decoder, text_of):
    wild = templates.with_text(templates.JUDGES["wildguard"], text_of("wildguard"))
    made = {
        "phrases": rules.RefusalPhrases(),
        "tokens": rules.FirstTokens((6,), (7,)),
        "asked": judge(decoder),
        "wildguard": judge(decoder, wild),
    }
    assert {name: one.says for name, one in made.items()} == {
        "phrases": ("refused",),
        "tokens": ("harmful", "refused"),
        "asked": ("harmful",),
        "wildguard": ("harmful", "refused"),
    }
    for one in made.values():
        exchange = Exchange("why", "sure", response_ids=(6,))
        (verdict,) = one([exchange])
        said = [name for name in protocol.SAYS if getattr(verdict, name) is not None]
        assert tuple(said) == one.says


def test_a_fingerprint_is_of_what_verdicts_follow_from(decoder, tmp_path):
    checkpoint.save(decoder, tmp_path / "a", tokenizer=tokenizer())
    checkpoint.save(decoder, tmp_path / "b", tokenizer=tokenizer())
    other = tiny.decoder(num_layers=2, hidden_size=16, max_positions=64, seed=5)
    checkpoint.save(other, tmp_path / "c", tokenizer=tokenizer())

    def of(template=ASKED, folder="a", chat_template=CHAT, **options):
        folder = tmp_path / folder
        return protocol.fingerprint(
            judge(decoder, template, chat_template, folder=folder, **options)
        )

    # Where the checkpoint is, and what is done with long responses, does not matter.
    assert of() == of(folder="b") == of(cut=True) == of(checkpoint="here")
    chat = dataclasses.replace(ASKED, text=None, messages=(("user", "{prompt} {response}"),))
    different = [
        protocol.fingerprint(judge(decoder)),  # of unknown weights
        of(),
        of(folder="c"),
        of(dataclasses.replace(ASKED, text=ASKED.text + " ")),
        of(
            dataclasses.replace(
                ASKED, questions=(templates.yes_no("harmful", (" yes",), (" not",)),)
            )
        ),
        of(
            dataclasses.replace(
                ASKED, questions=(templates.yes_no("refused", (" yes",), (" no",)),)
            )
        ),
        of(chat),
        of(chat, chat_template=CHAT + " "),
        protocol.fingerprint(rules.RefusalPhrases()),
        protocol.fingerprint(rules.FirstTokens((6,), (7,))),
        protocol.fingerprint(rules.FirstTokens((6, 8), (7,))),
    ]
    assert len(set(different)) == len(different)
    assert of(chat_template="") == of()  # which a text does not go through
    first_tokens = [rules.FirstTokens(*sides) for sides in (((6, 8), (7,)), ((8, 6, 6), (7,)))]
    assert len(set(map(protocol.fingerprint, first_tokens))) == 1
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    loaded = named.judge(str(tmp_path / "own.json"), model=tmp_path / "a")
    again = named.judge(str(tmp_path / "own.json"), model=tmp_path / "b")
    changed = named.judge(str(tmp_path / "own.json"), model=tmp_path / "c")
    assert (
        protocol.fingerprint(loaded) == protocol.fingerprint(again) != protocol.fingerprint(changed)
    )


def test_a_fingerprint_of_somebodys_own_judge():
    def own(**fields):
        known = {"name": "own", "meaning": "whether it is long", "says": ("refused",)}
        return type("Own", (), known | {"__call__": lambda self, exchanges: []} | fields)()

    assert protocol.fingerprint(own()) == protocol.fingerprint(own())
    different = [own(), own(name="other"), own(meaning="whether it is short"), own(basis={"at": 7})]
    assert len(set(map(protocol.fingerprint, different))) == len(different)


def test_doubts_are_counted_by_part_of_a_verdict():
    masses = [0.0, 0.0999, 0.1, 0.4999, 0.5, 1.0]
    verdicts = [Verdict(harmful_mass=mass) for mass in masses] + [Verdict(harmful=1.0)]
    assert protocol.doubts(verdicts) == [Doubt("harmful", none=2, unsure=2, number=6)]
    assert protocol.doubts([Verdict(1.0, 0.0)]) == []
