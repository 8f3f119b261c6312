"""How exact single-neuron effects are, against a float64 reference.

The models are checkpoints in bfloat16: their weights are the same numbers in every precision, and
the reference is the engine in float64, which the tests hold to the plain definition within 1e-12.
Beside the engine stands what tools do that subtract two runs: transformers with hooks.
"""

import dataclasses
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import stats

import models
from jaxmed.data.pairs import Pair
from jaxmed.engine import propagate, scan
from jaxmed.question.metrics import LogitDifference
from jaxmed.question.question import Question
from jaxmed.validation import presets
from models import checkpoint
from models.config import DecoderConfig, Rotary
from models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Errors of the effects of all neurons of one pair.

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
    """A Llama of random weights, and two random prompts."""
    config = presets.llama(
        *("bfloat16", 512, False, Rotary(kind="default", theta=10000.0)),
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=width // 4,
    )
    return presets.random_decoder(config), presets.random_pair(config, tokens)


def measure(model: str, decoder: Decoder, pair: Pair, *, runs: bool = False) -> list[Accuracy]:
    """The engine's errors with float32 and with bfloat16 products.

    Args:
        model: a name for the table.
        decoder: a Llama; its weights are rounded to bfloat16.
        pair: the pair; the last prompt token is edited.
        runs: also those of patched-minus-base runs, which needs torch.
    """
    question, chosen = Question(LogitDifference()), ["neuron"]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(_in_bfloat16(decoder), folder)
        with jax.enable_x64(True):
            double = models.load(folder, dtype="float64")[0]
            exact = scan.scan_pair(double, pair, question, chosen)
        decoder = models.load(folder, dtype="bfloat16")[0]
    rows = []
    for dtype in propagate.MATMUL_PRECISIONS:
        found = scan.scan_pair(decoder, pair, question, chosen, matmul_precision=dtype)
        rows += _compared((model, "differences", dtype), found.nie, found.tie, exact)
    if runs:
        from jaxmed.validation import baselines  # torch

        torch_model = baselines.torch_model(decoder, onednn=False)
        for dtype in ("float32", "bfloat16"):
            torch_model = baselines.in_dtype(torch_model, dtype)
            sides = _by_runs(baselines, torch_model, pair, decoder.config)
            rows += _compared((model, "patched minus base", dtype), *sides, exact)
    return rows


def _in_bfloat16(decoder: Decoder) -> Decoder:
    config = dataclasses.replace(decoder.config, dtype="bfloat16")
    graph = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(decoder))
    return nnx.merge(graph, rounded)


def _by_runs(baselines, torch_model, pair: Pair, config: DecoderConfig):
    """NIE and TIE of every neuron by transformers with hooks."""
    prompts = (pair.prompt_ids, pair.counterfactual_ids)
    compared = (pair.harmful_ids[0], pair.safe_ids[0])
    shape = (config.num_layers, config.intermediate_size)
    layers, neurons = (index.reshape(-1) for index in np.indices(shape))
    nie, minus_tie = (
        baselines.Hooks(torch_model, *order, *compared).effects(layers, neurons).reshape(shape)
        for order in (prompts, prompts[::-1])
    )
    return {"neuron": nie}, {"neuron": -minus_tie}


def _compared(names: tuple[str, str, str], nie: dict, tie: dict, exact) -> list[Accuracy]:
    rows = []
    for estimand, got, want in (("NIE", nie, exact.nie), ("TIE", tie, exact.tie)):
        got, want = got["neuron"].astype(np.float64).ravel(), want["neuron"].ravel()
        there = want != 0
        rows.append(
            Accuracy(
                *names,
                estimand,
                frobenius=float(np.linalg.norm(got - want) / np.linalg.norm(want)),
                median=float(np.median(np.abs(got / np.where(there, want, 1) - 1)[there])),
                spearman=float(stats.spearmanr(np.abs(got), np.abs(want)).statistic),
            )
        )
    return rows


def table(rows: list[Accuracy]) -> list[str]:
    """The rows for people."""
    heading = f"{'model':<10}{'effects by':<20}{'products':<10}{'':<6}{'Frobenius':>10}"
    lines = [f"{heading}{'median':>10}{'Spearman':>10}"]
    for row in rows:
        lines.append(
            f"{row.model:<10}{row.method:<20}{row.dtype:<10}{row.estimand:<6}"
            f"{row.frobenius:>10.1e}{row.median:>10.1e}{row.spearman:>10.5f}"
        )
    return lines
