"""overspill: train, load and serve more than the GPU's memory holds."""

from ._native import BudgetError, DeviceError, FormatError, OverspillError, TransferError, __version__
from .storm import Storm

__all__ = [
    "BudgetError",
    "DeviceError",
    "FormatError",
    "OverspillError",
    "Storm",
    "TransferError",
    "__version__",
]
