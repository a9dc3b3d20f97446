"""Distilling language models: positions, vocabularies, a loss that never holds [tokens, vocabulary]. Torch only."""

from distill.language.chunked import FactoredLogits, chunked_soft_target, chunked_terms
from distill.language.heads import check_headless, check_vocabulary, headless, pad_vocabulary, shared_vocabulary
from workbench.models.positions import IGNORED, shift, valid_tokens

__all__ = [
    "IGNORED",
    "FactoredLogits",
    "check_headless",
    "check_vocabulary",
    "chunked_soft_target",
    "chunked_terms",
    "headless",
    "pad_vocabulary",
    "shared_vocabulary",
    "shift",
    "valid_tokens",
]
