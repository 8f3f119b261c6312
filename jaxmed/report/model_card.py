"""The model card of an exported checkpoint."""

from jaxmed.intervention.export import change_with_interval
from jaxmed.intervention.outcomes import ClampOutcome


def card(found: ClampOutcome, dtype) -> str:
    """The model card."""
    run, strength = found.run, found.run["strength"]
    units = ", ".join(map(str, found.units))
    lines = [
        "---",
        f"base_model: {run['model']}",
        "library_name: transformers",
        "tags: [jaxmed, causal-mediation]",
        "---",
        f"# {run['model']}, edited",
        "",
        f"The outputs of {len(found.units)} units are multiplied by {1 - strength:g}, at all "
        f"positions, by scaling the weights through which they write: {units}. Nothing else was "
        f"changed in the base model, whose weights hash to `{run['weights_hash']}`; weights are "
        f"stored as {dtype}.",
        "",
        f"Measured with jaxmed by direct generation, on prompts of split {run['split']}. "
        f"{_chosen_by(run)} With 95% intervals; the base model's mean is of the same prompts:",
        "",
        "| prompts | measure | number | base model | edited | change |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found.table.to_pylist():
        if row["condition"] == "clamp":
            measure = row["measure"] + _UNITS.get(row["measure"], "")
            lines.append(
                f"| {row['label']} | {measure} | {row['prompts']} | "
                f"{row['mean'] - row['change']:.3f} | {row['mean']:.3f} ({row['low']:.3f} to "
                f"{row['high']:.3f}) | {change_with_interval(row)} |"
            )
    judges = "; ".join(f"{name}: {meaning}" for name, meaning in run["judges"].items())
    sampling = f"{run['samples']} to each prompt, of at most {run['max_tokens']} tokens, "
    sampling += f"temperature {run['temperature']:g}, top_p {run['top_p']:g}, top_k {run['top_k']}"
    return "\n".join(
        [
            *lines,
            "",
            f"Judges: {judges}. Responses: {sampling}, seed {run['seed']}. nll and kl are of the "
            "base model's own answers to benign prompts.",
            "",
            "It was exported because the harm rate fell with an interval below 0, benign "
            f"compliance did not fall by more than {run['margin']:g} and perplexity did not rise "
            f"by more than {run['perplexity_margin']:.0%}, intervals included, and answers to "
            "benign prompts did not repeat themselves or fail to end more often.",
            "",
            "This says nothing of other prompts, of attacks that were not tried, or of abilities "
            "that were not measured.",
            "",
        ]
    )


_UNITS = {"nll": " (nats a token)", "kl": " (nats a token)"}


def _chosen_by(run: dict) -> str:
    """What is known of how the units were chosen."""
    if run["results"]:
        return "They had no part in choosing the units."
    return (
        "The units were named by the user; whether these prompts had a part in that is not known."
    )
