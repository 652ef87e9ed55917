"""Names to methods: one registry per kind, one decorator per registry, and no list kept by hand.

A method called `prompt_lookup` lives in `draft/prompt_lookup.py` and is imported when somebody first asks for it; a plugin's class is
found the same way once its file was imported. A registry is its own decorator:

    @drafter("prompt_lookup", lossless=True, trained=False, source="Saxena 2023")
    class PromptLookup(Drafter): ...

    drafter.get("prompt_lookup")              # the class
    drafter.build("prompt_lookup:longest=4")  # an instance, options are the class's own arguments
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from ramify.checks import show

Method = TypeVar("Method", bound=Callable[..., Any])


class Registry:
    """The methods of one kind. `package` is where the built-in ones live, one module each, named like the method; `takes` is what an
    argument takes that names one.
    """

    def __init__(self, kind: str, package: str, takes: str = "a name") -> None:
        self.kind, self.package, self.takes = kind, package, takes
        self._found: dict[str, Any] = {}

    def __call__(
        self, name: str, *, lossless: bool = True, trained: bool = False, source: str = "", **facts: Any
    ) -> Callable[[Method], Method]:
        """Register a class or function as `name`; sets .name .kind .lossless .trained .source .summary and every extra fact on it."""
        if not isinstance(name, str):  # the decorator without its parentheses, for one
            raise TypeError(f'{self.kind}: name is {show(name)}; takes a string. Write @ramify.{self.kind}("name").')
        if not name.isidentifier():
            raise ValueError(f"{self.kind}: name is {show(name)}; takes letters, digits and underscores, as a Python name does.")

        def register(method: Method) -> Method:
            other = self._found.get(name)
            if other is not None and _where(other) != _where(method):
                raise ValueError(f'{self.kind}: name is "{name}"; {".".join(_where(other))} has it already. Choose another name.')
            built_in = f"{self.package}.{name}"
            if other is None and method.__module__ != built_in and _exists(built_in):
                raise ValueError(f'{self.kind}: name is "{name}"; {built_in} is a built-in of that name. Choose another name.')
            summary = (method.__doc__ or "").strip().partition("\n")[0]
            facts.update(name=name, kind=self.kind, lossless=lossless, trained=trained, source=source, summary=summary)
            for key, value in facts.items():
                setattr(method, key, value)
            self._found[name] = method
            return method

        return register

    def get(self, name: str, caller: str = "", noun: str = "") -> Any:
        """The class or function of that name. ValueError tells the nearest known name; `caller` and `noun` are the user's words for it."""
        if not isinstance(name, str):
            who, what = caller or self.kind, noun or self.kind
            raise TypeError(f"{who}: {what} is {show(name)}; takes {self.takes}. Known: {', '.join(self.names())}.")
        if name not in self._found and name.isidentifier() and _exists(f"{self.package}.{name}"):
            importlib.import_module(f"{self.package}.{name}")
        if name not in self._found:
            raise ValueError(self._unknown(name, caller or self.kind, noun or self.kind))
        return self._found[name]

    def build(self, spec: str, caller: str = "", noun: str = "", **options: Any) -> Any:
        """An instance from "name" or "name:key=value,key=value"; keyword options are added, and then are no options of the spec.

        Unknown options are refused by name.
        """
        if not isinstance(spec, str):
            return self.get(spec, caller, noun)  # raises
        name, _, tail = spec.partition(":")
        cls, who = self.get(name, caller, noun), caller or self.kind
        known, asked = _options(cls, options), {}
        for part in filter(None, tail.split(",")):
            key, equals, value = (text.strip() for text in part.partition("="))
            if not equals:
                raise ValueError(f'{who}: option of "{name}" is {show(part)}; takes key=value. {_takes(known)}')
            if key in options:
                raise ValueError(f'{who}: option "{key}" of "{name}" is set by an argument; takes it there alone. {_takes(known)}')
            if known is not None and key not in known:
                near = difflib.get_close_matches(key, known, 1, cutoff=0.7)
                hint = f'; nearest is "{near[0]}"' if near else ""
                raise ValueError(f'{who}: "{name}" has no option {show(key)}{hint}. {_takes(known)}')
            if key in asked:
                raise ValueError(f'{who}: option "{key}" of "{name}" comes twice; takes it once.')
            asked[key] = _literal(value)
        return cls(**options, **asked)

    def names(self) -> list[str]:
        """Every known name, sorted; imports the built-in modules of this kind."""
        if _exists(self.package):
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                if not module.name.startswith("_"):
                    importlib.import_module(f"{self.package}.{module.name}")
        return sorted(self._found)

    def all(self) -> list[Any]:
        """Every registered class or function, by name."""
        return [self._found[name] for name in self.names()]

    def _unknown(self, name: str, caller: str, noun: str) -> str:
        known = self.names()
        near = difflib.get_close_matches(name, known, 1, cutoff=0.6)
        hint = f'nearest is "{near[0]}"' if near else f"known: {', '.join(known) or 'none'}"
        where = "ramify.methods() lists all" if self.kind == "drafter" else f"{self.package} holds the built-in ones"
        return f"{caller}: {noun} {show(name)} is not known; {hint}. {where}; your own are known once imported (--plugin FILE)."


def _where(method: Any) -> tuple[str, str]:
    return method.__module__, method.__qualname__


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _options(cls: Any, taken: Collection[str]) -> list[str] | None:
    """The names of cls's arguments without those that are taken; None where it has any name."""
    parameters = inspect.signature(cls).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL and p.name not in taken]


def _takes(known: list[str] | None) -> str:
    return f"Options: {', '.join(known)}." if known else "It takes no options."


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


drafter = Registry("drafter", "ramify.draft", "a name or a Drafter")
verifier = Registry("verifier", "ramify.verify")
size_policy = Registry("size_policy", "ramify.size", "a name or a SizePolicy")
page_format = Registry("page_format", "ramify.cache")


def methods() -> list[dict[str, Any]]:
    """Every decoding method, by name: name, kind, lossless, trained, source, summary. `generate(method=)` takes these names and "auto"."""
    return [{key: getattr(method, key) for key in ("name", "kind", "lossless", "trained", "source", "summary")} for method in drafter.all()]
