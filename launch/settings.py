"""The settings of a sweep as flags, for the programs that run sweeps."""

from absl import flags

from jaxmed import attribution, estimands
from jaxmed.planning import SITES
from jaxmed.sweep import CHOICES, LEAST, MOST, Settings

_HELP = {
    "model": "Folder or Hugging Face hub id of a checkpoint.",
    "pairs": "JSONL file, one pair a line: id, prompt (text or chat messages; the run that "
    "complies), counterfactual, harmful_response, safe_response; or prompt_ids, "
    "counterfactual_ids, harmful_ids, safe_ids.",
    "out": "Folder for the results; a stopped run goes on.",
    "granularity": f"Any of {', '.join(SITES)}. token edits each aligned prompt position alone, "
    "whatever --positions says. direction needs --directions, and --directions alone is enough to "
    "ask for it.",
    "directions": "npz file of directions to patch, such as steering vectors, probes or decoder "
    "rows of an SAE: arrays named SITE.LAYER, as residual.12, of unit vectors, [size] or "
    "[number, size]. They are measured beside what --granularity names.",
    "metric": "logit_diff: logit of the harmful answer's first token minus that of the safe one's, "
    "at the last prompt position. response_logprob_diff: mean token log-probability of the harmful "
    "response minus that of the safe one, in nats per token.",
    "positions": "Which positions are edited: the last prompt token; from the first aligned "
    "position that differs to the prompt's end (with prompts of unequal length mostly the first "
    "one); all aligned prompt positions; or those of the response.",
    "align": "How base and source prompt are laid against each other: their ends, their starts, or "
    "each pair's prompt_span and counterfactual_span ([start, stop), in tokens).",
    "group_size": "Adjacent neurons that are edited together.",
    "screen": "For when only the K strongest neurons matter: computes exactly the "
    f"{attribution.MARGIN} K that gradients rank highest, and a random sample of all others, which "
    "says how many of the strongest may be missing. The rest keep the gradient's estimate, marked "
    "as such. 0 computes every neuron exactly.",
    "screen_audit": "--screen: neurons of that sample. More of them make for a tighter bound.",
    "screen_steps": "--screen: points between the two prompts at which the gradient is taken; 1 "
    "takes it at the run that is patched, more are integrated gradients (EAP-IG) at so many times "
    "the cost.",
    "joint_size": "Neurons, at most, of a joint set that grows by the one that most raises the "
    f"joint effect; 0 for none. Each step runs the whole model for {estimands.CANDIDATES} "
    "candidates.",
    "joint_share": "--joint_size: the search stops at this share of TE, in both directions, and "
    "takes out the neurons that it does not need.",
    "joint_pairs": "--joint_size: pairs that the set is searched on, from the first; the others "
    "confirm it.",
    "chat": "Wrap text prompts in the tokenizer's chat template.",
    "harmful_tokens": "logit_diff: a harmful first token, as a token id or as a text whose first "
    "token counts; may be given several times. By default each pair's own harmful response.",
    "safe_tokens": "logit_diff: a safe first token, likewise.",
    "response_part": "response_logprob_diff: the part of the response that is read.",
    "decision_tokens": "response_logprob_diff: tokens of the decision.",
    "dtype": "Type of the parameters in memory; by default the checkpoint's own, but at least "
    "float32 on a CPU. Activations are float32 at least.",
    "matmul_precision": "Operands of the matrix products that act on differences; plain runs and "
    "all else are float32. bfloat16 is faster on accelerators; the median effect of a neuron is "
    "then off by a quarter of a percent, one in six by more than 1%.",
    "memory_gb": "Memory that the run may take on its device, weights and program included, in "
    "GiB; by default most of what is free.",
    "skip_bad_pairs": "Leave out, and count, pairs that cannot be used.",
    "overwrite": "Start again in a folder that holds an earlier run.",
    "show_text": "Show prompts in the report, escaped.",
}
_WITH_COMMAS = ("granularity",)

_defined: list[str] = []

# The flags belong to the program that asks for them, whose --help then shows them.
flags.disclaim_key_flags()


def define(*names: str, **defaults) -> None:
    """Defines flags for these fields of `Settings`; one without a default must be given.

    Args:
        names: of the fields.
        defaults: those that differ from the fields' own.
    """
    _defined.extend(names)
    for name in names:
        default = defaults.get(name, getattr(Settings, name, None))
        required = default is None and name != "memory_gb"
        if name in CHOICES:
            flags.DEFINE_enum(name, default, CHOICES[name], _HELP[name])
        elif name in LEAST:
            kind = flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_float
            kind(
                *(name, default, _HELP[name]),
                lower_bound=LEAST[name],
                upper_bound=MOST.get(name),
            )
        elif isinstance(default, bool):
            flags.DEFINE_bool(name, default, _HELP[name])
        elif isinstance(default, tuple):
            kind = flags.DEFINE_list if name in _WITH_COMMAS else flags.DEFINE_multi_string
            kind(name, list(default), _HELP[name])
        else:
            flags.DEFINE_string(name, default, _HELP[name], required=required)


def given() -> dict:
    """The values of the flags that were defined, by field."""
    values = {name: flags.FLAGS[name].value for name in _defined}
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
