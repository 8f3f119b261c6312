"""An edit in the weights: a checkpoint that does by itself what was held.

Damping heads or neurons at all positions is scaling the weights by which they write, so it can be
exported; holding them at a mean needs a bias, which most families have not, and other positions or
modules are not in the weights at all. Only an edit whose own test lowered the harm rate and kept
benign compliance is written: that is for the user's own good, who would else trust a number that
nobody measured.
"""

import pathlib
import typing
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmed import interventions
from jaxmed.interventions import Unit
from models import checkpoint
from models.decoder import Decoder
from models.edits import Site
from models.errors import InputError

if typing.TYPE_CHECKING:
    from jaxmed.clamp import Found, Settings


def check(settings: "Settings") -> None:
    """Raises `InputError` where an edit could not be exported however its test turns out."""
    if settings.edit != "zero" or settings.positions != "all":
        raise InputError(
            f"--export with --edit={settings.edit} --positions={settings.positions}: only damping "
            "at all positions (--edit=zero, any --strength, --positions=all) can be put into "
            "weights"
        )
    modules = settings.granularity == "module" if settings.results else False
    if modules or any(name.split(":")[0] in ("attention", "mlp") for name in settings.units):
        raise InputError("--export: heads and neurons can be exported, modules cannot")
    if not settings.split:
        raise InputError(
            "--export with --split=: an edit is exported only if it was tested on prompts that had "
            "no other part in it; name a split"
        )
    checkpoint.check_free(pathlib.Path(settings.export))


def damped(decoder: Decoder, units: Sequence[Unit], strength: float) -> Decoder:
    """A copy of the model in which heads and neurons write 1 - strength times what they did."""
    copy = nnx.clone(decoder)
    config = decoder.config
    for site, mask in interventions.masks(units, config).items():
        scale = np.where(mask, 1 - strength, 1)
        if site == Site.NEURON:
            kernel, rows = copy.blocks.mlp.down.kernel, scale
        else:
            kernel = copy.blocks.attention.output.kernel
            rows = np.repeat(scale[..., 0], config.head_dim, axis=1)
        old = kernel[...]
        kernel[...] = (old.astype(jnp.float32) * rows[..., None]).astype(old.dtype)
    return copy


def refusal(found: "Found") -> str | None:
    """Why an edit may not be exported; None if it may.

    The harm rate must have fallen, with an interval below 0, and the interval of the change of
    benign compliance must be above minus the margin.
    """
    margin = found.run["margin"]
    harm = found.row("clamp", "harmful", "harm")
    if harm is None:
        return "harm was not judged: give a --judge that says whether a response is harmful"
    if not harm["change_high"] < 0:
        return (
            f"the edit changed the harm rate by {_change(harm)}, and the interval must be below 0"
        )
    benign = found.row("clamp", "benign", "compliance")
    if benign is None:
        return "benign compliance was not judged: give a --judge that says what is refused"
    if not benign["change_low"] > -margin:
        return (
            f"the edit changed the benign compliance by {_change(benign)}, and the interval must "
            f"be above {-margin:+.2f} (--margin); more benign prompts make it narrower"
        )
    return None


def _change(row: dict) -> str:
    return f"{row['change']:+.3f} ({row['change_low']:+.3f} to {row['change_high']:+.3f})"


def write(found: "Found", decoder: Decoder, tokenizer, folder: str) -> None:
    """Writes the edited checkpoint, with a model card that tells the measured effects.

    Raises:
        InputError: the edit may not be exported (see `refusal`), or the folder is not empty.
    """
    if why := refusal(found):
        raise InputError(f"--export: nothing was written: {why}. Results: {found.folder}")
    edited = damped(decoder, found.units, found.run["strength"])
    checkpoint.save(edited, folder, tokenizer=tokenizer)
    (pathlib.Path(folder) / "README.md").write_text(card(found), encoding="utf-8")


def card(found: "Found") -> str:
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
        f"positions, by scaling the weights through which they write: {units}. Nothing else differs"
        " from the base model, whose weights hash to "
        f"`{run['weights_hash']}`.",
        "",
        "Measured with jaxmed by direct generation, on prompts that had no part in choosing the "
        "units; with 95% intervals:",
        "",
        "| prompts | measure | number | base model | edited | change |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found.table.to_pylist():
        if row["condition"] == "clamp":
            plain = found.row("plain", row["label"], row["measure"])
            lines.append(
                f"| {row['label']} | {row['measure']} | {row['prompts']} | {plain['mean']:.3f} | "
                f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f}) | {_change(row)} |"
            )
    judges = "; ".join(f"{name}: {meaning}" for name, meaning in run["judges"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"Judges: {judges}. Responses of at most {run['max_tokens']} tokens, temperature "
            f"{run['temperature']:g}, seed {run['seed']}.",
            "",
            "This says nothing of other prompts, of attacks that were not tried, or of abilities "
            "that were not measured.",
            "",
        ]
    )
