"""Tokenizers and chat templates of the shapes that published ones have, trained on a few words."""

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

THOUGHTS = ("<think>", "</think>")
_TRAINED_ON = ["Sure I cannot tell me how to do it", "I will, sure: tell it\n", "The answer is no"]

LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|eot_id|>"
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CHAT_ML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3's: thoughts are left out of what was said, and may be left out of what is to be said.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + "
    "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content) + "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
# As Gemma's: it writes messages of the system nowhere.
DROPS_SYSTEM = (
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}{{ '<start_of_turn>' + "
    "('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def sentencepiece(
    template: str, *, first: bool = False, end: bool = False
) -> transformers.PreTrainedTokenizerFast:
    """As Llama 2's: a space is a mark, which also stands before the first word of a text and of
    what follows a control token; characters that are no token are bytes.

    Args:
        template: chat template.
        first: as Llama's newer ones, where the mark stands before the first word alone.
        end: whether the tokenizer puts its EOS behind every text.
    """
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]
    _train(inner, [*special, *(f"<0x{byte:02X}>" for byte in range(256))], ["▁"])
    if not first:
        inner.pre_tokenizer = None
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    return _made(inner, template, special, bos="<s>", eos="</s>", end=end)


def byte_level(template: str, *, end: bool = False) -> transformers.PreTrainedTokenizerFast:
    """As those of GPT-2, Llama 3 and Qwen: byte-level BPE, with Qwen3's tags of thoughts.

    Args:
        template, end: as of `sentencepiece`.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"]
    special += ["<|end_header_id|>", "<|eot_id|>"]
    _train(inner, special, pre_tokenizers.ByteLevel.alphabet())
    made = _made(inner, template, special, bos="<|begin|>", eos="<|end|>", end=end)
    # Which are not special, as Qwen3's.
    made.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in THOUGHTS])
    return made


def _train(inner: tokenizers.Tokenizer, special: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(_TRAINED_ON * 9, trainer)


def _made(inner, template, special, *, bos, eos, end):
    ids = [(token, inner.token_to_id(token)) for token in (bos, eos)]
    inner.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}" if end else f"{bos} $A", special_tokens=ids
    )
    inner.normalizer = normalizers.NFC() if bos == "<|begin|>" else inner.normalizer
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=special[2:],
    )
    made.chat_template = template
    return made
