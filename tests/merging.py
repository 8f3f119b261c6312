"""A tokenizer that merges: byte-level BPE, trained on a few invented words."""

import tokenizers
import transformers

_TRAINED_ON = ("mip", "mipper", "mip per", "tak", "takker tak", "mip mipper tak takker")


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tokenizer: `mip`, ` tak` and `mipper` are one token each, other text is bytes."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.train_from_iterator(
        _TRAINED_ON * 9,
        tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
