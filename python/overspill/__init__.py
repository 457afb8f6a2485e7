"""overspill: train, load and serve more than the GPU's memory holds."""

from ._native import __version__
from .client import AsyncClient, Client
from .errors import BudgetError, DeviceError, FormatError, OverspillError, TransferError
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
