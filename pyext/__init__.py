"""ramify: token-parallel decoding of language models. Tensors go down, tokens come up.

Everything public is an attribute of this package and is imported on first use (PEP 562), so `import ramify` costs
milliseconds beyond torch and touches no device, file or terminal.

One thing waits: when transformers loads its quantizers, now or later, ramify's join them. So `from_pretrained` takes a low-bit
folder of ramify after `import ramify` alone, in either order of the two imports, and transformers is never loaded for it.
"""

import sys
from importlib import import_module, util
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "CheckpointError": "errors",
    "CustomGenerate": "hf",
    "RamifyConfig": "hf",
    "TokenTree": "tree",
    "UnsupportedModelError": "errors",
    "backend": "backends",
    "debug": "backends",
    "drafter": "registry",
    "explain": "floors",
    "generate": "decode.generate",
    "load": "model",
    "methods": "registry",
    "page_format": "registry",
    "row_invariant": "backends",
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


_QUANTIZERS = "transformers.quantizers.auto"


class _Joins:
    """Finds the module of transformers' quantizers as everyone would, and has it followed by ours."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        """None for every other module. See importlib.abc.MetaPathFinder."""
        if name != _QUANTIZERS:
            return None
        sys.meta_path.remove(_Joins)  # type: ignore[arg-type]
        spec = util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_both(module: Any) -> None:
                load(module)
                import_module(f"{__name__}.hf.quantizer")

            spec.loader.exec_module = load_both  # type: ignore[method-assign]
        return spec


if _QUANTIZERS in sys.modules:
    import_module(f"{__name__}.hf.quantizer")
else:
    sys.meta_path.insert(0, _Joins)  # type: ignore[arg-type]
