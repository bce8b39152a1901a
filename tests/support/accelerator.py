"""A device that is not there: tensors that say they are on it, whose values lie in memory. As on a real one, what is on it
meets nothing that is not, up to single numbers, and indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

DEVICE = torch.device("cuda:0")
aten = torch.ops.aten
TAKE_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class There(Tensor):
    """A tensor on the device; `here` holds its values. To torch's own code, which would initialise a CUDA device, it is on
    the meta device."""

    here: Tensor
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        found = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device="meta",
        )  # fmt: skip
        found.here = here
        return found

    def __repr__(self, **_: Any) -> str:
        return f"There({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        met = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        strangers = [x for x in met if not isinstance(x, There) and x.ndim]
        if strangers and func not in TAKE_INDICES and func is not aten.copy_.default:
            raise RuntimeError(f"{func} of tensors on {DEVICE} and on {strangers[0].device}")
        asked = kwargs.pop("device", None) or DEVICE
        found = func(*tree_map(here, args), **tree_map(here, kwargs))
        if func._schema.is_mutable:  # of the first argument
            return args[0]
        back = torch.device(asked).type == "cpu"
        return found if back else tree_map(there, found)


def here(x: Any) -> Any:
    return x.here if isinstance(x, There) else x


def there(x: Any) -> Any:
    return There(x) if isinstance(x, Tensor) else x


class Accelerator(TorchFunctionMode):
    """While it is entered, tensors can be made on and moved to the device, and be read from it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func is Tensor.to and len(args) == 2 and isinstance(args[1], str | torch.device):
            kwargs["device"], args = args[1], args[:1]
        if func is Tensor.numpy and isinstance(first, There):
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy.")
        if func is Tensor.tolist and isinstance(first, There):
            return first.here.tolist()
        if func is Tensor.new_tensor and isinstance(first, There):
            return There(first.here.new_tensor(*args[1:], **kwargs))
        if func is one_hot and isinstance(first, There):
            return There(func(first.here, *args[1:], **kwargs))
        if func in (torch.where, Tensor.__setitem__):  # of numbers torch would make tensors on the meta device
            args = (args[0], *(torch.tensor(x) if isinstance(x, int | float) else x for x in args[1:]))
        device = kwargs.get("device")
        if device is None or torch.device(device).type != DEVICE.type:
            return func(*args, **kwargs)
        del kwargs["device"]
        if func is not Tensor.to:
            return There(func(*args, **kwargs))
        found = func(*args, **kwargs) if kwargs else first
        return found if isinstance(found, There) else There(found)


def moved(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(There(parameter.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = There(buffer) if buffer is not None else None
    return module
