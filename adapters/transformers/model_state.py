"""What a model's forward computes with, and whether it is still the same as it was.

Parameters and buffers, tensors elsewhere in its modules, and all the rest: classes, numbers, flags,
configs, hooks, forwards that were put in another's place. The rest is named by what it is; what
cannot be named (a hook may do anything) is asked of the user, who then says `weights=`.
"""

from __future__ import annotations

import enum
import functools
import hashlib
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.modules import module as torch_module
from transformers import PretrainedConfig

from tierloom.adapters.model_identity.config import canonical, config_text
from tierloom.stages.errors import InputError

SAMPLES = 64
"""Values of each tensor that are compared with every call."""

Part = tuple[str, str, Any]
"""(module, attribute, value); what holds others is taken apart first."""

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device,
                    torch.Size, slice, torch.memory_format, torch.layout})  # fmt: skip
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LIBRARIES = ("torch", "transformers", "accelerate", "functools", "builtins", "math")
"""Whose functions are what their names say."""
_ASKED = "pass weights=, a content id of all that the model computes with"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_NOT_COMPUTED_WITH = frozenset({
    # torch: what a module consists of is walked by name; the rest is not called in a forward
    "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "training",
    "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_load_state_dict_pre_hooks",
    "_forward_hooks_always_called", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_compiled_call_impl", "_is_torch_compile",
    # transformers: loading, saving, sharding, training
    "_is_hf_initialized", "name_or_path", "generation_config", "warnings_issued", "loss_type",
    "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected", "_fsdp_plan",
    "_keys_to_ignore_on_save", "_no_split_modules", "_skip_keys_device_placement", "_ep_plan",
    "_tp_plan", "_pp_plan", "_weight_conversions", "all_tied_weights_keys", "_loss_function",
    "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_tied_weights_keys",
    "gradient_checkpointing", "_gradient_checkpointing_func", "_output_capturing_hooks_installed",
    "hf_device_map", "is_parallelizable", "model_parallel", "_auto_class",
})  # fmt: skip


class State:
    """The state of a model at one moment. Holds samples of its tensors, none of the tensors."""

    def __init__(self, model: Any, *, vouched: bool = False) -> None:
        """`vouched`: the user names the model, so nothing need be nameable, nor every tensor
        readable. Raises InputError where something cannot be watched or is in training mode."""
        self._vouched = vouched
        self._rest: list[Any] = []
        self._tensors: dict[str, tuple[Any, ...]] = {}
        picked: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        names: dict[tuple[torch.device, torch.dtype], list[tuple[str, int]]] = {}
        with torch.no_grad():
            for owner, key, value in parts(model):
                if type(value) in _PLAIN or not isinstance(value, torch.Tensor):
                    self._rest += (owner, key, value)
                    continue
                name = f"{owner}.{key}"
                self._tensors[name], sample = self._seen(name, value)
                if sample is not None:
                    kind = (value.device, sample.dtype)
                    picked.setdefault(kind, []).append(sample)
                    names.setdefault(kind, []).append((name, sample.numel()))
            self._samples = {kind: _bits(picked[kind]) for kind in picked}
        self._names = names

    def differs(self, other: State) -> list[str] | None:
        """Names of the tensors that are not what they were in `other`, and of the first part of the
        rest that is not; None when all is as it was."""
        found = [n for n in self._tensors | other._tensors
                 if self._tensors.get(n) != other._tensors.get(n)]  # fmt: skip
        for kind in self._samples.keys() & other._samples.keys():
            a, b = self._samples[kind], other._samples[kind]
            if len(a) == len(b) and not np.array_equal(a, b):
                found += _changed(self._names[kind], a, b)
        rest = self._rest_differs(other)
        return sorted(set(found)) + rest if found or rest else None

    def _rest_differs(self, other: State) -> list[str]:
        try:
            if self._rest == other._rest:
                return []
        except (RuntimeError, TypeError, ValueError):  # values that do not compare as one bool
            pass
        a, b = ([tuple(r[i : i + 3]) for i in range(0, len(r), 3)]
                for r in (self._rest, other._rest))  # fmt: skip
        for one, two in zip(a, b, strict=False):
            if one[:2] != two[:2] or (one[2] is not two[2] and not _equal(one[2], two[2])):
                return [f"{one[0]}.{one[1]}".strip(".")]
        return [f"{max(a, b, key=len)[-1][0]} of the model".strip()]

    def _seen(self, name: str, t: torch.Tensor) -> tuple[tuple[Any, ...], torch.Tensor | None]:
        """What tells that a tensor was changed, and its sample."""
        why = _unwatched(t)
        if not why:
            return (t.data_ptr(), t._version, t.shape, t.stride()), sample_of(t)
        if not self._vouched:
            raise InputError(f"{name} {why}: {_ASKED}")
        if _wrapped(t) or t.is_quantized:
            return (type(t), t.shape, -1 if t.is_inference() else t._version), None
        return (t.data_ptr(), -1, t.shape, t.stride()), sample_of(t)


def parts(model: Any, seen: set[int] | None = None) -> Iterator[Part]:
    """All that the model's forward computes with. Raises InputError in training mode.

    `seen`: ids of objects that were taken apart before.
    """
    seen = set() if seen is None else seen
    modules = list(model.named_modules())
    seen.update(id(module) for _, module in modules)
    for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
        for hook in hooks.values():
            yield "torch", _HOOKS[0], hook
    for owner, module in modules:
        if module.training:
            raise InputError(
                f"{owner or 'the model'} is in training mode, where dropout and the like change "
                "KV: call model.eval()"
            )
        kind = type(module)
        yield owner, "class", kind
        yield owner, "its forward", kind.forward
        for key, value in vars(module).items():
            if key in _NOT_COMPUTED_WITH:
                continue
            if type(value) in _PLAIN:
                yield owner, key, value
            else:
                yield from _taken_apart(owner, key, value, seen)
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if type(tensor) in _TENSORS or tensor is None:
                    yield owner, key, tensor
                else:
                    yield from _taken_apart(owner, key, tensor, seen)


def rest_id(model: Any) -> str:
    """Hex sha256 over everything but persistent tensors; the same in every process. Raises
    InputError for what cannot be named."""
    persistent = {t.data_ptr() for t in model.state_dict().values() if _readable(t)}
    said: dict[str, Any] = {}
    for owner, key, value in parts(model):
        name = f"{owner}.{key}"
        if not isinstance(value, torch.Tensor):
            if (text := _text(value, name)) is not None:
                said[name] = text
        elif not _readable(value):
            raise InputError(f"{name} {_unwatched(value)}: {_ASKED}")
        elif value.data_ptr() not in persistent:
            raw = value.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data
            said[name] = [str(value.dtype), list(value.shape), hashlib.sha256(raw).hexdigest()]
    return hashlib.sha256(canonical(said).encode()).hexdigest()


def sample_of(t: torch.Tensor) -> torch.Tensor:
    """About `SAMPLES` values of a tensor `[n]`, evenly spaced; of a contiguous one it is a view.
    Called where no gradients are taken."""
    n = t.numel()
    step = (n // SAMPLES) | 1  # odd: of rows as long as a power of two it is not one column
    t = t.view(_BITS.get(t.element_size(), t.dtype))
    if not t.is_contiguous():
        return t[torch.unravel_index(torch.arange(0, n, step, device=t.device), t.shape)]
    return torch.as_strided(t, ((n + step - 1) // step,), (step,), t.storage_offset())


def _taken_apart(owner: str, key: str, value: Any, seen: set[int]) -> Iterator[Part]:
    kind = type(value)
    if kind in _PLAIN:
        yield owner, key, value
    elif isinstance(value, torch.Tensor):
        yield owner, key, value
        for name, inner in (getattr(value, "__dict__", None) or {}).items():
            if name not in _NOT_COMPUTED_WITH:
                yield from _taken_apart(owner, f"{key}.{name}", inner, seen)
    elif isinstance(value, dict):
        for name, inner in value.items():
            # hooks are called in their order, by numbers that say nothing else
            at = key if key in _HOOKS else f"{key}.{name}"
            yield from _taken_apart(owner, at, inner, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        ordered = value if isinstance(value, (list, tuple)) else sorted(value, key=str)
        for i, inner in enumerate(ordered):
            yield from _taken_apart(owner, f"{key}.{i}", inner, seen)
    elif isinstance(value, PretrainedConfig):
        if id(value) not in seen:
            seen.add(id(value))
            yield owner, key, _Config(value)
    elif isinstance(value, torch.nn.Module):  # outside of `_modules`, so that nobody names it
        if id(value) not in seen:
            for name, module, inner in parts(value, seen):
                yield f"{owner}.{key}.{name}", module, inner
    elif _is_function(value) or isinstance(value, (type, enum.Enum)) or not _has_fields(value):
        yield owner, key, value
    elif id(value) not in seen:
        seen.add(id(value))
        yield owner, key, kind
        if not _from_library(kind.__module__, "accelerate"):
            yield from _taken_apart(owner, key, vars(value), seen)


class _Config:
    """A config by what it says, which may be changed in place."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config, self.said = config, repr(vars(config))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self.said == other.said

    __hash__ = None  # type: ignore[assignment]


def _text(value: Any, name: str) -> Any:
    """`value` for a canonical JSON; None for what says nothing. Raises InputError."""
    kind = type(value)
    if kind in (torch.device, torch.memory_format):
        return None
    if kind in _PLAIN or isinstance(value, enum.Enum):
        return repr(value)
    if isinstance(value, _Config):
        attention = getattr(value.config, "_attn_implementation", "")
        return [config_text(value.config.to_dict()), str(attention)]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    key = name.rpartition(".")[2]
    text = _function(value, of_class=key == "its forward")
    if key in _HOOKS and _from_library(text, *_LIBRARIES):
        return None  # transformers' own only look on
    if text and key not in _HOOKS and (key != "forward" or _from_library(text, "accelerate")):
        return text
    what = f"the {type(value).__qualname__} {getattr(value, '__qualname__', '')}".strip()
    raise InputError(f"{name} is {what}, and what it computes cannot be determined: {_ASKED}")


def _function(value: Any, *, of_class: bool) -> str:
    """A function's name, and of one outside the libraries what it does; empty where that is not all
    that counts: it has state of its own."""
    if isinstance(value, functools.partial):
        return _function(value.func, of_class=False)
    if not _is_function(value):
        return ""
    text = f"{value.__module__}.{value.__qualname__}"
    if _from_library(text, *_LIBRARIES):
        return text
    if not isinstance(value, FunctionType):
        return ""
    if not of_class and (value.__closure__ or "<" in value.__qualname__):
        return ""
    code = value.__code__
    does = (code.co_code, code.co_names, [c for c in code.co_consts if type(c) in _PLAIN])
    return f"{text} {hashlib.sha256(repr((does, value.__defaults__)).encode()).hexdigest()}"


def _is_function(value: Any) -> bool:
    return isinstance(
        value, (FunctionType, BuiltinFunctionType, MethodType, functools.partial)
    ) or type(value).__name__ in ("builtin_function_or_method", "method_descriptor")


def _from_library(module: str, *libraries: str) -> bool:
    return module.partition(".")[0] in libraries


def _has_fields(value: Any) -> bool:
    return bool(getattr(value, "__dict__", None))


def _readable(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and not _wrapped(t) and not t.is_quantized


def _wrapped(t: torch.Tensor) -> bool:
    """Without bytes of its own that could be read here."""
    own = type(t) in _TENSORS or not hasattr(t, "__tensor_flatten__")
    return not own or t.is_meta or t.layout is not torch.strided


def _unwatched(t: torch.Tensor) -> str:
    """Why a change of this tensor might go unseen; empty when it would not."""
    if t.is_meta:
        return "is offloaded and cannot be read"
    if _wrapped(t) or t.is_quantized:
        return f"is a {type(t).__name__} ({t.dtype}, {t.layout}) whose content cannot be read"
    if t.is_inference():
        return "was made in inference mode, where torch does not count changes"
    return ""


def _bits(samples: list[torch.Tensor]) -> npt.NDArray[np.uint8]:
    """Samples of one dtype and device, concatenated: compared by numpy, whose threads are none,
    since torch's would wait for each other at every call."""
    return torch.cat(samples).cpu().view(torch.uint8).numpy()


def _changed(
    names: list[tuple[str, int]], a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]
) -> Iterator[str]:
    at, size = 0, len(a) // max(1, sum(n for _, n in names))
    for name, n in names:
        if not np.array_equal(a[at : at + n * size], b[at : at + n * size]):
            yield name
        at += n * size


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, TypeError, ValueError):
        return False
