"""Teacher: a trained network, or several, frozen and in eval mode."""

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from distill.losses import check_classes
from workbench.checkpoints import compact
from workbench.checkpoints.int8 import quantize
from workbench.definitions import code_of, definitions_of
from workbench.models.architecture import describe
from workbench.models.copying import copied
from workbench.models.forward import keywords_of
from workbench.models.wrappers import class_of, plain_state, unwrap
from workbench.tasks import LogitsSpec, OutputType, select_logits

TeacherSource = nn.Module | str | Path | Callable[..., Any]
Precision = Literal["bf16", "int8"]
Average = Literal["logits", "probabilities"]
_HALF = (torch.bfloat16, torch.float16)
# These entries of a configuration change nothing that a teacher answers.
_PASSING = ("_name_or_path", "transformers_version", "use_cache")


@final
class Teacher:
    """A frozen network in eval mode outside of every module tree; or several, whose outputs are averaged.

    Not an ``nn.Module``: a module that holds it has its weights neither in ``parameters()``, nor in the optimizer, DDP
    buckets, the state dict or a checkpoint, and ``train()`` on the holder leaves it in eval mode. Copies of
    the holder share it.

    Several teachers with weights w_i, which are scaled to sum 1, answer with the tensor of logits
    sum_i w_i z_i (``average="logits"``) or log sum_i w_i softmax(z_i) (``"probabilities"``).

    Args:
        source: A trained network, which is copied; a folder: a compact checkpoint, a finished stage, or a model that
            transformers loads (also a hub name), as the class that its configuration names; or a function of the
            model's arguments, which is called as it is. Or a list of these.
        precision: "bf16" computes in bfloat16, "int8" in linear layers of 8 bits
            (:class:`workbench.checkpoints.int8.Int8Linear`), both on a GPU and on CPU, and its outputs are float32.
            None leaves the network in its own precision, also where the student is trained under autocast.
        compile: Compile the network with ``torch.compile`` at the first call. Calls for features are not compiled.
        weights: Weights of several teachers; equal if None.
        average: Which outputs of several teachers are averaged; probabilities are those of classes along the last
            axis.
        logits: Where the logits are in what a network returns, see :func:`workbench.tasks.select_logits`: a key, an
            index or a function; None for a tensor, or an output with ``logits``.

    Raises:
        ValueError: If the source cannot be found or lacks weights, a precision is set for a function, or the
            weights do not fit.
    """

    def __init__(
        self,
        source: TeacherSource | Sequence[TeacherSource],
        precision: Precision | None = None,
        compile: bool = False,
        weights: Sequence[float] | None = None,
        average: Average = "logits",
        logits: LogitsSpec | None = None,
    ) -> None:
        if precision is not None and precision not in get_args(Precision):
            raise ValueError(f"precision is {precision!r}: choose bf16, int8, or None for the network's own")
        if average not in get_args(Average):
            raise ValueError(f"average is {average!r}: choose from {', '.join(get_args(Average))}")
        several = isinstance(source, (list, tuple))
        sources: list[Any] = list(source) if several else [source]  # type: ignore[arg-type]
        self.weights = _shares(weights, len(sources), several)
        self.precision: Precision | None = precision
        self.average: Average = average
        self.logits = logits
        self._members = [_Member(each, precision, compile) for each in sources]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, without a graph; of several, the averaged logits.

        The network follows the inputs to their device; floating-point inputs are read in the network's precision,
        since the student's may be another.

        Raises:
            ValueError: If several do not give logits of one shape.
        """
        return self.outputs(args, kwargs)[0]

    @torch.no_grad()
    def outputs(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], features: Iterable[str] = (), match: bool = False
    ) -> tuple[Any, dict[str, Tensor]]:
        """The output for ``(*args, **kwargs)``, and the inputs or outputs of the submodules named by ``features``.

        Args:
            args: Positional arguments of the network.
            kwargs: Keyword arguments.
            features: Paths or patterns, as :func:`distill.features.capture` takes them.
            match: Whether each network gets only the keyword arguments that it names, see :attr:`keywords`.

        Raises:
            ValueError: If features of several teachers or of a function are requested, or a name matches nothing.
        """
        names = [features] if isinstance(features, str) else list(features)
        if names and (len(self._members) > 1 or self._members[0].network is None):
            what = "several teachers" if len(self._members) > 1 else "a function"
            raise ValueError(f"features {names} are requested of {what}: only a single network has them")
        given = [member.matching(kwargs) if match else kwargs for member in self._members]
        if len(self._members) == 1:
            return self._members[0].run(args, given[0], names)
        outputs = [
            select_logits(member.run(args, own, [])[0], self.logits, "a teacher to be averaged")
            for member, own in zip(self._members, given)
        ]
        if others := [list(each.shape) for each in outputs if each.shape != outputs[0].shape]:
            raise ValueError(
                f"teachers to be averaged give logits {list(outputs[0].shape)} and {others[0]}: "
                "give ones over the same classes"
            )
        return averaged(outputs, self.weights, self.average), {}

    def select(self, raw: Any) -> Tensor:
        """The logits among what a call returned.

        Raises:
            ValueError: If there are none.
        """
        return select_logits(raw, None if len(self._members) > 1 else self.logits, "the teacher")

    def check_outputs(self, outputs: OutputType) -> None:
        """Refuse to average probabilities of anything but classes along the last axis.

        Raises:
            ValueError: If several teachers average probabilities, and the outputs are something else.
        """
        if len(self._members) > 1 and self.average == "probabilities" and outputs != OutputType("classes"):
            where = f" along axis {outputs.class_dim}" if outputs.kind == "classes" else ""
            raise ValueError(
                f"several teachers average probabilities of classes along the last axis, and the outputs are "
                f"{outputs.kind}{where}: give average='logits'"
            )

    def fingerprint(self) -> str:
        """SHA-256 of architecture, code, weights, precision, how several teachers are averaged and where logits are.

        Code counts as far as it is not installed: see :mod:`workbench.definitions`. Of a function it does not cover the
        objects that its code refers to.
        """
        settings: list[Any] = [self.precision, self.weights, self.average]
        if self.logits is not None:
            settings.append(_digest_of_function(self.logits).hex() if callable(self.logits) else self.logits)
        digest = hashlib.sha256(json.dumps(settings).encode())
        for member in self._members:
            digest.update(member.fingerprint())
        return digest.hexdigest()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        # A teacher never changes, and may be far larger than its student: copies share it.
        return self

    @property
    def keywords(self) -> list[tuple[str, ...] | None]:
        """The keyword arguments that each network or function takes by name; None where it takes any."""
        return [member.keywords for member in self._members]

    @property
    def networks(self) -> list[nn.Module]:
        """Those of the teachers that are networks, for reading."""
        return [member.network for member in self._members if member.network is not None]

    @property
    def module(self) -> nn.Module:
        """The network, for reading; of several, a list of them.

        Raises:
            ValueError: If the teacher is a function.
        """
        networks = [member.network for member in self._members]
        if any(network is None for network in networks):
            raise ValueError("the teacher is a function: it has no module to look at")
        modules: list[Any] = networks
        return modules[0] if len(modules) == 1 else nn.ModuleList(modules)


def averaged(logits: Sequence[Tensor], weights: Sequence[float], average: Average = "logits") -> Tensor:
    """Weighted mean of several teachers' logits [..., classes], or the log of that of their probabilities.

    Args:
        logits: One tensor a teacher, all of one shape.
        weights: One a teacher, of sum 1.
        average: "logits": sum_i w_i z_i; "probabilities": log sum_i w_i softmax(z_i).

    Returns:
        [..., classes], at least float32.

    Raises:
        ValueError: If probabilities of fewer than two classes are to be averaged.
    """
    wide = [each if each.dtype == torch.float64 else each.float() for each in logits]
    if average == "logits":
        # A teacher of weight 0 is left out: 0 * inf is NaN.
        parts = [weight * each for weight, each in zip(weights, wide) if weight > 0]
        return torch.stack(parts).sum(0)
    check_classes(logits[0])
    parts = [math.log(weight) + torch.log_softmax(each, -1) for weight, each in zip(weights, wide) if weight > 0]
    return torch.logsumexp(torch.stack(parts), 0)


@final
class _Member:
    """One network, or one function, with its precision."""

    def __init__(self, source: TeacherSource, precision: Precision | None, compile: bool) -> None:
        self.network: nn.Module | None = None
        self._function: Callable[..., Any] | None = None
        self._precision = precision
        if callable(source) and not isinstance(source, nn.Module):
            if precision is not None or compile:
                option = f"precision {precision!r}" if precision is not None else "compile"
                raise ValueError(f"{option} is set for a function: only a network's can be chosen here")
            self._function = source
            return
        if not isinstance(source, nn.Module | str | Path):
            raise ValueError(
                f"a teacher is a {type(source).__name__}: give networks, folders to load them from or functions; to "
                "learn from several out of a cache, cache them together, cache_teacher([one, other], ...)"
            )
        # The copy keeps freezing from reaching into the caller's network; a network just loaded has no other user.
        network = copied(unwrap(source)) if isinstance(source, nn.Module) else _load(source)
        if precision == "bf16":
            network = network.to(torch.bfloat16)
        elif precision == "int8":
            network = quantize(network)
        self.network = network.requires_grad_(False).eval()
        _keep_no_cache(self.network)
        self._compile = compile or "_orig_mod" in getattr(source, "_modules", ())  # as torch.compile left it

    @functools.cached_property
    def keywords(self) -> tuple[str, ...] | None:
        """Names of keyword arguments; None for any."""
        return keywords_of(self._function if self.network is None else self.network)

    def matching(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of the arguments that it takes."""
        return {name: kwargs[name] for name in kwargs if self.keywords is None or name in self.keywords}

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any], features: list[str]) -> tuple[Any, dict[str, Tensor]]:
        """The raw output, and the features."""
        if self.network is None:
            assert self._function is not None
            return self._function(*args, **kwargs), {}
        self.network.eval()
        args, kwargs, device = self._moved(args, kwargs)
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            if features:
                from distill.features import capture

                # The module itself: compiled code does not look for hooks that came after it.
                with capture(self.network, features, clone=True) as captured:
                    raw = self.network(*args, **kwargs)
                    return self._wide(raw), self._wide(captured.take())
            if self._function is None:
                self._function = torch.compile(self.network) if self._compile else self.network
            return self._wide(self._function(*args, **kwargs)), {}

    def fingerprint(self) -> bytes:
        """SHA-256 of architecture and weights; of a function its name and code."""
        if self.network is None:
            return _digest_of_function(self._function)
        return _digest_of_network(self.network)

    def _moved(self, args: Any, kwargs: Any) -> tuple[Any, Any, str]:
        """The arguments in the network's precision, after the network went to their device; which kind that is."""
        assert self.network is not None
        state = chain(self.network.parameters(), self.network.buffers())
        own = next((tensor for tensor in state if tensor.is_floating_point()), None)
        first = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if own is None or first is None:
            reference = first if own is None else own
            return args, kwargs, "cpu" if reference is None else reference.device.type
        if own.device != first.device:
            self.network.to(first.device)
        dtype = own.dtype
        args, kwargs = tree_map_only(
            Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, (tuple(args), dict(kwargs))
        )
        return args, kwargs, first.device.type

    def _wide(self, output: Any) -> Any:
        if self._precision is None:
            return output
        return tree_map_only(Tensor, lambda value: value.float() if value.dtype in _HALF else value, output)


def _keep_no_cache(network: nn.Module) -> None:
    """Turn off the keys and values that transformers models keep for a next token, which a teacher never has."""
    for part in network.modules():
        if getattr(config := getattr(part, "config", None), "use_cache", None):
            config.use_cache = False  # type: ignore[union-attr]


def _shares(weights: Sequence[float] | None, count: int, several: bool) -> list[float]:
    if count == 0:
        raise ValueError("the list of teachers is empty: give at least one")
    if weights is None:
        return [1 / count] * count
    if not several:
        raise ValueError(f"weights is {list(weights)} for one teacher: give a list of teachers, or no weights")
    if len(weights) != count:
        raise ValueError(f"weights is {list(weights)} for {count} teachers: give one weight each")
    if not all(0 <= weight < math.inf for weight in weights) or sum(weights) <= 0:
        raise ValueError(f"weights is {list(weights)}: give finite numbers of at least 0, one of them above")
    return [weight / sum(weights) for weight in weights]


def _digest_of_network(network: nn.Module) -> bytes:
    described = describe(network) or {"class": f"{class_of(network).__module__}.{class_of(network).__qualname__}"}
    if isinstance(config := described.get("config"), dict):
        described["config"] = {name: value for name, value in config.items() if name not in _PASSING}
    described |= {"code": code} if (code := definitions_of([network])) else {}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, value in plain_state(network, network.state_dict()).items():
        if not isinstance(value, Tensor):
            digest.update(f"{name} {value!r}".encode())
            continue
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()


def _digest_of_function(function: Any) -> bytes:
    if hasattr(function, "fingerprint"):
        return hashlib.sha256(str(function.fingerprint()).encode()).digest()
    named = function if hasattr(function, "__qualname__") else type(function)
    digest = hashlib.sha256(f"{named.__module__}.{named.__qualname__}".encode())
    if (code := getattr(function, "__code__", None)) is not None:
        digest.update(code_of(code).encode())
    digest.update(json.dumps(definitions_of([function])).encode())
    return digest.digest()


def _load(source: str | Path) -> nn.Module:
    path = Path(source)
    if (folder := _checkpoint(path)) is not None:
        return compact.load(folder)
    if (path / "config.json").is_file() or _is_hub_name(source):
        return _from_transformers(str(source))
    if next(_caches(path), None) is not None:
        raise ValueError(f"teacher '{source}' is a cache, not a network: read it with distill.CachedTeacher")
    state = "holds none" if path.exists() else "does not exist"
    raise ValueError(f"teacher '{source}' {state}: give a finished stage, a compact checkpoint or a transformers model")


def _checkpoint(path: Path) -> Path | None:
    try:
        return compact.find(path)
    except ValueError:
        return None


def _caches(path: Path) -> Iterator[Path]:
    return chain(path.glob("cache.json"), path.glob("*/cache.json"), path.glob("cache/*/cache.json"))


def _is_hub_name(source: str | Path) -> bool:
    """Whether it could be one: ``name`` or ``owner/name``, and nothing on this disk."""
    name = str(source)
    plain = not isinstance(source, Path) and not name.startswith((".", "/", "~")) and name.count("/") <= 1
    return plain and name != "" and not Path(name).exists()


def _from_transformers(name: str) -> nn.Module:
    from safetensors import SafetensorError

    try:
        model, missing = _with_missing(_class_for(name), name)
        if missing and all("pooler" in key.split(".") for key in missing) and _is_plain(model):
            # A plain encoder out of a model that had no use for the pooler: without one it is whole.
            model, missing = _with_missing(type(model), name, add_pooling_layer=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"teacher '{name}' is neither a stage, nor a compact checkpoint, nor a model that transformers loads: "
            f"{reason[:300]}"
        ) from error
    if missing:
        # transformers fills them with random numbers and goes on.
        raise ValueError(
            f"teacher '{name}' lacks {len(missing)} weights of a {type(model).__name__}, such as '{missing[0]}': "
            "give one whose head was trained"
        )
    return model


def _class_for(name: str) -> Any:
    """The class that the model's configuration names, where transformers has it, else a classifier of its kind."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    for architecture in config.architectures or ():
        cls = getattr(transformers, architecture, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    return transformers.AutoModelForSequenceClassification


def _with_missing(cls: Any, name: str, **options: Any) -> tuple[nn.Module, list[str]]:
    model, info = cls.from_pretrained(name, output_loading_info=True, use_safetensors=True, **options)
    return model, sorted(info["missing_keys"])


def _is_plain(model: Any) -> bool:
    """Whether ``model`` is an encoder without a head that can be built without its pooler."""
    return model.base_model is model and "add_pooling_layer" in inspect.signature(type(model)).parameters


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put the module into eval mode for a while; afterwards every submodule is back in its own mode."""
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
