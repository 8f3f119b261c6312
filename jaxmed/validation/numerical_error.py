"""The numerical error of single-neuron effects, against float64.

The models are checkpoints in bfloat16: their weights are the same numbers in every precision, and
the measure is the engine in float64, which the tests hold to the plain definition within 1e-12.
Beside the engine stands what tools do that subtract two runs: transformers with hooks.
"""

import dataclasses
import math
import tempfile

import jax
import numpy as np
from jaxtyping import Bool
from scipy import stats

from jaxmed.data.pairs import Pair
from jaxmed.engine import scan
from jaxmed.question.effects import ESTIMANDS, PairEffects
from jaxmed.question.metrics import LogitDifference
from jaxmed.question.question import Question
from jaxmed.validation import presets
from models import checkpoint, products
from models.config import Rotary
from models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class NumericalError:
    """Errors of one estimand of all neurons of one pair.

    Attributes:
        model, method, dtype: whose weights, how the effects were found, type of the products.
        estimand: NIE or TIE.
        frobenius: norm of the errors over the norm of the effects.
        median: median relative error of the neurons whose effect is not 0.
        spearman: rank correlation of the absolute effects.
    """

    model: str
    method: str
    dtype: str
    estimand: str
    frobenius: float
    median: float
    spearman: float


def random_model(layers: int = 4, width: int = 128, tokens: int = 24) -> tuple[Decoder, Pair]:
    """A Llama of random weights in bfloat16, and two random prompts of that many tokens."""
    config = presets.llama(
        dtype="bfloat16",
        vocab_size=512,
        tie_embeddings=False,
        rotary=Rotary(kind="default", theta=10000.0),
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=width // 4,
    )
    return presets.random_decoder(config), presets.random_pair(config, tokens)


def measure(
    model: str,
    decoder: Decoder,
    pair: Pair,
    *,
    chosen: Bool[np.ndarray, "L I"] | None = None,
    runs: bool = False,
) -> list[NumericalError]:
    """The engine's errors in each precision of its products.

    Args:
        model: a name for the rows.
        decoder: its weights are rounded to bfloat16.
        pair: the pair; the last prompt token is edited.
        chosen: the neurons that are compared; all by default.
        runs: also those of patched-minus-base runs, which needs torch.

    Returns:
        A row for each way, type of products and estimand, in this order.
    """
    question, masks = Question(LogitDifference()), {} if chosen is None else {"neuron": chosen}

    def effects(decoder: Decoder) -> PairEffects:
        return scan.scan_pair(decoder, pair, question, ["neuron"], chosen=masks)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(decoder, folder)
        decoder = checkpoint.load(folder, dtype="bfloat16")[0]
    with jax.enable_x64(True):
        exact = effects(presets.in_float64(decoder))
    rows = []
    for precision in products.PRECISIONS:
        found = effects(decoder.at_precision(precision))
        rows += compared(found, exact, model=model, method="differences", dtype=precision)
    if runs:
        for dtype, found in _by_runs(decoder, pair).items():
            rows += compared(found, exact, model=model, method="patched minus base", dtype=dtype)
    return rows


def compared(
    found: PairEffects, exact: PairEffects, *, model: str, method: str, dtype: str
) -> list[NumericalError]:
    """The errors of the NIE and TIE of all neurons that were computed.

    Args:
        found, exact: effects of granularity "neuron", with errors and without.
        model, method, dtype: as in `NumericalError`.
    """
    rows = []
    for estimand in ESTIMANDS:
        got, want = (
            getattr(effects, estimand)["neuron"].astype(np.float64).ravel()
            for effects in (found, exact)
        )
        got, want = got[~np.isnan(want)], want[~np.isnan(want)]
        there = want != 0
        correlation, _ = np.asarray(stats.spearmanr(np.abs(got), np.abs(want)))
        rows.append(
            NumericalError(
                model=model,
                method=method,
                dtype=dtype,
                estimand=estimand.upper(),
                frobenius=float(np.linalg.norm(got - want) / np.linalg.norm(want)),
                median=float(np.median(np.abs(got / np.where(there, want, 1) - 1)[there])),
                spearman=float(correlation),
            )
        )
    return rows


def _by_runs(decoder: Decoder, pair: Pair) -> dict[str, PairEffects]:
    """Effects of every neuron by transformers with hooks, by the type of all its numbers."""
    from jaxmed.validation import baselines  # torch, which only a comparison needs

    config = decoder.config
    shape = (config.num_layers, config.intermediate_size)
    layers, neurons = (index.reshape(-1) for index in np.indices(shape))

    def changes(model, base_ids: tuple[int, ...], source_ids: tuple[int, ...]) -> np.ndarray:
        hooks = baselines.Hooks(model, base_ids, source_ids, pair.harmful_ids[0], pair.safe_ids[0])
        return hooks.effects(layers, neurons).reshape(shape)

    found = {}
    for dtype in ("float32", "bfloat16"):
        torch_model = baselines.torch_model(decoder, dtype)
        found[dtype] = PairEffects(
            y_base=math.nan,
            y_source=math.nan,
            nie={"neuron": changes(torch_model, pair.prompt_ids, pair.counterfactual_ids)},
            tie={"neuron": -changes(torch_model, pair.counterfactual_ids, pair.prompt_ids)},
        )
    return found
