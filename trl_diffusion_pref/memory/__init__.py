"""How much memory training will need, before any of it is allocated.

A step is run on the meta device, where tensors have shapes and no values, and the bytes of all that live at once are
counted.
"""

from .estimate import MemoryEstimate, estimate_memory
from .fit import FitOption, MemoryFit, fit_memory


__all__ = ["FitOption", "MemoryEstimate", "MemoryFit", "estimate_memory", "fit_memory"]
