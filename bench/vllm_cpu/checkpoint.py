"""A small Llama whose weights are random, and a tokenizer that says its tokens' names.

No download, and its answers depend on every token that it has read: with vLLM's own
dummy weights all logits are equal, and a wrong KV cache would go unseen.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM

_VOCABULARY = 8192
_LAYERS, _KV_HEADS, _HEAD = 8, 8, 64
TOKEN_BYTES = 2 * _LAYERS * _KV_HEADS * _HEAD * 2  # of KV cache, in bfloat16


def write(folder: Path, max_tokens: int) -> None:
    """Write what vLLM reads, unless it is there.

    Args:
        folder: Where to.
        max_tokens: Of a prompt and its answer.
    """
    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=_LAYERS,
        # Half the heads have a KV cache: 16 KiB a token, and 4 MiB a chunk of 256.
        num_attention_heads=16,
        num_key_value_heads=_KV_HEADS,
        head_dim=_HEAD,
        max_position_embeddings=max_tokens,
        # Wide enough for logits that differ by more than bfloat16 rounds away.
        initializer_range=0.08,
        torch_dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = {f"w{token}": token for token in range(_VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "w0",
        "eos_token": "w1",
        "unk_token": "w2",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
