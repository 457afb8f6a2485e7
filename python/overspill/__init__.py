"""overspill: train, load and serve more than the GPU's memory holds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._native import __version__
from .client import AsyncClient, Client
from .errors import BudgetError, DeviceError, FormatError, OverspillError, TransferError

if TYPE_CHECKING:
    from .jit import JITCompressedLinear
    from .layers import StormFunction, StormLinear
    from .storm import Storm

__all__ = [
    "AsyncClient",
    "BudgetError",
    "Client",
    "DeviceError",
    "FormatError",
    "JITCompressedLinear",
    "OverspillError",
    "Storm",
    "StormFunction",
    "StormLinear",
    "TransferError",
    "__version__",
]

# What imports torch, which takes seconds: the command line and clients go without.
_NEEDS_TORCH = {
    "JITCompressedLinear": "jit",
    "Storm": "storm",
    "StormFunction": "layers",
    "StormLinear": "layers",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NEEDS_TORCH[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
