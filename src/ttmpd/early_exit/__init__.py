"""Answer sooner: samples that are sure early leave a model early. One file per method.

The package bears the name of its function: ``ttmpd.early_exit(model, samples, speedup=1.5)`` is
:func:`ttmpd.exiting.early_exit`, whichever of the two was imported first.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # By name: a verb knows nothing of what stands above it.
        return import_module("ttmpd.exiting").early_exit(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
