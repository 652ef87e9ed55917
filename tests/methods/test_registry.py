"""Registries: names are file names, near misses are told, plugins stand beside built-ins, and nothing is imported early."""

import pkgutil
import subprocess
import sys

import pytest

import ramify
import ramify.draft
import ramify.size
from ramify.draft.base import Drafter
from ramify.registry import Registry, drafter, size_policy, verifier


@pytest.mark.parametrize(("registry", "package"), [(drafter, ramify.draft), (size_policy, ramify.size)])
def test_file_name_is_method_name(registry, package):
    files = {module.name for module in pkgutil.iter_modules(package.__path__)} - {"base"}
    assert {name for name in registry.names() if registry.get(name).__module__.startswith("ramify.")} == {
        name for name in files if not name.startswith("_")
    }
    for method in registry.all():
        assert method.kind == registry.kind and method.summary and isinstance(method.lossless, bool) and isinstance(method.trained, bool)


def test_methods_are_rows_of_plain_values():
    rows = {row["name"]: row for row in ramify.methods()}
    assert {"plain", "prompt_lookup", "token_recycling", "draft_chain", "draft_tree", "auto", "oracle"} <= set(rows)
    for row in rows.values():
        assert list(row) == ["name", "kind", "lossless", "trained", "source", "summary"]
        assert len(row["summary"]) <= 140 and row["summary"].endswith(".")
    assert rows["draft_tree"]["trained"] and not rows["token_recycling"]["trained"]


def test_verifiers_say_what_they_judge():
    for method in verifier.all():
        assert method.modes and method.lossless


def test_unknown_names():
    for name, told in {
        "token_recyclin": 'nearest is "token_recycling"',
        "../x": "is not known",
        "a.b": "is not known",
        "": "is not known",
    }.items():
        with pytest.raises(ValueError, match=told) as raised:
            drafter.get(name)
        assert "\n" not in str(raised.value)
    with pytest.raises(TypeError, match="takes a name"):
        drafter.get(7)


def test_options():
    assert drafter.build("prompt_lookup:longest=4, shortest=2").longest == 4
    assert drafter.build("prompt_lookup:copy_on=false,anchor=unique").copy_on is False
    assert drafter.build("prompt_lookup", longest=5).longest == 5
    with pytest.raises(TypeError, match="longest is"):
        drafter.build("prompt_lookup:longest=four")


def test_only_what_is_near_is_suggested():
    for spec, told in {
        "prompt_lookup:longst=3": 'has no option "longst"; nearest is "longest". Options: ',
        "prompt_lookup:foo=1": 'has no option "foo". Options: longest,',
        "draft_tree:nodes=0": 'has no option "nodes". Options: ',
        "prompt_lokup": 'nearest is "prompt_lookup"',
        "oak": "is not known; known: auto, ",
    }.items():
        with pytest.raises(ValueError) as raised:
            drafter.build(spec, model=None) if "tree" in spec else drafter.build(spec)
        assert told in str(raised.value)


@pytest.fixture
def registry():
    return Registry("drafter", "ramify.draft")


def test_a_plugin(registry):
    @registry("mine", lossless=False, trained=True, source="me", extra=3)
    class Mine(Drafter):
        """Guesses nothing.

        More words.
        """

    assert registry.get("mine") is Mine and "mine" in registry.names()
    assert (Mine.name, Mine.lossless, Mine.trained, Mine.source, Mine.summary, Mine.extra) == (
        "mine",
        False,
        True,
        "me",
        "Guesses nothing.",
        3,
    )


def test_a_name_is_taken_once(registry):
    def first():
        """One."""

    def second():
        """Two."""

    registry("x")(first)
    registry("x")(first)  # the same again, as when a notebook's cell is run twice
    with pytest.raises(ValueError, match="has it already"):
        registry("x")(second)
    with pytest.raises(ValueError, match="is a built-in of that name"):
        registry("prompt_lookup")(second)


def test_a_name_is_a_name(registry):
    with pytest.raises(TypeError, match=r'drafter: name is <class .*; takes a string. Write @ramify.drafter\("name"\).'):

        @registry
        class Forgotten(Drafter):
            """Its decorator has no parentheses."""

    for wrong in ("", "x y", "a:b", "a,b", "7up"):
        with pytest.raises(ValueError, match="drafter: name is .*; takes letters, digits and underscores"):
            registry(wrong)


def test_a_kind_without_built_ins():
    empty = Registry("page_format", "ramify.no_such_room")
    assert empty.names() == []
    with pytest.raises(ValueError, match="known: none"):
        empty.get("f32")


def test_lookup_imports_one_method_only():
    script = (
        "import sys; from ramify.registry import drafter; drafter.get('prompt_lookup');"
        "assert 'ramify.draft.token_recycling' not in sys.modules; assert 'transformers' not in sys.modules; print('fine')"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "fine\n"
