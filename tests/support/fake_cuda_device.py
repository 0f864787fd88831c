"""The device of `fake_cuda`, for a process that has called `fake_cuda.load`."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily as host
from torch.utils import _foreach_utils, checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as leaves
from torch.utils._pytree import tree_map

from mm_moslora.kernels.lora import lora_linear

COUNT = 1
"""GPUs of the machine."""
SIZED_BY_VALUES = {
    "bincount", "equal", "masked_select", "nonzero", "unique_consecutive", "unique_dim", "_unique2",
}  # fmt: skip
"""The host must read something to know the shape of the result, or whether there is any."""
MAKE = torch.tensor


def place() -> str:
    """Package, file and function of the running line, torch and the tests' own code left out."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        package = next((part for part in ("mm_moslora", "transformers", "peft") if part in path.parts), None)
        if package is not None:
            return f"{package} {path.name} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class Device(TorchDispatchMode):
    """Where the host waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def noted(self) -> dict[str, int]:
        """The waits since the last call."""
        found = dict(self.waits)
        self.waits.clear()
        return found

    def wait(self, why: str) -> None:
        self.waits[f"{place()}: {why}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # whole only in inference mode; it is several operators
                return func.decompose(*args, **kwargs)
        tensors = [x for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for one in leaves((args, kwargs)):
            if isinstance(one, torch.device) and one.type == "cuda":
                _set_device(one)
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if target in (None, "cpu") and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with host():  # what the host computes is real
                return func(*args, **kwargs)
        self._note(name, tensors, target, args, kwargs)
        value = self._value(func, name, tensors, args, kwargs)
        if name == "_local_scalar_dense":
            kind = args[0].dtype
            return value if value is not None else True if kind == torch.bool else float(kind.is_floating_point) or 1
        try:
            result = func(*args, **kwargs)
        except fake_tensor.DynamicOutputShapeException:
            if value is None:
                raise
            result = tree_map(lambda real: torch.empty(real.shape, dtype=real.dtype, device="cuda:0"), value)
        for fake, real in zip(leaves(result), leaves(value), strict=False):
            if isinstance(fake, FakeTensor) and isinstance(real, torch.Tensor):
                fake.real_value = real
        return result

    def _note(self, name: str, tensors: list[Any], target: str | None, args: Any, kwargs: Any) -> None:
        kinds = {tensor.device.type for tensor in tensors}
        if name == "_local_scalar_dense":
            if kinds == {"cuda"}:
                self.wait("reads a value")
        elif "cuda" in kinds and self._sized_by_values(name, args, kwargs):
            self.wait(f"{name} is sized by values")
        elif name == "_to_copy" and target and target not in kinds:
            self._copy(tensors[0].device.type, target, bool(kwargs.get("non_blocking")))
        elif name == "copy_" and len(kinds) == 2:
            self._copy(args[1].device.type, args[0].device.type, len(args) > 2 and bool(args[2]))
        elif len(kinds) == 2 and any(tensor.device.type == "cpu" and tensor.ndim for tensor in tensors):
            self.wait(f"{name} reads a tensor of the host")

    def _copy(self, source: str, target: str, non_blocking: bool) -> None:
        if not non_blocking:
            self.wait(f"copies {source} to {target}")

    @staticmethod
    def _sized_by_values(name: str, args: Any, kwargs: Any) -> bool:
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masked = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
            return masked and (name == "index" or args[2].numel() != 1)  # one value is a masked fill
        return name in SIZED_BY_VALUES or (name == "repeat_interleave" and kwargs.get("output_size") is None)

    @staticmethod
    def _value(func: Any, name: str, tensors: list[Any], args: Any, kwargs: Any) -> Any:
        """What the operator gives, where all that it gets is known."""
        if any(isinstance(tensor, FakeTensor) and not hasattr(tensor, "real_value") for tensor in tensors):
            for argument, given in zip(func._schema.arguments, args, strict=False):
                for written in leaves(given) if argument.alias_info and argument.alias_info.is_write else ():
                    vars(written).pop("real_value", None)
            return None
        if not tensors and name not in ("zeros", "ones", "full", "arange"):
            return None
        given, named = tree_map(lambda x: getattr(x, "real_value", x), (args, kwargs))
        if named.get("device") is not None:
            named = named | {"device": torch.device("cpu")}
        with host(), torch.no_grad():
            return func(*given, **named)


def _set_device(given: Any) -> None:
    """Refuse a GPU that is not there."""
    index = given if isinstance(given, int) else torch.device(given).index
    if (index or 0) >= COUNT:
        raise RuntimeError("CUDA error: invalid device ordinal")


def _tolist(device: Device, tensor: Any) -> Any:
    """All values at once; a fake tensor would read them one by one."""
    if tensor.device.type == "cuda":
        device.wait("reads a value")
    if hasattr(tensor, "real_value"):
        return tensor.real_value.tolist()
    value: Any = 1.0 if tensor.is_floating_point() else 1
    for size in reversed(tensor.shape):
        value = [value] * size
    return value


def _tensor(data: Any, **kwargs: Any) -> Any:
    """A list of tensors is read one by one, past every dispatcher."""
    if isinstance(data, list):
        data = [item.item() if isinstance(item, FakeTensor) else item for item in data]
    return MAKE(data, **kwargs)


def _attention(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
              scale: float | None = None, enable_gqa: bool = False) -> Any:  # fmt: skip
    """The fused kernels that a CUDA build chooses; this build would take the one that consists of many."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for x in (k, v))
    if q.dtype.itemsize == 2 and attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(q.dtype)
    attn_mask = None if attn_mask is None else attn_mask.expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, learns, dropout_p, is_causal, scale=scale
    )[0]


@contextlib.contextmanager
def fake_cuda() -> Iterator[Device]:
    """Everything in the block may use `cuda:0`; gives the `Device`."""
    device = Device()
    event = SimpleNamespace(synchronize=lambda: device.wait("waits for a copy"))
    patches = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: COUNT),
        (torch.cuda, "set_device", _set_device),
        (fake_tensor.FakeTensorMode, "avoid_device_init", True),  # there is no driver to start
        (torch.cuda, "current_stream", lambda *_: SimpleNamespace(record_event=lambda: event)),
        (FakeTensor, "tolist", lambda tensor: _tolist(device, tensor)),
        (torch, "tensor", _tensor),
        (torch.nn.functional, "scaled_dot_product_attention", _attention),
        (lora_linear, "PLAIN_TYPES", (*lora_linear.PLAIN_TYPES, FakeTensor)),
        (checkpoint, "get_device_states", lambda *_: ([], [])),  # these ask the driver
        (checkpoint, "set_device_states", lambda *_, **__: None),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    _foreach_utils._foreach_supported_types.append(FakeTensor)
    try:
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), device:
            yield device
    finally:
        _foreach_utils._foreach_supported_types.remove(FakeTensor)
        for owner, name, value in before:
            setattr(owner, name, value)


def to_cuda(module: Any) -> None:
    """Put the weights of a module on the device, ties kept; its own `to` cannot, and then has nothing left to do."""
    moved: dict[int, Any] = {}

    def fake(tensor: Any) -> Any:
        if id(tensor) not in moved:
            on = torch.empty_like(tensor, device="cuda:0", requires_grad=False)
            vars(on).pop("real_value", None)  # nobody knows what is in it
            trained = isinstance(tensor, torch.nn.Parameter)
            moved[id(tensor)] = torch.nn.Parameter(on, tensor.requires_grad) if trained else on
        return moved[id(tensor)]

    for part in module.modules():
        for own in (part._parameters, part._buffers):
            own.update({name: fake(tensor) for name, tensor in own.items() if tensor is not None})
    module.to = lambda *_: module
