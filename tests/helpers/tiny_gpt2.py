"""A GPT-2 of a few thousand weights, without dropout."""

from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel

TINY = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 23, "n_positions": 12}
ENDS = {"bos_token_id": 0, "eos_token_id": 1}


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**TINY, **ENDS, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **changes))
