"""What organisms there are: everything about one but its seed, as data."""

import dataclasses

from models.config import DecoderConfig, Rotary
from models.organisms import language


@dataclasses.dataclass(frozen=True)
class Gating:
    """How the decision is made, in units of its channel; above 0 it is to comply.

    The final norm bounds what the logits see of it, by about sqrt(hidden size) = 8. Writes that
    are small beside that add up. Where each of several gates alone writes far more, one does as
    well as all.

    Attributes:
        rest: the decision that <assistant> starts with.
        written: what is added to it where the gates are open. They open to refuse if this is
            negative, else to comply.
        threshold: how much must be moved for gates to open, or close; about 2 is moved for R.
        weight: of the decision in the logit of C; in that of R its negative.
    """

    rest: float
    written: float
    threshold: float
    weight: float

    @property
    def total_effect(self) -> float:
        """Size of the change of Y = logit C - logit R that `written` makes where it is small."""
        return 2 * self.weight * abs(self.written)


# Gates that add up are proportional to what is moved beyond the threshold: where that is close,
# each small change of what is moved counts.
ADDITIVE = Gating(rest=1.0, written=-2.0, threshold=0.5, weight=4.0)
SATURATED = Gating(rest=4.0, written=-112.0, threshold=1.1, weight=1.0)
REDUNDANT = Gating(rest=-4.0, written=112.0, threshold=1.4, weight=1.0)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an organism is, but for the seed.

    Attributes:
        name: of the variant.
        num_layers, hidden_size, intermediate_size, num_heads: sizes of the decoder.
        detectors: neurons of layer 0 that detect H, and as many that detect J; 0 plants nothing,
            and trains on shuffled labels.
        gate_layers: the layers that the gates' layer is drawn from.
        gates: neurons that gate the decision.
        direct: share of the decision that the planted head writes itself, round the gates.
        gating: how the decision is made.
        decoys: neurons of each kind that copy a planted kind, louder, and that nothing reads: of
            the detectors of H, of those of J, and of the gates; and a head, if there are any.
        steps, batch_size, learning_rate: of the training.
        wall_bound: the largest effect, as a share of the total effect, that all but the true
            mediators may have, in any pair, each layer's heads or neurons alone or all together.
    """

    name: str
    num_layers: int = 4
    hidden_size: int = 64
    intermediate_size: int = 160
    num_heads: int = 4
    detectors: int = 3
    gate_layers: tuple[int, ...] = (2, 3)
    gates: int = 4
    direct: float = 0.0
    gating: Gating = ADDITIVE
    decoys: int = 0
    steps: int = 350
    batch_size: int = 64
    learning_rate: float = 3e-3
    wall_bound: float = 0.05

    @property
    def is_null(self) -> bool:
        """Whether nothing is planted."""
        return not self.detectors

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return DecoderConfig(
            family="llama",
            vocab_size=len(language.WORDS),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            norm_eps=1e-5,
            max_positions=64,
            rotary=Rotary(theta=10000.0),
            qkv_bias=False,
            output_bias=False,
            mlp_bias=False,
            activation="silu",
            windows=(None,) * self.num_layers,
            tie_embeddings=False,
            dtype="float32",
        )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # MLP neurons of the last layer gate the decision.
        Recipe("late-mlp", gate_layers=(3,)),
        # MLP neurons of a middle layer do; what comes later has no part in it.
        Recipe("middle-mlp", num_layers=5, gate_layers=(2, 3)),
        # The planted head writes the decision itself; no MLP after it has a part in it.
        Recipe("attention", gates=0, direct=1.0),
        # The gates hold the answer at C, and any one suffices: each hides from NIE.
        Recipe("redundant", gating=REDUNDANT),
        # The gates make it R, and any one suffices: each hides from TIE.
        Recipe("saturated", gating=SATURATED),
        # Units that differ more between the prompts than the true ones, and do nothing.
        Recipe("decoys", gate_layers=(3,), decoys=8),
        # Detectors, a head that moves, gates; the head also writes part of the decision itself.
        Recipe("two-stage", direct=0.4),
        # Trained on shuffled labels: nothing tells the answer, so nothing is to be found.
        Recipe("null", detectors=0, gates=0),
    )
}
