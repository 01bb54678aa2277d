"""kdjax: knowledge distillation in JAX.

``kdjax.distill`` is the library call; ``kdjax.losses`` and the names below are the pieces. Names are imported when
they are first used, so that ``import kdjax`` costs little.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_NAMES = {
    "distill": "kdjax.library",
    "from_nnx": "kdjax.model",
    "from_linen": "kdjax.model",
    "Model": "kdjax.model",
    "Outputs": "kdjax.model",
    "make_train_step": "kdjax.step",
    "make_predict": "kdjax.step",
    "make_objective": "kdjax.objective",
    "TrainState": "kdjax.state",
    "create_state": "kdjax.state",
    "UserError": "kdjax.errors",
}
_MODULES = ("losses", "models", "schedules", "optimizer", "metrics", "sharding")
__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"kdjax.{name}")
    raise AttributeError(f"module 'kdjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
