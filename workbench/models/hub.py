"""Models of transformers, for recipes: pretrained ones, and untrained ones from a few numbers."""

from typing import Any

from torch import nn

from workbench.messages import closest
from workbench.paths import resolve_path


def from_config(architecture: str, config: dict[str, Any]) -> nn.Module:
    """An untrained model of transformers.

    A checkpoint describes it by its configuration, and so does not need this function to load it.

    Args:
        architecture: Name of a model class of transformers with a head for the task, such as
            ``BertForSequenceClassification``.
        config: What differs from the defaults of its configuration, such as ``{num_hidden_layers: 4}``.

    Raises:
        ValueError: If there is no such class, its configuration has no such entry, or it cannot be built.
    """
    cls = _class(architecture)
    if not hasattr(cls, "config_class"):
        raise ValueError(f"{architecture} is no one model: give a class such as BertForSequenceClassification")
    default = cls.config_class()
    # A configuration accepts any key, and a misspelt one would change nothing.
    if unknown := [name for name in config if not hasattr(default, name)]:
        close = closest(unknown[0], dir(default))
        raise ValueError(
            f"{cls.config_class.__name__} has no {unknown[0]!r}"
            + (f"; did you mean {close!r}?" if close else ": see its documentation for what it has")
        )
    try:
        return cls(cls.config_class(**config))
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{architecture} cannot be built from {config}: {error}") from error


def pretrained(name: str, architecture: str = "AutoModel", options: dict[str, Any] | None = None) -> nn.Module:
    """A model of transformers with its weights, in training mode.

    Args:
        name: A folder that transformers saved (see `workbench.paths`), or a hub name. Weights are read from
            safetensors only.
        architecture: Name of a model class of transformers, such as ``AutoModelForSequenceClassification``. A head
            that the folder does not have gets new weights.
        options: More arguments of ``from_pretrained``, such as ``{num_labels: 150}``.

    Raises:
        ValueError: If there is no such class, or the model cannot be loaded, or not all of it below its head.
    """
    cls = _class(architecture)
    try:
        model, info = cls.from_pretrained(
            resolve_path(name), **(options or {}), output_loading_info=True, use_safetensors=True
        )
    except (OSError, TypeError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name}: {architecture} cannot be loaded from there ({reason})") from error
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    if missing := sorted(key for key in info["missing_keys"] if key.startswith(prefix) and "pooler." not in key):
        # transformers fills them with random numbers and goes on.
        raise ValueError(f"{name}: lacks {len(missing)} weights, such as {missing[0]!r}: give a whole model.")
    return model.train()


def _class(architecture: str) -> Any:
    import transformers

    cls = getattr(transformers, architecture, None)
    if isinstance(cls, type) and hasattr(cls, "from_pretrained") and ("For" in architecture or "Model" in architecture):
        return cls
    close = closest(architecture, (name for name in dir(transformers) if "For" in name or "Model" in name))
    raise ValueError(
        f"transformers has no model {architecture!r}"
        + (f"; did you mean {close!r}?" if close else ": give the name of one of its model classes")
    )
