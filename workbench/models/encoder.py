"""A transformers encoder that gives one vector for a sentence."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.models.architecture import argument_to_json, describe, is_architecture
from workbench.models.arguments import check_choice
from workbench.models.hub import pretrained
from workbench.paths import resolve_path

Pooling = Literal["mean", "cls"]


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Pooling = "mean") -> Tensor:
    """One vector for a sequence: the mean of its real tokens' vectors, or the first token's.

    Args:
        hidden: [B, L, D]; the mean ignores padding, also if it is NaN.
        attention_mask: 1 where a token is real and 0 where it is padding, [B, L].
        pooling: "mean" or "cls".

    Returns:
        [B, D]; zeros for the mean of a sequence without a real token.
    """
    if pooling == "cls":
        return hidden[:, 0]
    real = (attention_mask != 0)[..., None]
    return hidden.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)


@final
class SentenceEncoder(nn.Module):
    """Sentences as vectors: a transformers encoder, pooled, of length 1; tokens [B, L] -> embeddings [B, D].

    What ``sentence_transformers`` computes with a pooling and a normalising module behind a transformer, as
    ``all-MiniLM-L6-v2`` has them. Reimers & Gurevych 2019, "Sentence-BERT", arXiv:1908.10084, section 3.

    The encoder's pooler, a layer behind the first token that classifiers read, takes no part and is taken out. A
    compact checkpoint holds the encoder's configuration, and is loaded without what it was made from.

    Args:
        encoder: A transformers model that gives ``last_hidden_state``; or its folder, its name on the hub or
            ``package:NAME/folder`` (see `workbench.paths`), to load it with its weights; or a configuration with
            ``model_type``, for new weights.
        pooling: "mean" of the vectors of all real tokens, or "cls", the first token's.
        normalize: Divide the vectors by their L2 norm.

    Raises:
        ValueError: If nothing can be loaded from ``encoder``, its weights are incomplete, or it is no encoder; or if
            the pooling is unknown.
    """

    def __init__(
        self,
        encoder: nn.Module | dict[str, Any] | str | os.PathLike[str],
        pooling: Pooling = "mean",
        normalize: bool = True,
    ) -> None:
        super().__init__()
        check_choice(Pooling, pooling=pooling)
        if isinstance(encoder, Mapping):
            encoder = _from_config(encoder)
        elif not isinstance(encoder, nn.Module):
            encoder = pretrained(os.fspath(encoder))
        if isinstance(getattr(encoder, "pooler", None), nn.Module):
            encoder.pooler = None  # type: ignore[assignment]
        self.encoder = encoder
        self.pooling: Pooling = pooling
        self.normalize = normalize

    @property
    def init_args(self) -> dict[str, Any]:
        """What it is built again from, as JSON: the encoder by its configuration as that is now."""
        if describe(self.encoder) is None:
            raise AttributeError(f"{type(self.encoder).__name__} does not record its arguments")
        return {"encoder": argument_to_json(self.encoder), "pooling": self.pooling, "normalize": self.normalize}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Embeddings [B, D].

        Args:
            input_ids: Tokens, int64 [B, L].
            attention_mask: 1 where a token is real and 0 where it is padding, [B, L]; None if all are real.
            token_type_ids: Segments, [B, L], for encoders that have them; None for the first.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask, **segments).last_hidden_state
        embeddings = pool(hidden, mask, self.pooling)
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings


def sentence_encoder(folder: str | os.PathLike[str]) -> SentenceEncoder:
    """The encoder in a folder that sentence-transformers saved, pooled and normalised by its ``modules.json``.

    Args:
        folder: With the model's own files beside modules.json; a path or ``package:NAME/folder``.

    Raises:
        ValueError: If there is no such file, or it needs more than a transformer, a pooling by mean or first token,
            and a norm; or the model cannot be loaded.
    """
    path = Path(resolve_path(folder))
    modules = _json(path / "modules.json")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0].get("path"):
        raise ValueError(
            f"{path / 'modules.json'}: needs {', '.join(kinds) or 'nothing'}; only Transformer, Pooling and "
            "Normalize are supported: build a SentenceEncoder, or a module of your own, around the encoder"
        )
    config = _json(path / str(modules[1].get("path", "")) / "config.json")
    modes = [str(mode) for mode, on in config.items() if mode.startswith("pooling_mode") and on is True]
    poolings: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in poolings:
        raise ValueError(f"{path}: pools by {', '.join(modes) or 'nothing'}; mean and first token are supported")
    return SentenceEncoder(path, poolings[modes[0]], normalize=len(kinds) == 3)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); give a folder that sentence-transformers saved."
        ) from error


def _from_config(config: Mapping[str, Any]) -> nn.Module:
    """An encoder with new weights."""
    from transformers import AutoConfig, AutoModel

    fields = dict(config)
    if not is_architecture({"class_path": "", "config": fields}):
        raise ValueError("the encoder's configuration needs an attention that is not built in: use eager or sdpa.")
    try:
        return AutoModel.from_config(AutoConfig.for_model(**fields))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"no encoder can be built from the configuration {', '.join(fields) or '{}'}: "
            f"{' '.join(str(error).split())[:300]}; give model_type and its fields, as in a config.json."
        ) from error
