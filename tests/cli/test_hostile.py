"""The command where its surroundings are against it: streams that are closed, full or ASCII, interrupts, bytes that are no text,
checkpoints that do not fit. One line on standard error, exit code 2, no traceback; nothing that was decoded is lost.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import ramify
from ramify.cli import main
from ramify.draft.draft_chain import DraftChain
from ramify.model.load import folder_of
from ramify.size.fixed import Fixed

COMMAND = [sys.executable, "-m", "ramify"]
NON_ASCII = 'print("naïve café €")  # übung\nprint("'


def ramify_command(*argv, env=None, **options):
    """The finished process of `ramify ARGV`; its streams are pipes unless told otherwise, as bytes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run([*COMMAND, *argv], env={**os.environ, **(env or {})}, **{**pipes, **options})


def told(done):
    """The one line on standard error of a command that failed."""
    said = done.stderr.decode()
    assert done.returncode == 2 and not done.stdout, (done.returncode, done.stdout, said)
    assert said.count("\n") == 1 and said.startswith("ramify") and "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def adventure():
    """(seed, text): what the embedded drafter, which loads fast, adds to NON_ASCII under the first seed that leaves ASCII.

    Which one that is depends on the bits of an ISA level.
    """
    model = ramify.load("zoo-drafter")
    for seed in range(100):
        [out] = ramify.generate(model, [NON_ASCII], method="plain", max_new_tokens=40, temperature=1.5, seed=seed)
        if not out.text.isascii():
            return seed, out.text
    raise AssertionError("none of 100 texts has a character beyond ASCII")


SEED = 2
GENERATE = f"generate --model zoo-drafter --method plain --max-new-tokens 40 --temperature 1.5 --seed {SEED}".split()


def test_the_command_is_named_once(capsys):
    for argv, says in (
        ([], "ramify: "),
        (["generat"], "ramify: "),
        (["--bogus"], "ramify: "),
        (["env", "--bogus"], "ramify env: unrecognized arguments: --bogus. ramify env --help lists"),
        (["generate", "--seed", "x", "y"], "ramify generate: argument --seed"),
        (["convert"], "ramify convert: "),
        (["generate"], "ramify generate: PROMPT is missing"),
    ):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(says) and "ramify ramify" not in err


def test_an_error_of_our_own_is_told_by_its_kind(capsys, monkeypatch):
    def broken(*args, **options):
        raise KeyError("seven")

    monkeypatch.setattr(ramify, "load", broken)
    assert main(["generate", "x"]) == 2
    assert capsys.readouterr().err == "ramify KeyError: 'seven'. RAMIFY_TRACEBACK=1 shows where.\n"


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=str)
def test_streams_that_are_ascii(env, adventure):
    """The prompt is read as UTF-8 all the same; what ASCII cannot show is written as escapes, and nothing stops."""
    seed, text = adventure
    generate = [*GENERATE[:-1], str(seed)]
    done = ramify_command(*generate, "--", NON_ASCII, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii") == text.encode("ascii", "backslashreplace").decode()
    done = ramify_command(*generate, "--json", "-", env=env, input=NON_ASCII.encode())
    assert json.loads(done.stdout)["methods"][0]["text"] == text


def test_bytes_that_are_no_text():
    said = told(ramify_command(*GENERATE, "-", input=b"ab\xff"))
    assert "standard input is not UTF-8 at byte 2; takes text" in said
    said = told(ramify_command(*[os.fsencode(word) for word in GENERATE], b"ab\xff"))
    assert "PROMPT is not UTF-8 at byte 2; takes text" in said


def test_an_empty_prompt():
    assert "standard input is empty; takes a text" in told(ramify_command(*GENERATE, "-", input=b""))
    assert "PROMPT is empty; takes a text" in told(ramify_command(*GENERATE, ""))


def closing(*numbers):
    def close():
        for number in numbers:
            os.close(number)

    return close


def test_streams_that_are_closed():
    said = told(ramify_command(*GENERATE, "x", stdout=None, preexec_fn=closing(1)))
    assert "standard output is closed" in said
    said = told(ramify_command("env", stdout=None, preexec_fn=closing(1)))
    assert "standard output is closed" in said
    assert "standard input is closed" in told(ramify_command(*GENERATE, "-", preexec_fn=closing(0)))
    quiet = ramify_command(*GENERATE, "x", stderr=None, preexec_fn=closing(2))
    assert quiet.returncode == 0 and quiet.stdout == ramify_command(*GENERATE, "x").stdout
    assert ramify_command(*GENERATE, stderr=None, preexec_fn=closing(2)).returncode == 2
    assert ramify_command("env", stdout=None, stderr=None, preexec_fn=closing(1, 2)).returncode == 2


def test_streams_whose_reader_went_away():
    end, begin = os.pipe()
    os.close(end)
    done = ramify_command(*GENERATE, "x", stdout=begin)
    assert done.returncode == 141 and done.stderr == b""
    assert ramify_command("generate", stderr=begin).returncode == 2
    os.close(begin)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk():
    with open("/dev/full", "wb") as full:
        done = ramify_command(*GENERATE, "x", stdout=full)
    assert done.returncode == 2 and done.stderr == b"ramify generate: No space left on device.\n"


def test_what_the_system_refuses_names_command_and_path(capsys, monkeypatch):
    def refused(*args, **options):
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(ramify, "load", refused)
    assert main(["generate", "x"]) == 2
    assert capsys.readouterr().err == "ramify generate: /some/file: Permission denied.\n"


SLOW = """
import time
import ramify
from ramify.draft.base import Drafter
from ramify.tree import TokenTree

@ramify.drafter("slow_for_test")
class Slow(Drafter):
    def propose(self, slots, roots, rows):
        return TokenTree.roots(roots)

    def observe(self, slots, tree, out, verdict):
        time.sleep(0.02)
"""


def test_an_interrupt_keeps_the_text_so_far(tmp_path):
    plugin = tmp_path / "slow.py"  # so that the text is not finished before the signal comes, however late that is
    plugin.write_text(SLOW)
    slowly = [word.replace("plain", "slow_for_test") for word in GENERATE]
    argv = [*COMMAND, *slowly, "--plugin", str(plugin), "--max-new-tokens", "1900", "x"]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a job in the background hands an ignored one down
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **heard)
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == b""
    model, dice = ramify.load("zoo-drafter"), {"temperature": 1.5, "seed": SEED}
    [whole] = ramify.generate(model, ["x"], method="plain", max_new_tokens=1900, **dice)
    text = (first + rest).decode()
    assert whole.text.startswith(text) and len(text) < len(whole.text)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Copies of the embedded drafter that cannot be used, by what is wrong with them."""
    root = tmp_path_factory.mktemp("folders")
    found = {name: root / name for name in ("cut", "empty", "half-config", "family", "nan-weights", "vocabulary", "tokens")}
    for folder in found.values():
        shutil.copytree(folder_of("zoo-drafter"), folder)

    def rewrite(file, change):
        value = json.loads(file.read_text())
        change(value)
        file.write_text(json.dumps(value))

    def reweigh(file, change):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    def swap(ids, one, other):
        ids[one], ids[other] = ids[other], ids[one]

    cut = found["cut"] / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:50_000])
    (found["empty"] / "model.safetensors").unlink()
    (found["half-config"] / "config.json").write_text("{")
    rewrite(found["family"] / "config.json", lambda c: c.update(architectures=["MambaForCausalLM"], model_type="mamba"))
    reweigh(found["nan-weights"] / "model.safetensors", lambda t: t["model.layers.0.mlp.down_proj.weight"].fill_(torch.nan))
    rewrite(found["vocabulary"] / "config.json", lambda c: c.update(vocab_size=c["vocab_size"] - 64))
    table = "model.embed_tokens.weight"
    reweigh(found["vocabulary"] / "model.safetensors", lambda t: t.update({table: t[table][:-64].contiguous()}))
    rewrite(found["tokens"] / "tokenizer.json", lambda t: swap(t["model"]["vocab"], "a", "b"))
    return {name: str(folder) for name, folder in found.items()}


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--model", "nowhere"], "load: nowhere is no folder"),
        (["--model", ""], 'load: model is ""'),
        (["--model", "cut"], "(50,000 bytes) is cut short"),
        (["--model", "empty"], "model.safetensors"),
        (["--model", "half-config"], "config.json"),
        (["--model", "family"], 'config.json names "MambaForCausalLM"; takes LlamaForCausalLM'),
        (["--model", "nan-weights"], "logits of row 0 are not finite; takes weights without NaN"),
        (["--model", "zoo-drafter", "--method", "draft_chain", "--drafter", "vocabulary"], "tokens in its vocabulary; takes 4096"),
        (["--model", "zoo-drafter", "--method", "draft_chain", "--drafter", "tokens"], "drafter has another tokenizer than the target"),
        (["--model", "zoo-drafter", "--method", "draft_chain", "--drafter", "cut"], "is cut short"),
        (["--model", "zoo-drafter", "--method", "draft_chain"], 'method "draft_chain" drafts with a second model'),
        (["--model", "zoo-drafter", "--method", "plain", "--drafter", "zoo"], "--drafter is zoo and plain takes none"),
        (["--compare", "--method", "plain", "prompt_lookup", "--drafter", "zoo"], "--drafter is zoo and plain, prompt_lookup take none"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0; takes 1 or more"),
        (["--max-new-tokens", "1.5"], "argument --max-new-tokens: invalid int value"),
        (["--temperature", "-1"], "generate: temperature is -1.0; takes 0 or more"),
        (["--temperature", "nan"], "generate: temperature is nan; takes a finite number"),
        (["--seed", "-1"], "generate: seed is -1; takes 0 or more"),
        (["--top-k", "-1"], "generate: top_k is -1"),
        (["--weights", "int5"], 'load: weights is "int5"; takes int8'),
        (["--method", "draft_chain:model=3"], 'option "model" of "draft_chain" is set by an argument'),
        (["--plugin", "."], "--plugin is ., and there is no such file"),
    ],
    ids=str,
)
def test_one_line_and_exit_2(argv, says, folders, capsys):
    argv = [folders.get(word, word) for word in argv]
    assert main(["generate", *argv, "--", "def f(x):"]) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and err.startswith("ramify ") and "ramify ramify" not in err


def test_a_drafter_without_numbers(folders, capsys, monkeypatch):
    """Where it is asked: in a busy moment the usual policy may find that drafting does not pay."""
    monkeypatch.setattr(DraftChain, "size_policy", lambda drafter: Fixed(3))
    argv = ["--model", "zoo-drafter", "--method", "draft_chain", "--drafter", folders["nan-weights"]]
    assert main(["generate", *argv, "--", "def f(x):"]) == 2
    assert "logits of row 0 are not finite" in capsys.readouterr().err


def test_a_method_named_twice_is_one(capsys):
    short = ["generate", "--model", "zoo-drafter", "--max-new-tokens", "3"]
    assert main([*short, "--method", "plain", "--method", "plain", "--", "x"]) == 0
    assert capsys.readouterr().err.startswith("plain: 3 tokens")
    assert main([*short, "--compare", "--json", "--repeat", "1", "--method", "plain,plain", "prompt_lookup", "plain", "--", "x"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)["methods"]] == ["plain", "prompt_lookup"]


def test_a_drafter_goes_to_the_methods_that_take_one(capsys):
    argv = ["--model", "zoo-drafter", "--drafter", "zoo-drafter", "--max-new-tokens", "3", "--compare", "--json", "--repeat", "1"]
    assert main(["generate", *argv, "--method", "prompt_lookup", "draft_chain", "--", "x"]) == 0
    told = json.loads(capsys.readouterr().out)["methods"]
    assert [each["name"] for each in told] == ["plain", "prompt_lookup", "draft_chain"] and all(each["identical"] for each in told)
