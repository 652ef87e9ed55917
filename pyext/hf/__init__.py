"""ramify inside Hugging Face transformers. With `ramify.cli` the only room that knows anything outside; imported on first use.

Needs transformers: `pip install 'ramify[hf]'`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramify.hf.custom_generate import CustomGenerate as CustomGenerate
    from ramify.hf.low_bit import LowBitLinear as LowBitLinear
    from ramify.hf.quantizer import RamifyConfig as RamifyConfig

_HOME = {"CustomGenerate": "custom_generate", "LowBitLinear": "low_bit", "RamifyConfig": "quantizer"}
"""Name -> module. Lazy, because the quantizer is imported while transformers itself is still being imported."""

__all__ = ["CustomGenerate", "LowBitLinear", "RamifyConfig"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        came = "not installed" if find_spec("transformers") is None else "of a version without what it uses"
        raise ImportError(f"{name}: transformers is {came}. pip install 'ramify[hf]' brings the right one.", name=error.name) from None
