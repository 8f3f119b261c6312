"""The effects of every layer, module, head, token position and neuron of a checkpoint.

python -m launch.mediate --model=DIR_OR_HUB_ID --pairs=FILE --out=DIR
"""

import dataclasses

from absl import flags

from jaxmed import attribution, report, sweep
from jaxmed.planning import SITES
from jaxmed.sweep import CHOICES, LEAST, Settings
from launch import program

flags.DEFINE_string("model", None, "Folder or Hugging Face hub id of a checkpoint.", required=True)
flags.DEFINE_string(
    "pairs",
    None,
    "JSONL file, one pair a line: id, prompt (text or chat messages; the run that complies), "
    "counterfactual, harmful_response, safe_response; or prompt_ids, counterfactual_ids, "
    "harmful_ids, safe_ids.",
    required=True,
)
flags.DEFINE_string("out", None, "Folder for the results; a stopped run goes on.", required=True)
flags.DEFINE_list(
    "granularity",
    list(Settings.granularity),
    f"Any of {', '.join(SITES)}. token edits each aligned prompt position alone, whatever "
    "--positions says. direction needs --directions, and --directions alone is enough to ask for "
    "it.",
)
flags.DEFINE_string(
    "directions",
    Settings.directions,
    "npz file of directions to patch, such as steering vectors, probes or decoder rows of an SAE: "
    "arrays named SITE.LAYER, as residual.12, of unit vectors, [size] or [number, size]. They are "
    "measured beside what --granularity names.",
)
flags.DEFINE_enum(
    "metric",
    Settings.metric,
    CHOICES["metric"],
    "logit_diff: logit of the harmful answer's first token minus that of the safe one's, at the "
    "last prompt position. response_logprob_diff: mean token log-probability of the harmful "
    "response minus that of the safe one, in nats per token.",
)
flags.DEFINE_enum(
    "positions",
    Settings.positions,
    CHOICES["positions"],
    "Which positions are edited: the last prompt token; from the first aligned position that "
    "differs to the prompt's end (with prompts of unequal length mostly the first one); all "
    "aligned prompt positions; or those of the response.",
)
flags.DEFINE_enum(
    "align",
    Settings.align,
    CHOICES["align"],
    "How base and source prompt are laid against each other: their ends, their starts, or each "
    "pair's prompt_span and counterfactual_span ([start, stop), in tokens).",
)
flags.DEFINE_integer(
    "group_size",
    Settings.group_size,
    "Adjacent neurons that are edited together.",
    lower_bound=LEAST["group_size"],
)
flags.DEFINE_integer(
    "screen",
    Settings.screen,
    "For when only the K strongest neurons matter: computes exactly the "
    f"{attribution.MARGIN} K that gradients rank highest, and a random sample of all others, which "
    "says how many of the strongest may be missing. The rest keep the gradient's estimate, marked "
    "as such. 0 computes every neuron exactly.",
    lower_bound=LEAST["screen"],
)
flags.DEFINE_integer(
    "screen_audit",
    Settings.screen_audit,
    "--screen: neurons of that sample. More of them make for a tighter bound.",
    lower_bound=LEAST["screen_audit"],
)
flags.DEFINE_integer(
    "screen_steps",
    Settings.screen_steps,
    "--screen: points between the two prompts at which the gradient is taken; 1 takes it at the "
    "run that is patched, more are integrated gradients (EAP-IG) at so many times the cost.",
    lower_bound=LEAST["screen_steps"],
)
flags.DEFINE_integer(
    "joint_size",
    Settings.joint_size,
    "Neurons of a joint set that grows by the one that most raises the joint effect; 0 for none. "
    "Each step runs the whole model for 100 candidates.",
    lower_bound=LEAST["joint_size"],
)
flags.DEFINE_integer(
    "joint_pairs",
    Settings.joint_pairs,
    "Pairs that the joint set is searched on, from the first.",
    lower_bound=LEAST["joint_pairs"],
)
flags.DEFINE_bool("chat", False, "Wrap text prompts in the tokenizer's chat template.")
flags.DEFINE_multi_string(
    "harmful_tokens",
    [],
    "logit_diff: a harmful first token, as a token id or as a text whose first token counts; may "
    "be given several times. By default each pair's own harmful response.",
)
flags.DEFINE_multi_string("safe_tokens", [], "logit_diff: a safe first token, likewise.")
flags.DEFINE_enum(
    "response_part",
    Settings.response_part,
    CHOICES["response_part"],
    "response_logprob_diff: the part of the response that is read.",
)
flags.DEFINE_integer(
    "decision_tokens",
    Settings.decision_tokens,
    "response_logprob_diff: tokens of the decision.",
    lower_bound=LEAST["decision_tokens"],
)
flags.DEFINE_enum(
    "dtype",
    Settings.dtype,
    CHOICES["dtype"],
    "Type of the parameters in memory; by default the checkpoint's own, but at least float32 on a "
    "CPU. Activations are float32 at least.",
)
flags.DEFINE_enum(
    "matmul_precision",
    Settings.matmul_precision,
    CHOICES["matmul_precision"],
    "Operands of the matrix products that act on differences; plain runs and all else are float32. "
    "bfloat16 is faster on accelerators; the median effect of a neuron is then off by a quarter of "
    "a percent, one in six by more than 1%.",
)
flags.DEFINE_float(
    "memory_gb",
    Settings.memory_gb,
    "Memory that the run may take on its device, weights and program included, in GiB; by default "
    "most of what is free.",
    lower_bound=LEAST["memory_gb"],
)
flags.DEFINE_bool("skip_bad_pairs", False, "Leave out, and count, pairs that cannot be used.")
flags.DEFINE_bool("overwrite", False, "Start again in a folder that holds an earlier run.")
flags.DEFINE_bool("show_text", False, "Show prompts in the report, escaped.")


def main() -> None:
    """Runs what the flags ask for."""
    given = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    results = sweep.run(Settings(**given))
    print("\n".join(report.closing_lines(results)))


if __name__ == "__main__":
    program.start(main)
