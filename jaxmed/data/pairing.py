"""Pairs made of prompts: where counterfactuals are found."""

import functools
import hashlib
import json
from collections.abc import Callable

from jaxmed.data.chat import as_text
from jaxmed.data.pairs import Pair
from jaxmed.data.prompts import Prompt, answers_of, counterfactuals_of, tokens_of, written
from jaxmed.data.tokens import Encoder
from jaxmed.files.reading import DataError
from models.errors import InputError

COUNTERFACTUALS = ("given", "matched", "length")  # ways to find them


def pair_up(
    prompts: list[Prompt],
    how: str,
    encoder: Encoder | None = None,
    *,
    count: int = 1,
    seed: int = 0,
    on_bad: Callable[[DataError], None] | None = None,
) -> list[Pair]:
    """Makes pairs of prompts and counterfactuals.

    Args:
        prompts: of one set or several, with ids that differ from each other.
        how: where counterfactuals are found. "given": those that the file gives, all of them.
            "matched": benign prompts with the same source and match. "length": benign prompts with
            as many tokens, the chat template's included. For the last two the prompts are those
            that are labelled harmful, and a counterfactual is of the same split, so that no prompt
            does two jobs.
        encoder: makes tokens of text; not needed where the prompts have token ids.
        count: how many counterfactuals a prompt has at most, for "matched" and "length".
        seed: of the choice where there are more; it does not depend on the order of the prompts.
        on_bad: told of a prompt that cannot be used or has no counterfactual, which is then left
            out; by default it is an error.

    Returns:
        The pairs in the prompts' order, with ids "ID/1", "ID/2", ..., where ID is the base prompt's
        and the pairs' `base_id`. They have the base prompt's label, category, source, split and
        answers.

    Raises:
        DataError: as above, and where nothing can be paired.
        InputError: `how` or `count` is not as above.
    """
    if how not in COUNTERFACTUALS:
        raise InputError(f"counterfactuals are {', '.join(COUNTERFACTUALS)}, not '{how}'")
    if count < 1:
        raise InputError(f"a prompt needs at least 1 counterfactual, not {count}")
    _check_ids_differ(prompts)
    encoder = encoder or Encoder()
    read_tokens = functools.partial(tokens_of, encoder=encoder)
    if how == "given":
        bases = [one for one in prompts if one.label == "harmful" or counterfactuals_of(one)]
        find = counterfactuals_of
    else:
        bases = [one for one in prompts if one.label == "harmful"]
        find = _finder(prompts, how, read_tokens, count, seed, on_bad)
    pairs = []
    for base in bases:
        try:
            pairs += _pairs(base, find(base), how, encoder)
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)
    if not pairs:
        raise DataError(f"not one of {len(prompts)} prompts has a counterfactual ('{how}')")
    return pairs


def _check_ids_differ(prompts: list[Prompt]) -> None:
    places = {}
    for prompt in prompts:
        if prompt.id in places:
            raise DataError(
                f"{prompt.where}: id '{prompt.id}' was used before, by {places[prompt.id]}; read "
                "one of the sets under another source"
            )
        places[prompt.id] = prompt.where


def _finder(prompts, how: str, read_tokens, count: int, seed: int, on_bad):
    """A function that gives the benign counterfactuals of a prompt."""
    benign = [prompt for prompt in prompts if prompt.label == "benign"]
    if not benign:
        raise DataError(
            f"counterfactuals are to be benign prompts ('{how}'), but none of the "
            f"{len(prompts)} prompts is benign: read a set of these too"
        )

    def key(prompt: Prompt) -> tuple | None:
        """What a prompt has in common with its counterfactuals; None if it can have none."""
        if how == "length":
            return prompt.split, len(read_tokens(prompt))
        return (prompt.split, prompt.source, prompt.match) if prompt.match else None

    by_key = {}
    for prompt in benign:
        try:
            by_key.setdefault(key(prompt), []).append(prompt)
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)

    def find(base: Prompt) -> list[Prompt]:
        wanted = key(base)
        candidates = by_key.get(wanted, []) if wanted else []
        return sorted(candidates, key=functools.partial(_draw, seed, base.id))[:count]

    return find


def _draw(seed: int, base_id: str, prompt: Prompt) -> bytes:
    """A random number of a prompt, which no other prompt has a part in."""
    return hashlib.sha256(json.dumps([seed, base_id, prompt.id]).encode()).digest()


_NOT_FOUND = {
    "given": "its file gives no counterfactual",
    "matched": "there is no benign prompt of the same source, match and split",
    "length": "there is no benign prompt of as many tokens in the same split",
}


def _pairs(base: Prompt, counterfactuals: list[Prompt], how: str, encoder: Encoder):
    """The pairs of one base prompt."""
    if not counterfactuals:
        raise DataError(f"{base.where}: prompt '{base.id}' cannot be paired: {_NOT_FOUND[how]}")
    prompt, answers = written(base, encoder), answers_of(base, encoder)
    lender = "counterfactual" if how == "given" else "prompt"
    return [
        Pair(
            id=f"{base.id}/{number}",
            prompt_ids=prompt.ids,
            counterfactual_ids=tokens_of(counterfactual, encoder, field=lender),
            label=base.label,
            category=base.category,
            source=base.source,
            split=base.split,
            where=base.where,
            prompt_text=as_text(base.prompt),
            counterfactual_text=as_text(counterfactual.prompt),
            is_chat=encoder.chat or isinstance(base.prompt, tuple),
            written=prompt,
            base_id=base.id,
            harmful_ids=answers["harmful_ids"],
            safe_ids=answers["safe_ids"],
        )
        for number, counterfactual in enumerate(counterfactuals, start=1)
    ]
