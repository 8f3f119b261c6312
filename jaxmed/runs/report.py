"""The report of a results folder, written again from what the folder holds."""

import dataclasses

from jaxmed.data import pairs as pairs_lib
from jaxmed.report import mediation
from jaxmed.runs import loading
from jaxmed.runs import settings as settings_lib
from jaxmed.runs.settings import setting
from jaxmed.store.results import Results
from models import checkpoint
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """Which report is written again, and whether it shows text."""

    results: str = setting(
        help="Folder that a run has written, local or gs://bucket/path.", path=True, bucket=True
    )
    show_text: bool = setting(
        help="Show prompts, escaped; the run's file of pairs must still be there.", default=False
    )


def run(settings: ReportSettings) -> Results:
    """Writes the report of a finished or unfinished run anew; see `mediation.write`.

    Raises:
        InputError: the folder is no results folder, or the texts to show are gone.
    """
    settings_lib.check(settings)
    results = Results.open(settings.results)
    pairs = _pairs(results) if settings.show_text else None
    mediation.write(results.folder, settings.show_text, pairs)
    return results


def _pairs(results: Results) -> list[pairs_lib.Pair]:
    """The pairs that the results are of, read again for their texts."""
    described = results.run
    if "pairs" not in described:
        raise InputError(f"--show_text: {results.folder} was saved from Python, and names no texts")
    folder = checkpoint.resolve(described["model"])
    adapter = checkpoint.resolve_adapter(described["adapter"])
    tokenizer = checkpoint.read_tokenizer(folder, adapter)
    encoder = loading.encoder(
        tokenizer, **{name: described[name] for name in ("chat", "date", "template_args")}
    )
    on_bad = (lambda error: None) if described["skip_bad_pairs"] else None
    pairs = pairs_lib.read_encoded(described["pairs"], encoder, on_bad=on_bad)
    if missing := set(results.pair_ids) - {pair.id for pair in pairs}:
        raise InputError(f"--show_text: {described['pairs']} no longer has pair '{min(missing)}'")
    return pairs
