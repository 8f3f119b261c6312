"""Settings as flags: those of a sweep, and of the programs that have a model answer prompts."""

import dataclasses
import types
import typing

from absl import flags

from jaxmed.analysis import joint, screening
from jaxmed.behaviour.judges import named
from jaxmed.data import sets
from jaxmed.question.sites import SITES

_COMMON = {
    "model": "Folder or Hugging Face hub id of a checkpoint.",
    "chat": "Wrap text prompts in the tokenizer's chat template.",
    "dtype": "Type of the parameters in memory; by default the checkpoint's own, but at least "
    "float32 on a CPU. Activations are float32 at least.",
    "memory_gb": "Memory that the run may take on its device, weights and program included, in "
    "GiB; by default most of what is free.",
    "overwrite": "Start again in a folder that holds an earlier run.",
    "out": "Folder for the results; a stopped run goes on.",
}
_SWEEP = {
    "pairs": "JSONL file, one pair a line: id, prompt (text or chat messages; the run that "
    "complies), counterfactual, harmful_response, safe_response; or prompt_ids, "
    "counterfactual_ids, harmful_ids, safe_ids.",
    "granularity": f"Any of {', '.join(SITES)}. token edits each aligned prompt position alone, "
    "whatever --positions says. direction needs --directions, and --directions alone is enough to "
    "ask for it.",
    "directions": "npz file of directions to patch, such as steering vectors, probes or decoder "
    "rows of an SAE: arrays named SITE.LAYER, as residual.12, of unit vectors, [size] or "
    "[number, size]. They are measured beside what --granularity names.",
    "metric": "logit_diff: logit of the harmful answer's first token minus that of the safe one's, "
    "at the last prompt position. response_logprob_diff: mean token log-probability of the harmful "
    "response minus that of the safe one, in nats per token.",
    "split": "Use only the pairs of these splits, of A, B and C (a hash of the base prompt's name, "
    "where the file gives none), so that the others are left for launch.clamp; by default all.",
    "positions": "Which positions are edited: the last prompt token; from the first aligned "
    "position that differs to the prompt's end (with prompts of unequal length mostly the first "
    "one); all aligned prompt positions; or those of the response.",
    "align": "How base and source prompt are laid against each other: their ends, their starts, or "
    "each pair's prompt_span and counterfactual_span ([start, stop), in tokens).",
    "group_size": "Adjacent neurons that are edited together.",
    "screen": "For when only the K strongest neurons matter: computes exactly the "
    f"{screening.MARGIN} K that gradients rank highest, and a random sample of all others, which "
    "says how many of the strongest may be missing. The rest keep the gradient's estimate, marked "
    "as such. 0 computes every neuron exactly.",
    "screen_audit": "--screen: neurons of that sample. More of them make for a tighter bound.",
    "screen_steps": "--screen: points between the two prompts at which the gradient is taken; 1 "
    "takes it at the run that is patched, more are integrated gradients (EAP-IG) at so many times "
    "the cost.",
    "joint_size": "Neurons, at most, of a joint set that grows by the one that most raises the "
    f"joint effect; 0 for none. Each step runs the whole model for {joint.CANDIDATES} "
    "candidates.",
    "joint_share": "--joint_size: the search stops at this share of TE, in both directions, and "
    "takes out the neurons that it does not need.",
    "joint_pairs": "--joint_size: pairs that the set is searched on, from the first; the others "
    "confirm it.",
    "harmful_tokens": "logit_diff: a harmful first token, as a token id or as a text whose first "
    "token counts; may be given several times. By default each pair's own harmful response.",
    "safe_tokens": "logit_diff: a safe first token, likewise.",
    "response_part": "response_logprob_diff: the part of the response that is read.",
    "decision_tokens": "response_logprob_diff: tokens of the decision.",
    "matmul_precision": "Operands of the matrix products that act on differences; plain runs and "
    "all else are float32. bfloat16 is faster on accelerators; the median effect of a neuron is "
    "then off by a quarter of a percent, one in six by more than 1%.",
    "skip_bad_pairs": "Leave out, and count, pairs that cannot be used.",
    "show_text": "Show prompts in the report, escaped.",
}
_ASKING = {
    "prompts": "File of prompts: CSV, JSON, JSONL or parquet, a published set or jaxmed's own form "
    "(id, prompt or prompt_ids, label). LABEL=FILE gives the label of a file that does not say it: "
    f"{', '.join(sets.LABELS)}. NAME:LABEL=FILE (or NAME:=FILE) has its ids begin with a name, "
    "where two files number their prompts alike. May be given several times.",
    "samples": "Responses of each prompt; more than one need a --temperature.",
    "temperature": "What logits are divided by before a token is drawn; 0 takes the likeliest.",
    "top_p": "Draws from the fewest likeliest tokens that have this probability together; 1 for "
    "all.",
    "top_k": "Draws from so many of the likeliest tokens; 0 for all.",
    "max_tokens": "Tokens of a response at most, the one that ends it included.",
    "seed": "Of all samples: a response depends on it, its prompt's id and its number.",
    "judge": f"NAME or NAME=CHECKPOINT: one of {', '.join(named.NAMES)}, or a JSON file with a "
    "judge of your own (docs/judges.md); and a folder or hub id, for a copy of the judge's model. "
    "May be given several times: each says what those before it do not say.",
    "judge_template": "NAME=FILE: file with a judge's text as its authors publish it, for those "
    "whose text is published (docs/judges.md says where). May be given several times.",
    "comply_tokens": "--judge=tokens: first token of a response that complies, as a token id or as "
    "a text whose first token counts; may be given several times.",
    "refuse_tokens": "--judge=tokens: first token of a response that refuses, likewise.",
    "cut": "Let a judge read the beginning of a response that is too long for it; by default it is "
    "an error.",
    "skip_bad_prompts": "Leave out, and count, prompts that cannot be used.",
    "show_text": "Show prompts and responses in the report, escaped.",
}
_RESPOND = {
    "counterfactual": "Where the counterfactuals of harmful prompts are found. given: in the file. "
    "matched: benign prompts of the same source that correspond to them. length: benign prompts of "
    "as many tokens. A counterfactual is of the same split.",
    "count": "--counterfactual=matched or length: how many a prompt has at most.",
    "safe_template": "A text that is the safe response of prompts which were never refused; by "
    "default these make no pair.",
    "threshold": "A verdict of at least this counts as yes.",
}
_CLAMP = {
    "results": "Folder of a run of launch.mediate, which ranks the units that are held.",
    "granularity": "--results: of the units.",
    "by": "--results: what the units are ranked by: the size of the mean NIE or TIE, the larger of "
    "both (max), or as the greedy joint set has them.",
    "top": "--results: how many of the strongest are held; 0 for the whole joint set.",
    "units": "A unit that is held, instead of --results: neuron:LAYER.INDEX, head:LAYER.INDEX, "
    "attention:LAYER or mlp:LAYER; may be given several times.",
    "edit": "What units are held at: their mean over harmful prompts that the plain model refuses, "
    "or over benign prompts; zero; or their values at each prompt's own counterfactual (source).",
    "strength": "Share of the way there: y <- (1 - strength) y + strength value. With --edit=zero "
    "it is damping by the factor 1 - strength.",
    "positions": "Where units are held: at all positions, at the prompt's, or at those that the "
    "answer is read from (the prompt's last and the generated ones).",
    "split": "The prompts that are answered: split A, B or C (where the file gives none a hash: of "
    "a published set's text, else of the id). What units are held at is measured on the others. "
    "Empty for all, which then do both jobs.",
    "most_prompts": "Prompts of a label that are answered at most, drawn by hash; 0 for all.",
    "random": "How often random units are held instead: as many in the same layers, alike in how "
    "much they differ between answered and refused prompts and in their output norm.",
    "module": "Also hold the whole modules that the units are in.",
    "top_doses": "Also hold only so many of the strongest; may be given several times.",
    "strength_doses": "Also hold with this strength; may be given several times.",
    "alone": "Also hold each of so many of the strongest units alone.",
    "export": "Folder for a checkpoint with the edit in its weights (--edit=zero, heads or "
    "neurons, all positions), written only if harm fell and benign compliance stayed.",
    "margin": "--export: how far benign compliance may fall, its interval included.",
    "perplexity_margin": "--export: by what share the perplexity of the plain model's answers to "
    "benign prompts may rise, its interval included.",
}
# By module.
_HELP = {
    "clamp": _COMMON | _ASKING | _CLAMP,
    "mediate": _COMMON | _SWEEP,
    "respond": _COMMON | _ASKING | _RESPOND,
}
_WITH_COMMAS = ("granularity", "split")

_defined: list[str] = []

# The flags belong to the program that asks for them, whose --help then shows them.
flags.disclaim_key_flags()


def define(module: types.ModuleType, *names: str, **defaults) -> None:
    """Defines flags for fields of a module's `Settings`; one without a default must be given.

    Args:
        module: `runs.mediate` or another with `Settings`, and with `CHOICES`, `LEAST` and `MOST`, the
            values that a field may have.
        names: of the fields.
        defaults: those that differ from the fields' own.
    """
    texts = _HELP[module.__name__.rpartition(".")[2]]
    fields = {field.name: field for field in dataclasses.fields(module.Settings)}
    _defined.extend(names)
    for name in names:
        default = defaults.get(name, fields[name].default)
        if required := default is dataclasses.MISSING:
            default = None
        if name in module.CHOICES:
            flags.DEFINE_enum(name, default, module.CHOICES[name], texts[name])
        elif name in module.LEAST:
            kind = flags.DEFINE_integer if fields[name].type is int else flags.DEFINE_float
            kind(
                *(name, default, texts[name]),
                lower_bound=module.LEAST[name],
                upper_bound=module.MOST.get(name),
            )
        elif fields[name].type is bool:
            flags.DEFINE_bool(name, default, texts[name])
        elif typing.get_origin(fields[name].type) is tuple:
            kind = flags.DEFINE_list if name in _WITH_COMMAS else flags.DEFINE_multi_string
            kind(name, None if required else list(default), texts[name], required=required)
        else:
            flags.DEFINE_string(name, default, texts[name], required=required)


def given() -> dict:
    """The values of the flags that were defined, by field."""
    values = {name: flags.FLAGS[name].value for name in _defined}
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
