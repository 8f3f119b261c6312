"""What jaxmed is timed against: exact single-neuron effects as one gets them with torch.

Both compute NIE = Y(x, a_i <- a'_i) - Y(x) for neurons that are patched alone, at the last
prompt position, where Y is the logit of the harmful token minus that of the safe one there. Both
run where the model is, in its type, and subtract the values of two runs.

    Hooks     transformers' own model and a forward hook: the whole prompt again for each neuron
    Prefix    what a careful person would write instead: only the last position is run again, from
              the patched layer on, in large batches that share the prefix's keys and values

Generation is timed against transformers' own:

    Generate  `generate` with its cache of keys and values, greedy

Nothing else in jaxmed needs torch, so nothing else imports this module; `pip install
'jaxmed[parity]'` or `pip install torch==2.13.0` brings it.
"""

# pyright: reportMissingImports=false
# (torch comes with the extra `parity` alone)

import abc
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional
from torch.utils.mkldnn import to_mkldnn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models import checkpoint
from models.decoder import Decoder
from models.errors import InputError


def sees_gpu() -> bool:
    """Whether torch has the device "cuda" here."""
    return torch.cuda.is_available()


def torch_model(
    decoder: Decoder, number_type: str = "float32", device: str = "cpu", onednn: bool = False
) -> LlamaForCausalLM:
    """The same model in torch; it goes through a temporary folder.

    Args:
        decoder: the model.
        number_type: of its weights and activations: "float32", which "tf32" is too, or "bfloat16".
        device: torch's name of where it is.
        onednn: whether oneDNN does the linear layers (torch.utils.mkldnn), still in float32, on a
            CPU. By default torch leaves them to MKL, which on AMD processors is half as fast.

    Raises:
        InputError: if its family is not Llama.
    """
    if decoder.config.family != "llama":
        raise InputError(
            f"a {decoder.config.family} model has no torch baseline to be timed against; "
            "take a Llama, or leave out the comparison"
        )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(decoder, folder)
        dtype = torch.bfloat16 if number_type == "bfloat16" else torch.float32
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.eval().requires_grad_(False).to(device)
    return to_mkldnn(model) if onednn and torch.backends.mkldnn.is_available() else model


@contextlib.contextmanager
def _products(tf32: bool) -> Iterator[None]:
    """float32 products of a GPU, meanwhile in TF32 or not."""
    settings = torch.backends.cuda.matmul
    before, settings.allow_tf32 = settings.allow_tf32, tf32
    try:
        yield
    finally:
        settings.allow_tf32 = before


class Baseline(abc.ABC):
    """A way to find the effects of neurons, in the order of their layers, in batches.

    Args:
        model: LlamaForCausalLM, as of `torch_model`.
        base_ids, source_ids: tokens of the two prompts.
        harmful_token, safe_token: the tokens whose logits are compared.
        batch: neurons that are run at once; the class's own number by default.
        tf32: whether float32 products of a GPU are made in TF32.
    """

    what: ClassVar[str]  # for people
    batch: int
    base_value: torch.Tensor  # Y of the plain run; `prepare` makes it

    @torch.inference_mode()
    def __init__(
        self,
        model: LlamaForCausalLM,
        base_ids: Sequence[int],
        source_ids: Sequence[int],
        harmful_token: int,
        safe_token: int,
        batch: int | None = None,
        tf32: bool = False,
    ):
        self.model, self.batch, self.tf32 = model, batch or self.batch, tf32
        self.tokens = torch.tensor([list(base_ids)], device=model.device)
        self.compared = [harmful_token, safe_token]
        with _products(tf32):
            self.base_neurons, self.residual, self.cache = _capture(model, base_ids)
            self.source_neurons = _capture(model, source_ids)[0]
            self.prepare()

    @abc.abstractmethod
    def prepare(self) -> None:
        """Makes what all batches share, and the base value."""

    @abc.abstractmethod
    def patched(self, layers: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
        """Y of the runs with these neurons patched, in the order of their layers, [B]."""

    @torch.inference_mode()
    def effects(self, layers: np.ndarray, neurons: np.ndarray) -> np.ndarray:
        """NIE of the neurons with these layers and indices, each patched alone, float32 [U]."""
        asked = {"dtype": torch.long, "device": self.model.device}
        sorted_layers, order = torch.tensor(layers, **asked).sort()
        sorted_neurons = torch.tensor(neurons, **asked)[order]
        batches = map(
            self.patched, sorted_layers.split(self.batch), sorted_neurons.split(self.batch)
        )
        found = torch.empty(len(order), device=self.model.device)
        with _products(self.tf32):
            found[order] = (torch.cat(list(batches)) - self.base_value).float()
        return found.cpu().numpy()


class Hooks(Baseline):
    """transformers with hooks: a batch of equal prompts, and in each row one neuron patched.

    Attention is torch's own (sdpa), which transformers takes by default; the eager one is no
    faster. Of the logits only the last position's are computed.
    """

    what = "transformers with hooks"
    batch = 64

    def prepare(self) -> None:
        """As in `Baseline`."""
        self.base_value = self._values(self.tokens)

    def patched(self, layers: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
        """As in `Baseline`."""

        def patch(layer):
            rows = (layers == layer).nonzero().squeeze(1)
            units = neurons[rows]

            def hook(module, args):
                args[0][rows, -1, units] = self.source_neurons[layer, units]

            return hook

        handles = [
            self.model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(patch(layer))
            for layer in layers.unique().tolist()
        ]
        try:
            return self._values(self.tokens.expand(len(layers), -1))
        finally:
            for handle in handles:
                handle.remove()

    def _values(self, tokens: torch.Tensor) -> torch.Tensor:
        """Y of each row of [B, T] tokens, [B]."""
        logits = self.model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits[:, self.compared[0]] - logits[:, self.compared[1]]


class Prefix(Baseline):
    """A loop by hand: a neuron's row starts after its layer, and only the last position is run.

    Rows join the batch as the loop passes their layers. Most of the time is matrix products, and
    batch sizes from 256 to 2,048 differ little.
    """

    what = "prefix-cached torch loop"
    batch = 512

    def prepare(self) -> None:
        """As in `Baseline`."""
        self.layers, self.final_norm = self.model.model.layers, self.model.model.norm
        self.unembedding = self.model.lm_head.weight.to_dense()[self.compared]
        self.down = [layer.mlp.down_proj.weight.to_dense() for layer in self.layers]
        self.change = self.source_neurons - self.base_neurons
        # Of all positions but the last: [K, h, P] and [K, P, h] in each layer.
        self.keys = [layer.keys[0, :, :-1].mT.contiguous() for layer in self.cache.layers]
        self.values = [layer.values[0, :, :-1].contiguous() for layer in self.cache.layers]
        last = torch.tensor([[self.tokens.shape[1] - 1]], device=self.model.device)
        self.rotary = [part[0] for part in self.model.model.rotary_emb(self.residual, last)]
        self.base_value = self._read(self.residual[-1:])

    def patched(self, layers: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
        """As in `Baseline`."""
        x = self.residual[:0]
        for index in range(int(layers[0]), len(self.layers)):
            if len(x):
                x = self._block(index, x)
            joining = neurons[layers == index]
            if len(joining):
                written = self.change[index, joining, None] * self.down[index][:, joining].T
                x = torch.cat([x, self.residual[index] + written])
        return self._read(x)

    def _block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The last position through a block, [B, d] -> [B, d].

        With K key/value heads, G query heads for each, head size h and prefix length P.
        """
        layer, attention = self.layers[index], self.layers[index].self_attn
        rows, (kv_heads, size, length) = len(x), self.keys[index].shape

        normed = _norm(layer.input_layernorm, x)
        query = attention.q_proj(normed).view(rows, -1, size)
        key = attention.k_proj(normed).view(rows, -1, size)
        query, key = apply_rotary_pos_emb(query, key, *self.rotary, unsqueeze_dim=0)
        query = query.view(rows, kv_heads, -1, size) * size**-0.5
        value = attention.v_proj(normed).view(rows, kv_heads, 1, size)
        # One product with the shared keys for the whole batch: [K, B G, h] by [K, h, P].
        before = query.transpose(0, 1).reshape(kv_heads, -1, size) @ self.keys[index]
        own = (query * key.unsqueeze(2)).sum(-1).transpose(0, 1).reshape(kv_heads, -1, 1)
        weights = torch.cat([before, own], -1).softmax(-1)
        heads = (weights[..., :length] @ self.values[index]).view(kv_heads, rows, -1, size)
        heads = heads + weights[..., length:].view(kv_heads, rows, -1, 1) * value.transpose(0, 1)
        x = x + attention.o_proj(heads.transpose(0, 1).reshape(rows, -1))

        mlp, normed = layer.mlp, _norm(layer.post_attention_layernorm, x)
        return x + mlp.down_proj(functional.silu(mlp.gate_proj(normed)).mul_(mlp.up_proj(normed)))

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        """Y at rows of the last block's output, [B, d] -> [B]."""
        harmful, safe = (_norm(self.final_norm, x) @ self.unembedding.T).unbind(-1)
        return harmful - safe


class RoundedPrefix(Prefix):
    """The same loop on a CPU, its products in bfloat16, as torch's autocast chooses them."""

    def effects(self, layers: np.ndarray, neurons: np.ndarray) -> np.ndarray:
        """As in `Baseline`."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().effects(layers, neurons)


class Generate:
    """transformers' generation of a fixed number of tokens, greedy and with a cache.

    Args:
        model: the model.
        prompts: token ids, [B, T].
        new_tokens: of each response.
        tf32: as in `Baseline`.
    """

    what = "transformers' generate"

    def __init__(
        self, model: LlamaForCausalLM, prompts: np.ndarray, new_tokens: int, tf32: bool = False
    ):
        self.model, self.new_tokens, self.tf32 = model, new_tokens, tf32
        self.prompts = torch.tensor(np.asarray(prompts), dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def __call__(self) -> np.ndarray:
        """The responses, [B, new tokens]."""
        with _products(self.tf32):
            whole = self.model.generate(
                self.prompts,
                attention_mask=torch.ones_like(self.prompts),
                max_new_tokens=self.new_tokens,
                min_new_tokens=self.new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        return whole[:, self.prompts.shape[1] :].cpu().numpy()


def _capture(model: LlamaForCausalLM, ids: Sequence[int]):
    """A run's neurons [L, I] and blocks' outputs [L, d] at the last position, and its cache."""
    neurons, residual, handles = [], [], []
    for layer in model.model.layers:
        handles += [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: neurons.append(x[0][0, -1])),
            layer.register_forward_hook(lambda _, x, out: residual.append(out[0, -1])),
        ]
    tokens = torch.tensor([list(ids)], device=model.device)
    cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
    for handle in handles:
        handle.remove()
    return torch.stack(neurons), torch.stack(residual), cache


def _norm(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
