"""A second device made up on the processor: tensors of it are marked, and no operation may mix them with others.

It refuses what a GPU refuses, an operation on tensors of two devices, and moves what is moved. The numbers themselves
are computed where all others are, so that a model that is half on it must give what it gives in one place.
"""

import copy
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel

from vectors.residual import decoder, embedding

OTHER = torch.device("cuda", 1)


class Elsewhere(Tensor):
    """A tensor on the other device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = self.clone().as_subclass(Elsewhere)
        return memo[id(self)]


def on_other(value: Any) -> bool:
    return isinstance(value, Elsewhere)


def is_other(device: Any) -> bool:
    return device is not None and not isinstance(device, torch.dtype | bool) and torch.device(device) == OTHER


class TwoDevices(TorchFunctionMode):
    """Inside it `cuda:1` exists."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        other = [on_other(tensor) for tensor in tensors]
        name = getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner is Tensor.device:
            return OTHER if other[0] else func(*args, **kwargs)
        if name == "__deepcopy__" and not other[0]:  # what else was copied comes as an argument too
            return func(*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and other[0]:
            raise TypeError("can't convert a tensor of the other device to numpy")
        moved = _target(func, args, kwargs)
        if moved is not None:
            return _moved(func, args, kwargs, moved)
        if is_other(kwargs.get("device")):
            return _mark(func(*args, **kwargs | {"device": "cpu"}))
        free = func in (Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__) and other and other[0]
        sized = [mark for tensor, mark in zip(tensors, other, strict=True) if tensor.ndim or mark]
        if len(set(sized)) > 1 and not free and name != "__set__":
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        found = func(*args, **kwargs)
        here = is_plain(kwargs.get("device"))
        return _mark(found) if any(other) and not here and name != "__get__" or _like(owner, other) else found


def is_plain(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _like(owner: Any, other: list[bool]) -> bool:
    """Views that are attributes (`mT`, `grad`) stay where they are."""
    return bool(other) and other[0] and owner in (Tensor.mT, Tensor.T, Tensor.data, Tensor.grad)


def _target(func: Any, args: Any, kwargs: Any) -> torch.device | None:
    """Where an operation moves its first argument, if that is what it does."""
    if func is Tensor.cpu:
        return torch.device("cpu")
    if func is not Tensor.to:
        return None
    wanted = [*args[1:], kwargs.get("device"), kwargs.get("other")]
    for value in wanted:
        if isinstance(value, Tensor):
            return OTHER if on_other(value) else torch.device("cpu")
        if isinstance(value, str | int | torch.device) and not isinstance(value, bool):
            return torch.device(value)
    return None


def _moved(func: Any, args: Any, kwargs: Any, target: torch.device) -> Tensor:
    first = args[0].as_subclass(Tensor)
    dtypes = [v.dtype if isinstance(v, Tensor) else v for v in [*args[1:], *kwargs.values()]]
    dtype = next((v for v in dtypes if isinstance(v, torch.dtype)), first.dtype)
    found = first.to(dtype, copy=bool(kwargs.get("copy")))
    return found.as_subclass(Elsewhere) if target == OTHER else found


def _mark(found: Any) -> Any:
    return tree_map(lambda value: value.as_subclass(Elsewhere) if type(value) is Tensor else value, found)


def halved(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose last blocks and final norm lie on the other device, with the hooks that accelerate puts there."""
    model = copy.deepcopy(model)
    parts = decoder(model)
    tied = parts.head.weight is embedding(model)
    for module in (*parts.layers[len(parts.layers) // 2 :], parts.norm, *([] if tied else [parts.head])):
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    placed: Any = weight.data.as_subclass(Elsewhere)
                    part._parameters[name] = placed
        add_hook_to_module(module, AlignDevicesHook(OTHER, skip_keys=["past_key_values"]))
    if tied:
        add_hook_to_module(parts.head, AlignDevicesHook(torch.device("cpu")))
    return model
