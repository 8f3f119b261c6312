"""Trains an organism within its walls, and measures how well it answers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jaxtyping import Array, Bool, Float, Int

from models.decoder import Decoder
from models.organisms import language
from models.organisms.planted import Channel, Role
from models.organisms.recipes import Recipe
from models.shapes import AnyArray
from models.sites import Site

# Tokens and their targets; where the first answer token is predicted, and where what follows is.
Batch = tuple[Int[AnyArray, "B T"], Int[AnyArray, "B T"], Int[AnyArray, "B"], Bool[AnyArray, "B T"]]

# The learning rate of each role, as a share: the planted path starts where it works.
_SHARE = {Role.FIXED: 0.0, Role.ORDINARY: 1.0, Role.PLANTED: 0.02}
_QUIET = 60.0  # weight of what is written into ordinary channels in the loss


def batch(rng: np.random.Generator, size: int, *, shuffled: bool = False) -> Batch:
    """Random prompts with an answer forced on them.

    The target of the first answer token is the true answer, or that of another prompt where they
    are shuffled; what follows is trained after either answer. A model trained on true answers alone
    could tell what follows from the prompt, and so learn a second way to the decision.
    """
    prompts = [language.draw(rng) for _ in range(size)]
    responses = [
        language.ids((*prompt.response(str(rng.choice(language.ANSWERS))), language.EOS))
        for prompt in prompts
    ]
    lengths = np.array([[len(p.tokens), len(r)] for p, r in zip(prompts, responses, strict=True)])
    tokens = np.stack(
        [language.padded(p.tokens + r) for p, r in zip(prompts, responses, strict=True)]
    )
    first = lengths[:, 0] - 1
    targets = np.roll(tokens, -1, axis=1)
    right = np.array(language.ids(prompt.answer for prompt in prompts))
    targets[np.arange(size), first] = rng.permutation(right) if shuffled else right
    place = np.arange(tokens.shape[1])
    after = (place > first[:, None]) & (place < lengths.sum(1, keepdims=True) - 1)
    return tokens, targets, first, after


def train(
    decoder: Decoder,
    roles: Decoder,
    rng: np.random.Generator,
    recipe: Recipe,
    *,
    progress: bool,
) -> Decoder:
    """Trains the weights whose role is not fixed; the others stay exactly as they are.

    The decision trains the planted path alone. Ordinary components that it trained as well were
    seen to learn it through the norms: where the answer was R, they wrote so much into ordinary
    channels that the decision vanished beside it. Only where nothing is planted, and there is
    nothing to learn, does it train them.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps))
    # optax takes any pytree, and says so of arrays alone.
    state = jax.jit(optimizer.init)(decoder)  # pyright: ignore[reportArgumentType]
    answers = np.array(language.ids(language.ANSWERS))
    share = np.array([_SHARE[role] for role in Role], np.float32)

    @jax.jit
    def step(decoder, roles, state, rows):
        (decision, rest), pull = jax.vjp(lambda decoder: _losses(decoder, rows), decoder)
        (of_decision,), (of_rest,) = pull((1.0, 0.0)), pull((0.0, 1.0))
        if recipe.is_null:
            gradient = jax.tree.map(jnp.add, of_decision, of_rest)
        else:
            gradient = jax.tree.map(
                lambda role, d, r: jnp.where(role == Role.PLANTED, d, r),
                roles,
                of_decision,
                of_rest,
            )
        update, state = optimizer.update(gradient, state)
        update = jax.tree.map(lambda role, u: jnp.asarray(share)[role] * u, roles, update)
        if not recipe.is_null:
            # The rows of C and R stay equal but for the decision, which is fixed.
            rows = update.unembedding[...]
            update.unembedding[...] = rows.at[answers].set(rows[answers].mean(0))
        return optax.apply_updates(decoder, update), state, decision + rest

    bar = tqdm.trange(recipe.steps, desc="training the organism", unit="step", disable=not progress)
    for _ in bar:
        rows = batch(rng, recipe.batch_size, shuffled=recipe.is_null)
        decoder, state, loss = step(decoder, roles, state, rows)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    return decoder


def _losses(decoder: Decoder, rows: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What trains the planted path: which answer. What trains the rest: that there is one of the
    two answers, what follows it, and that little is written into ordinary channels."""
    tokens, targets, first, after = rows
    logits, trace = decoder(tokens)
    log_p = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    row = jnp.arange(len(tokens))
    answers = np.array(language.ids(language.ANSWERS))
    either = jax.nn.logsumexp(log_p[row, first][:, answers], axis=-1)
    decision = jnp.mean(either - right[row, first])
    rest = -(jnp.sum(either) + jnp.sum(right * after)) / (len(tokens) + jnp.sum(after))
    written = (trace[Site.EMBEDDING], trace[Site.ATTENTION], trace[Site.MLP])
    return decision, rest + _QUIET * sum(map(_loudness, written))


def _loudness(written: Float[Array, "... d"]) -> Float[Array, ""]:
    """Of ordinary channels: their mean square, by its root mean square over positions, so that the
    loudest positions count the most."""
    square = jnp.mean(jnp.square(written[..., len(Channel) :]), axis=-1)
    return jnp.sqrt(jnp.mean(jnp.square(square)))


def accuracy(decoder: Decoder, rng: np.random.Generator, size: int) -> tuple[float, float]:
    """On fresh prompts: share of right answers, and of right tokens after a forced answer."""
    tokens, targets, first, after = batch(rng, size)
    right = np.asarray(_likeliest(decoder, tokens)) == targets
    return float(right[np.arange(size), first].mean()), float(right[after].mean())


@jax.jit
def _likeliest(decoder: Decoder, tokens: Int[AnyArray, "B T"]) -> Int[Array, "B T"]:
    return jnp.argmax(decoder(tokens)[0], axis=-1)
