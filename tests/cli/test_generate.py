"""`ramify generate` on a model made of nothing: output, JSON, exit codes, one-line errors."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

import ramify
from ramify.cli import compare, main
from ramify.registry import drafter
from ramify.testing import FakeModel, FakeTokenizer

PROMPT = "the quick brown fox the quick"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def model(monkeypatch):
    """What `ramify.load` gives, whatever it is asked for."""
    fake = FakeModel(seed=3, sharpness=9.0, order=2, tokenizer=FakeTokenizer(), name="tiny")
    monkeypatch.setattr(ramify, "load", lambda path, **options: fake, raising=False)
    return fake


def run(capsys, *argv):
    """(exit code, stdout, stderr) of a command line."""
    code = main(["generate", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_streams_the_text_of_generate(model, capsys):
    [expected] = ramify.generate(model, [PROMPT], method="plain", max_new_tokens=20)
    code, out, err = run(capsys, "--method", "plain", "--max-new-tokens", "20", "--", PROMPT)
    assert (code, out) == (0, expected.text)
    assert err.count("\n") == 1 and "20 tokens in 20 steps" in err


def test_json_of_one_run(model, capsys):
    code, out, err = run(capsys, "--json", "--method", "prompt_lookup", "--max-new-tokens", "12", "--seed", "7", PROMPT)
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert told["methods"][0]["name"] == "prompt_lookup" and told["seed"] == 7 and told["new_tokens"] == 12


def kinds(value):
    """The shape of a JSON value: keys and types."""
    return {key: kinds(each) for key, each in value.items()} if isinstance(value, dict) else type(value)


def test_json_of_a_comparison(model, capsys):
    code, out, err = run(
        capsys, "--compare", "--json", "--repeat", "2", "--max-new-tokens", "16", "--method", "prompt_lookup", "--", PROMPT
    )
    told = json.loads(out)
    assert (code, err) == (0, "")
    environment, methods = told.pop("environment"), told.pop("methods")
    assert "cpu" in environment and environment["ramify"] == ramify.__version__
    assert kinds(told) == {
        **{"model": str, "device": str, "backend": str, "prompt_tokens": int, "new_tokens": int, "seed": int, "temperature": float}
    }
    assert told["prompt_tokens"] == len(model.tokenizer.encode(PROMPT))
    assert [each["name"] for each in methods] == ["plain", "prompt_lookup"]
    for each in methods:
        phases = dict.fromkeys(("draft", "forward", "verify", "commit"), float)
        assert kinds(each) == {
            **{"name": str, "lossless": bool, "identical": bool, "tokens_per_second": float, "tokens_per_step": float, "steps": int},
            **{"speedup": float, "seconds": phases, "text": str},
        }
        assert each["identical"] and each["text"] == methods[0]["text"]
    assert methods[0]["speedup"] == 1.0 and methods[0]["tokens_per_step"] == 1.0


def test_table_of_a_comparison(model, capsys):
    code, out, _ = run(capsys, "--compare", "--repeat", "1", "--max-new-tokens", "16", "--method", "prompt_lookup", PROMPT)
    lines = out.splitlines()
    [heading] = [line for line in lines if line.startswith("method ")]
    assert heading.split()[:9] == ["method", "lossless", "identical", "tok/s", "speedup", "spread", "tok/step", "steps", "ms/step"]
    assert [line.split()[0] for line in lines[lines.index(heading) + 1 : lines.index(heading) + 3]] == ["plain", "prompt_lookup"]
    assert code == 0 and lines[-1].startswith("verdict: ")


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ({"plain": (1.0, [10, 11]), "a": (1.5, [14, 15])}, "verdict: a, 1.38x plain, same text"),
        (
            {"plain": (1.0, [10, 11]), "a": (1.5, [9, 15])},
            "the median of a is 1.14x that of plain, same text, and their runs",
        ),
        ({"plain": (1.0, [2, 11]), "a": (9.0, [50, 55])}, "and the runs of plain lie 138% apart"),
        ({"plain": (1.0, [10, 11]), "a": (3.0, [12, 30])}, "and the runs of a lie 86% apart"),
        ({"plain": (1.0, [10, 11]), "a": (1.5, [90, 95])}, "and that is more than its tokens a step can bring"),
        ({"plain": (1.0, [10, 11]), "a": (1.0, [90, 95])}, "verdict: plain is the fastest here"),
        ({"plain": (1.0, [10, 11]), "a": (1.0, [90, 95]), "b": (2.0, [20, 21])}, "a: no step brought more than a token"),
    ],
)
def test_verdicts(runs, said):
    """A method that drafted nothing is never the fastest, and no verdict stands on runs that lie far apart."""
    stats = {"steps": 5, "seconds": dict.fromkeys(("draft", "forward", "verify", "commit"), 1.0)}
    found = [compare.Measured(name, True) for name in runs]
    for each, (per_step, rates) in zip(found, runs.values()):
        for rate in rates:
            numbers = SimpleNamespace(tokens_per_second=float(rate), tokens_per_step=per_step, **stats)
            each.outs.append(SimpleNamespace(stats=numbers, token_ids=[1, 2], text="x"))
    assert said in compare.describe(found, 0.0)


def test_default_methods_are_those_that_can_run(model, capsys):
    code, out, _ = run(capsys, "--compare", "--model", "somewhere", "--json", "--repeat", "1", "--max-new-tokens", "4", PROMPT)
    names = [each["name"] for each in json.loads(out)["methods"]]
    assert code == 0 and names[0] == "plain" and {"prompt_lookup", "auto"} <= set(names) and not {"draft_chain", "oracle"} & set(names)


def test_a_lossless_method_with_another_text_is_a_failed_check(model, capsys, monkeypatch):
    generate = ramify.generate

    def wrong(model, prompts, method, seed, **options):
        return generate(model, prompts, method=method, seed=seed, **{**options, "repetition_penalty": 1.0 if method == "plain" else 9.0})

    monkeypatch.setattr(ramify, "generate", wrong)
    code, out, _ = run(capsys, "--compare", "--repeat", "1", "--max-new-tokens", "30", "--method", "prompt_lookup", PROMPT)
    assert code == 1 and "no @ " in out and "check failed: prompt_lookup" in out


def test_prompt_from_standard_input(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    code, out, _ = run(capsys, "--method", "plain", "--max-new-tokens", "8", "-")
    [expected] = ramify.generate(model, [PROMPT], method="plain", max_new_tokens=8)
    assert (code, out) == (0, expected.text)


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--method", "prompt_lokup", PROMPT], 'method "prompt_lokup" is not known; nearest is "prompt_lookup"'),
        (["--method", "prompt_lookup:longst=3", PROMPT], 'has no option "longst"; nearest is "longest"'),
        (["--method", "prompt_lookup:foo=1", PROMPT], '"prompt_lookup" has no option "foo". Options: longest,'),
        (["--method", "", "--", PROMPT], 'method "" is not known'),
        (["--method", "", "plain", "--", PROMPT], "without --compare"),
        (["--method", "plain", ""], "empty"),
        (["--method", "plain"], "PROMPT is missing"),
        (["--compare", "--method", "plain", "token_recycling"], "PROMPT is missing"),
        ([], "PROMPT is missing"),
        (["--max-new-tokens", "0", "--method", "plain", PROMPT], "max_new_tokens is 0"),
        (["--max-new-tokens", "5000", "--method", "plain", PROMPT], "5000"),
        (["--temperature", "-1", "--method", "plain", PROMPT], "temperature is -1"),
        (["--seed", "x", PROMPT], "--seed"),
        (["--no-such-option", PROMPT], "--no-such-option"),
        (["--dtype", "fp8", PROMPT], "fp8"),
        (["--repeat", "0", "--compare", PROMPT], "--repeat is 0"),
        (["--method", "plain", "prompt_lookup", "--", PROMPT], "without --compare"),
        (["--plugin", "nowhere.py", PROMPT], "nowhere.py"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(model, capsys, argv, complaint):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert complaint in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_device_that_is_not_there_is_one_line_and_exit_2(capsys):
    code, out, err = run(capsys, "--device", "cuda:99", "--method", "plain", "--max-new-tokens", "1", "--", PROMPT)
    assert (code, out) == (2, "") and 'device is "cuda:99"; takes "cpu"' in err and err.count("\n") == 1


def test_bytes_that_are_no_text(model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    code, _, err = run(capsys, "-")
    assert code == 2 and "byte 2" in err


def test_a_plugin_is_a_method(model, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(drafter, "_found", dict(drafter._found))  # what the plugin registers ends with the test
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from ramify.draft.base import ChainDrafter, drafter\n"
        "@drafter('always_seven_for_test', lossless=True, trained=False)\n"
        "class Sevens(ChainDrafter):\n"
        "    '''Seven follows everything.'''\n"
        "    def guess(self, text, count):\n"
        "        return [7] * count\n"
    )
    argv = ["--plugin", str(plugin), "--json", "--compare", "--repeat", "1", "--max-new-tokens", "9", "--method", "always_seven_for_test"]
    code, out, _ = run(capsys, *argv, "--", PROMPT)
    assert code == 0 and json.loads(out)["methods"][1]["name"] == "always_seven_for_test" and json.loads(out)["methods"][1]["identical"]


@pytest.mark.parametrize(
    "source, says",
    [
        ("def broken(:", "raised SyntaxError"),
        ("import no_such_module_of_ours", "raised ModuleNotFoundError: No module named"),
        ("raise ValueError('one\\ntwo')", "raised ValueError: one"),
        ("x = 1", "registers no method; takes a file with a class decorated by @drafter"),
    ],
    ids=["syntax", "import", "lines", "empty"],
)
def test_a_plugin_that_breaks_is_told(model, capsys, tmp_path, source, says):
    plugin = tmp_path / "broken.py"
    plugin.write_text(source)
    code, _, err = run(capsys, "--plugin", str(plugin), PROMPT)
    assert code == 2 and f"generate: --plugin {plugin} {says}" in err and err.count("\n") == 1


def test_runs_of_several_tokens_are_shaded_on_a_terminal(model, monkeypatch):
    from ramify.cli.stream import SHADES, Stream

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Terminal()
    show = Stream(screen)
    show(0, [1], "a")
    show(0, [2, 3], "b\nc")
    show(0, [4, 5], "")  # inside a character: shown with the next step
    show(0, [6], "€")
    assert screen.getvalue() == f"a{SHADES[0]}b\x1b[0m\n{SHADES[0]}c\x1b[0m{SHADES[1]}€\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    Stream(plain)(0, [1, 2], "ab")
    assert plain.getvalue() == "ab"


def test_interrupt_is_quiet(model, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ramify, "generate", interrupted)
    code, _, err = run(capsys, PROMPT)
    assert code == 130 and err == ""
