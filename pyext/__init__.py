"""ramify: token-parallel decoding of language models. Tensors go down, tokens come up.

Everything public is an attribute of this package and is imported on first use (PEP 562), so `import ramify` costs
milliseconds beyond torch and touches no device, file or terminal.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "CheckpointError": "errors",
    "CustomGenerate": "hf",
    "TokenTree": "tree",
    "UnsupportedModelError": "errors",
    "backend": "backends",
    "drafter": "registry",
    "explain": "backends",
    "generate": "decode.generate",
    "load": "model",
    "methods": "registry",
    "page_format": "registry",
    "size_policy": "registry",
    "verifier": "registry",
}
"""Public name -> module of this package that defines it."""

_MODULES = ("ops", "reference", "testing", "kernels")
"""Public modules: `ramify.ops` needs no import of its own."""

__all__ = [*sorted(_HOME), *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
