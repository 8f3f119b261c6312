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
# Labels of the prompts that are counterfactuals of others.
LENDERS = {"matched": ("benign", "overrefusal"), "length": ("benign",)}


class UnpairedError(DataError):
    """A prompt has no counterfactual."""


def pair_up(
    prompts: list[Prompt],
    how: str,
    encoder: Encoder | None = None,
    *,
    count: int = 1,
    most_length_difference: int | None = None,
    seed: int = 0,
    on_bad: Callable[[DataError], None] | None = None,
) -> list[Pair]:
    """Makes pairs of prompts and counterfactuals.

    Args:
        prompts: of one set or several, with ids that differ from each other.
        how: where counterfactuals are found. "given": those that the file gives, all of them.
            "matched": harmless prompts (benign or overrefusal) with the same source and match, as
            XSTest's have that contrast. "length": the benign prompts that are nearest in their
            number of tokens, the chat template's included. For the last two the prompts are those
            that are labelled harmful, and a counterfactual is of the same split, so that no prompt
            does two jobs.
        encoder: makes tokens of text; not needed where the prompts have token ids.
        count: how many counterfactuals a prompt has at most, for "matched" and "length".
        most_length_difference: by how many tokens a counterfactual may differ, for "length"; None
            for any number.
        seed: of the choice where there are more; it does not depend on the order of the prompts.
        on_bad: told of a prompt that cannot be used or has no counterfactual (then the error is an
            `UnpairedError`), which is then left out; by default it is an error.

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
        lenders = [prompt for prompt in prompts if prompt.label in LENDERS[how]]
        if not lenders:
            raise DataError(
                f"counterfactuals are to be {' or '.join(LENDERS[how])} prompts ('{how}'), but "
                f"none of the {len(prompts)} prompts is: read a set of these too"
            )
        if how == "matched":
            find = _matching(lenders, count, seed)
        else:
            find = _nearest(lenders, read_tokens, count, most_length_difference, seed, on_bad)
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


def _matching(lenders: list[Prompt], count: int, seed: int) -> Callable[[Prompt], list[Prompt]]:
    """A function that gives a prompt's counterfactuals of the same split, source and match."""
    by_key: dict[tuple, list[Prompt]] = {}
    for prompt in lenders:
        by_key.setdefault((prompt.split, prompt.source, prompt.match), []).append(prompt)

    def find(base: Prompt) -> list[Prompt]:
        found = by_key.get((base.split, base.source, base.match), []) if base.match else []
        if not found:
            raise _unpaired(base, "there is no harmless prompt of the same source, match and split")
        return sorted(found, key=functools.partial(_draw, seed, base.id))[:count]

    return find


def _nearest(
    lenders: list[Prompt],
    read_tokens: Callable[[Prompt], tuple[int, ...]],
    count: int,
    most: int | None,
    seed: int,
    on_bad: Callable[[DataError], None] | None,
) -> Callable[[Prompt], list[Prompt]]:
    """A function that gives a prompt's counterfactuals of the same split, those that are nearest in
    length first; `most` tokens away, unless that is None."""
    by_length: dict[str, dict[int, list[Prompt]]] = {}
    for prompt in lenders:
        try:
            length = len(read_tokens(prompt))
        except DataError as error:
            if on_bad is None:
                raise
            on_bad(error)
            continue
        by_length.setdefault(prompt.split, {}).setdefault(length, []).append(prompt)

    def find(base: Prompt) -> list[Prompt]:
        own, lengths = len(read_tokens(base)), by_length.get(base.split)
        if not lengths:
            raise _unpaired(base, f"there is no benign prompt in its split, {base.split}")
        found = []
        differences = sorted({abs(length - own) for length in lengths})
        if most is not None and differences[0] > most:
            raise _unpaired(
                base,
                f"the nearest benign prompt of split {base.split} differs by {differences[0]} "
                f"tokens, and {most} are allowed",
            )
        for difference in differences:
            if len(found) >= count or (most is not None and difference > most):
                break
            alike = [
                one for at in {own - difference, own + difference} for one in lengths.get(at, [])
            ]
            found += sorted(alike, key=functools.partial(_draw, seed, base.id))
        return found[:count]

    return find


def _unpaired(base: Prompt, why: str) -> UnpairedError:
    return UnpairedError(f"{base.where}: prompt '{base.id}' cannot be paired: {why}")


def _draw(seed: int, base_id: str, prompt: Prompt) -> bytes:
    """A random number of a prompt, which no other prompt has a part in."""
    return hashlib.sha256(json.dumps([seed, base_id, prompt.id]).encode()).digest()


def _pairs(base: Prompt, counterfactuals: list[Prompt], how: str, encoder: Encoder):
    """The pairs of one base prompt."""
    if not counterfactuals:
        raise _unpaired(base, "its file gives no counterfactual")
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
