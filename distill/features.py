"""Features: inputs and outputs of submodules, by path, and the projectors that make widths equal. Torch only."""

import difflib
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from distill.fused import PARTS, splitter
from workbench.models.wrappers import named_modules, unwrap, without_prefixes

_SHARE = re.compile(r"1/1|[1-2]/2|[1-3]/3|[1-4]/4")
_TOKENS = re.compile(r"\*\*|\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


@final
class Features(Mapping[str, Tensor]):
    """Inputs and outputs of submodules in the model's last forward, by name, in the order of the modules.

    Reading a name that the last forward did not fill, or filled more than once, is an error, never a tensor of an
    earlier forward. A copy, e.g. in a copy of the model, is empty and stays so.
    """

    def __init__(self, names: Iterable[str] = (), clone: bool = False) -> None:
        self._names = list(names)
        self._clone = clone
        self._captured: dict[str, tuple[Tensor | None, int | None]] = {}
        self._calls: dict[str, int] = {}
        self._running = self._graph = False

    def __getitem__(self, name: str) -> Tensor:
        name = name.removesuffix(":output")
        if name not in self._names:
            raise KeyError(f"{name!r} is not captured: {', '.join(self._names) or 'the capture has ended'}")
        if name not in self._captured:
            raise ValueError(
                f"{name!r} was not called since the features were last taken: run the model inside the with block, or "
                "capture a part that its forward calls"
            )
        if (calls := self._calls[name]) > 1:
            raise ValueError(f"{name!r} was called {calls} times in one forward: capture a part that is called once")
        tensor, version = self._captured[name]
        if tensor is None:
            raise ValueError(f"{name!r} has no tensor there: capture another part of the model")
        if version is not None and tensor._version != version:
            raise ValueError(
                f"{name!r} was changed in place by what came after it, such as an activation with inplace=True: "
                "keep a copy, capture(..., clone=True)"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.removesuffix(":output") in self._names

    def __deepcopy__(self, memo: dict[int, Any]) -> "Features":
        return Features()

    def __reduce__(self) -> tuple[type["Features"], tuple[()]]:
        return Features, ()

    def take(self) -> dict[str, Tensor]:
        """All of them, as a dict; none is left here.

        Raises:
            ValueError: If one cannot be read.
        """
        features = dict(self)
        self._clear()
        return features

    def _clear(self) -> None:
        self._captured, self._calls = {}, {}

    def _close(self) -> None:
        self._clear()
        self._names = []

    def _begin(self, *_: Any) -> None:
        """A forward of the whole model starts."""
        if not _recomputing():
            self._clear()
            self._running, self._graph = True, torch.is_grad_enabled()

    def _end(self, *_: Any) -> None:
        if not _recomputing():
            self._running = False

    def _put(self, name: str, value: Any) -> None:
        if name not in self._names or _recomputing():
            return
        tensor = _first_tensor(value)
        if self._running and self._graph and not torch.is_grad_enabled() and _in_reentrant_checkpoint():
            raise ValueError(
                f"{name!r} is computed without a graph by reentrant activation checkpointing, so no loss on it could "
                "train the model: checkpoint with use_reentrant=False"
            )
        if tensor is not None and self._clone:
            tensor = tensor.clone()
        # Parts may be called outside of a forward of the whole; the last such call counts.
        self._calls[name] = self._calls.get(name, 0) + 1 if self._running else 1
        self._captured[name] = tensor, None if tensor is None or tensor.is_inference() else tensor._version


@contextmanager
def capture(model: nn.Module, names: str | Iterable[str], clone: bool = False) -> Iterator[Features]:
    """Capture inputs or outputs of submodules while the model runs.

    ::

        with capture(model, ["encoder.layer.*", "classifier:input"]) as features:
            loss = hint(features["encoder.layer.3"], ...) + model(**batch).loss

    A name is a submodule's path, as in ``model.named_modules()``, with ``:output`` (the default) or ``:input`` behind
    it. Of a layer that makes queries, keys and values at once, such as GPT-2's ``c_attn`` or torch's
    ``MultiheadAttention``, ``:query``, ``:key`` and ``:value`` are one of them, [B, L, heads * width]; where its class
    is not known, ``:1/3`` is the first of three equal parts. In a pattern ``*``, ``?`` and ``[...]`` stand for anything
    but a dot, ``**`` also for dots: ``layers.*`` is each layer and nothing in it. Of a tuple, mapping or transformers
    output the first tensor counts; of inputs the first positional one, else ``hidden_states``, else the first one given
    by keyword.

    The features are those of the model's last forward, with their graph where there was one; recomputation in the
    backward pass of activation checkpointing changes nothing. Wrappers are looked through: names of a compiled, DDP,
    FSDP, Fabric or PEFT model are those of the model inside. Inside the block torch's fused encoder and attention
    kernels are off, since they skip submodules, and compiled code runs eagerly, since it may have been compiled
    without these hooks; both only change rounding. On exit, also by an exception, no hook is left and the features
    are gone.

    Args:
        model: The model, in any mode.
        names: Paths and patterns.
        clone: Keep copies, for models that change these tensors in place afterwards.

    Yields:
        Name -> tensor, in module order, input before output; refilled by each forward. ``take()`` empties it.

    Raises:
        ValueError: If a name or pattern matches nothing; on reading, if the last forward did not call a submodule,
            called it more than once, gave it no tensor, or changed it in place afterwards.
    """
    model = _without_wrappers(model)
    # A layer with adapters returns the sum of both.
    modules = dict(named_modules(model, remove_duplicate=False, adapted=True))
    sites = _sites(model, modules, [names] if isinstance(names, str) else names)
    features = Features(sites, clone)
    if not sites:
        yield features
        return
    with ExitStack() as stack:
        stack.callback(features._close)
        fused = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(model.register_forward_pre_hook(features._begin, prepend=True).remove)
        for name, module in sites.items():
            path, _, side = name.partition(":")
            if side == "input":
                hook = functools.partial(_put_input, features, name)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            elif side:
                part = splitter(modules.get(path.rpartition(".")[0], model), module, path, side)
                hook = functools.partial(_put_part, features, name, part)
                handle = module.register_forward_hook(hook, with_kwargs=True)
            else:
                handle = module.register_forward_hook(functools.partial(_put_output, features, name))
            stack.callback(handle.remove)
        stack.callback(model.register_forward_hook(features._end, always_call=True).remove)
        yield features


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to a model, to a part of it or to one of their methods."""
    for part in model.modules():
        if part._compiled_call_impl is not None or "_orig_mod" in part._modules:
            return True
        if any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(part).values()):
            return True
    return False


def make_projector(student: Tensor, teacher: Tensor) -> nn.Module:
    """A learned map from the student's features to the shape of the teacher's.

    Vectors and sequences, [B, D] and [B, L, D]: a linear layer with bias (as TinyBERT). Images, [B, C, H, W]: adaptive
    average pooling to the teacher's height and width where they differ, then a 1x1 convolution with bias (as FitNets).
    The identity where nothing differs.

    Args:
        student: One batch of the student's features.
        teacher: The teacher's for the same inputs.

    Returns:
        The module, on the student's device and in its precision (float32 under autocast).

    Raises:
        ValueError: If the shapes are not two of one kind.

    Source: Romero et al. 2015, arXiv:1412.6550, section 2.2; Jiao et al. 2020, arXiv:1909.10351, equation 8.
    """
    image = student.dim() == 4
    free = {1, 2, 3} if image else {student.dim() - 1}
    same = student.dim() == teacher.dim() and all(
        a == b for axis, (a, b) in enumerate(zip(student.shape, teacher.shape)) if axis not in free
    )
    if student.dim() not in (2, 3, 4) or not same:
        raise ValueError(
            f"student features are {list(student.shape)} and teacher features {list(teacher.shape)}: both are to be "
            "[B, D], [B, L, D] or [B, C, H, W] of the same inputs"
        )
    low = torch.is_autocast_enabled(student.device.type) or not student.is_floating_point()
    place: dict[str, Any] = {"device": student.device, "dtype": torch.float32 if low else student.dtype}
    axis = 1 if image else -1
    width, target = student.shape[axis], teacher.shape[axis]
    maps: list[nn.Module] = []
    if image and student.shape[2:] != teacher.shape[2:]:
        maps.append(nn.AdaptiveAvgPool2d((teacher.shape[2], teacher.shape[3])))
    if width != target:
        maps.append(nn.Conv2d(width, target, 1, **place) if image else nn.Linear(width, target, **place))
    if len(maps) > 1:
        return nn.Sequential(*maps)
    return maps[0] if maps else nn.Identity()


def matches(name: str, wanted: str) -> bool:
    """Whether ``name``, as :func:`capture` yields it, is matched by the path or pattern ``wanted``."""
    (path, _, side), (pattern, _, wanted_side) = name.partition(":"), wanted.partition(":")
    return (side or "output") == (wanted_side or "output") and _regex(pattern).fullmatch(path) is not None


def _put_input(features: Features, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    features._put(name, (args, kwargs.get("hidden_states"), kwargs))


def _put_output(features: Features, name: str, module: nn.Module, args: Any, output: Any) -> None:
    features._put(name, output)


def _put_part(features: Features, name: str, part: Any, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    features._put(name, part(args, kwargs, output))


def _first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a nest of sequences and mappings."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((tensor for part in parts if (tensor := _first_tensor(part)) is not None), None)


def _recomputing() -> bool:
    """Whether this runs in a backward pass, as the second forward of activation checkpointing does."""
    return torch._C._current_graph_task_id() != -1


def _in_reentrant_checkpoint() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is checkpoint.CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def _without_wrappers(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(f"features are of an nn.Module's submodules, and {type(model).__name__} is none")
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError("DataParallel runs copies of the model, whose features are lost: use DistributedDataParallel")
    return unwrap(model)


def _sites(model: nn.Module, modules: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, nn.Module]:
    """The module of every name that is to be captured, in order, of all ``modules`` by path."""
    modules = {path: module for path, module in modules.items() if path}
    wanted: set[str] = set()
    sides: dict[str, None] = {}
    for name in names:
        path, _, side = name.partition(":")
        if side not in ("", "input", "output", *PARTS) and not _SHARE.fullmatch(side):
            raise ValueError(
                f"{name!r} ends in ':{side}': ':input' or ':output' can be captured, of fused attention layers also "
                "':query', ':key' and ':value', or ':1/3' and the like of equal parts"
            )
        matches_path = _regex(path).fullmatch
        matching = [module_path for module_path in modules if matches_path(module_path)]
        if not matching:
            raise ValueError(f"{name!r} matches no submodule of {type(model).__name__}: {_near(path, list(modules))}")
        sides[side] = None
        wanted |= {module_path + (f":{side}" if side not in ("", "output") else "") for module_path in matching}
    last = [f":{side}" for side in sorted(sides, key=_place) if side not in ("", "input", "output")]
    return {
        path + end: module for path, module in modules.items() for end in (":input", "", *last) if path + end in wanted
    }


def _place(side: str) -> tuple[int, str]:
    return (PARTS.index(side) if side in PARTS else len(PARTS), side)


@functools.lru_cache(maxsize=1024)
def _regex(pattern: str) -> re.Pattern[str]:
    meaning = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    parts = []
    for token in _TOKENS.findall(pattern):
        if token in meaning:
            parts.append(meaning[token])
        elif len(token) > 1:
            inside = re.sub(r"[\\\[]", r"\\\g<0>", token[1:-1])
            parts.append(f"[^{inside[1:]}.]" if inside.startswith("!") else f"(?!\\.)[{inside}]")
        else:
            parts.append(re.escape(token))
    return re.compile("".join(parts))


def _near(path: str, names: list[str]) -> str:
    if (plain := without_prefixes(path)) != path:
        return f"say {plain!r}, names are those of the model inside"
    close = difflib.get_close_matches(path, names, n=5, cutoff=0.5)
    close = close or [name for name in names if "." not in name][:10]
    return f"near are {', '.join(close)}" if close else "it has none"
