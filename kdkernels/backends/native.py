"""Loads the extension modules; describes tensors by integers for a torch without exchange table."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

# DType and Device of csrc/common/view.h.
_DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.bool: 6,
}
_DEVICES = {"cpu": 0, "cuda": 1}


def describe(tensor: torch.Tensor) -> tuple:
    """(pointer, shape, strides, dtype code, device code, device index) of a tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(tensor).__name__}")
    return (
        tensor.data_ptr(),
        tuple(tensor.shape),
        tensor.stride(),
        _DTYPES.get(tensor.dtype, 7),
        _DEVICES.get(tensor.device.type, 2),
        tensor.device.index or 0,
    )


def _stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def extension(name: str) -> ModuleType | str:
    """The extension module `kdkernels.<name>`, or why it cannot be loaded."""
    try:
        module = importlib.import_module(f"kdkernels.{name}")
    except ImportError as error:
        return str(error)
    module.set_tensor_functions(describe, _stream)
    return module
