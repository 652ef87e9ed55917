"""`ramify convert`: what it prints, exit codes, one-line errors."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from ramify.cli import main
from ramify.cli.convert import progress
from ramify.model.load import folder_of

TEXT = "import os\n\n\ndef names(path):\n    return sorted(os.listdir(path))\n" * 20


def run(capsys, *argv):
    """(exit code, stdout, stderr) of a command line."""
    code = main(["convert", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.py"
    file.write_text(TEXT)
    return file


def test_json(tmp_path, text, capsys):
    out = tmp_path / "out"
    code, told, err = run(capsys, "zoo-drafter", out, "--json", "--calibration", text, "--evaluate", text)
    told = json.loads(told)
    assert (code, err) == (0, "")
    assert (told["format"], told["method"], told["head"], told["calibration"]) == ("int4-g64", "gptq", "int8", "text.py")
    assert told["before"]["tokens"] == told["after"]["tokens"] > 100 and len(told["errors"]) == 14
    assert (out / "config.json").is_file()


def test_help_says_what_a_user_trips_over(capsys):
    """Heads that two readers hold otherwise, and files that another number of threads would make otherwise."""
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert 'ramify.load rounds it so unless head="dense"; transformers keeps it dense, so logits differ' in told
    assert "those of gptq under the same number of torch's threads" in told


def test_too_little_text_is_told_in_one_line(tmp_path, text):
    """On standard error, beside a JSON object that is whole."""
    argv = ["convert", "zoo-drafter", tmp_path / "out", "--json", "--calibration", text, "--evaluate", text]
    done = subprocess.run([sys.executable, "-m", "ramify", *argv], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["calibration_tokens"] == 420
    assert done.stderr.startswith("convert: calibration has 420 tokens; ") and done.stderr.count("\n") == 1
    assert "takes 512 or more here" in done.stderr and done.stderr.endswith("Give a longer text.\n")


def test_a_person_reads_before_and_after(tmp_path, text, capsys):
    code, told, err = run(capsys, "zoo-drafter", tmp_path / "out", "--to", "int8", "--head", "dense", "--evaluate", text)
    assert (code, err) == (0, "")
    assert "int8 by rtn" in told and "head as it is" in told
    for line in ("all tensors, MB", "weight error", "nats a token", "perplexity"):
        assert line in told
    assert "tokens of text.py" in told.splitlines()[-1]


def test_a_quantised_folder_is_repacked(tmp_path, text, capsys):
    """Its own format may be named, no other; nothing is rounded, and the table says so."""
    first, out = tmp_path / "first", tmp_path / "out"
    assert run(capsys, "zoo-drafter", first, "--to", "int8", "--evaluate", "none")[0] == 0
    code, told, err = run(capsys, first, out, "--to", "int8", "--evaluate", text)
    assert (code, err) == (0, "") and "int8, repacked from ramify_w8 bit for bit; head int8" in told and "error" not in told
    [nats] = [line.split()[-2:] for line in told.splitlines() if line.startswith("nats a token")]
    assert nats[0] == nats[1]
    for option, value in (("--to", "int4-g64"), ("--method", "rtn"), ("--calibration", text)):
        code, told, err = run(capsys, first, tmp_path / "no", option, value)
        assert (code, told, err.count("\n")) == (2, "", 1) and "first is int8 already" in err and f"Leave out {option}" in err
    assert not (tmp_path / "no").exists()


def test_without_perplexity(tmp_path, capsys):
    """Asked for, or for want of a tokenizer: the last line says why."""
    bare = tmp_path / "bare"
    shutil.copytree(folder_of("zoo-drafter"), bare, ignore=shutil.ignore_patterns("tokenizer*"))
    for source, options, says in (
        ("zoo-drafter", ["--evaluate", "none"], "it was not asked for"),
        (bare, [], "the model has no tokenizer.json"),
    ):
        code, told, _ = run(capsys, source, tmp_path / "out", "--to", "int8", "--force", *options)
        assert code == 0 and told.splitlines()[-1] == f"Perplexity was not measured: {says}."
    code, _, err = run(capsys, bare, tmp_path / "no", "--to", "int8", "--evaluate", __file__)
    assert (
        code == 2
        and err == "ramify convert: evaluate is given and IN has no tokenizer.json; takes one to read a text with. Leave it out.\n"
    )


def test_one_message_for_groups(tmp_path, capsys):
    """Whether weights are rounded into a folder or while they are loaded."""
    code, _, err = run(capsys, "zoo-drafter", tmp_path / "out", "--to", "int4-g128")
    assert code == 2
    assert main(["generate", "--model", "zoo-drafter", "--weights", "int4-g128", "x"]) == 2
    assert capsys.readouterr().err.replace("ramify load: ", "ramify convert: ") == err


def test_errors_are_one_line_and_leave_nothing(tmp_path, text, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(folder_of("zoo-drafter"), broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50_000])
    copy = tmp_path / "copy"
    shutil.copytree(folder_of("zoo-drafter"), copy)
    short = tmp_path / "short.py"
    short.write_text(TEXT[:50])
    out = tmp_path / "out"
    before = sorted(tmp_path.iterdir())
    cases = [
        (["zoo-drafter", out, "--to", "int4-g128"], 'tensor "model.layers.0.self_attn.q_proj.weight" has K = 192; int4-g128'),
        (["zoo-drafter", out, "--to", "int5"], 'format is "int5"; takes int8'),
        (["zoo-drafter", out, "--method", "best"], 'method is "best"; takes "rtn" or "hqq" or "gptq"'),
        (["zoo-drafter", out, "--calibration", tmp_path / "absent"], "absent cannot be read"),
        (["zoo-drafter", out, "--calibration-tokens", "2"], "calibration_tokens is 2; takes 128 or more"),
        (["zoo-drafter", out, "--calibration", short], "calibration has 15 tokens; takes 128 or more, better some thousand. Give a longer"),
        (["zoo-drafter", text], "exists; takes a new folder"),
        (["zoo-drafter", tmp_path, "--force"], "is no checkpoint folder"),
        ([broken, out], "model.safetensors"),
        ([copy, out, "--method", "gptq"], "calibration is missing"),
        ([tmp_path / "absent", out], "is no folder"),
        (
            ["zoo-drafter", text / "out", "--to", "int8"],
            f"ramify convert: OUT {text / 'out'} cannot be written (Not a directory); takes a new folder",
        ),
        (
            ["zoo-drafter", out, "--to", "int8", "--evaluate", tmp_path],
            f"ramify convert: {tmp_path} cannot be read (Is a directory); takes",
        ),
        (["zoo-drafter"], "OUT"),
        (["", out], 'ramify convert: IN is ""; takes a checkpoint folder'),
        (["zoo-drafter", ""], 'ramify convert: OUT is ""; takes the name of a new folder'),
        (["zoo-drafter", out, "--calibration", ""], '--calibration: "" is no file'),
        (["zoo-drafter", out, "--evaluate", ""], '--evaluate: "" is no file'),
    ]
    for argv, says in cases:
        code, told, err = run(capsys, *argv)
        assert (code, told, err.count("\n")) == (2, "", 1) and says in err and err.startswith("ramify ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    """Told of OUT by name, not of the folder of another name that is written; nothing is left."""

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    for writer in ("ramify.convert.folder.save_file", "pathlib.Path.write_text", "pathlib.Path.write_bytes", "pathlib.Path.mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(writer, full)
            code, _, err = run(capsys, "zoo-drafter", out, "--method", "rtn", "--evaluate", "none")
        assert (code, err) == (
            2,
            f"ramify convert: OUT {out} cannot be written (No space left on device); takes a new folder in a place that can be.\n",
        )
        assert list(tmp_path.iterdir()) == []


def test_interrupted(tmp_path, capsys, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("ramify.cli.convert.progress", stop)
    assert run(capsys, "zoo-drafter", tmp_path / "out", "--method", "rtn", "--evaluate", "none")[0] == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_ended_by_a_signal(tmp_path, name):
    """It removes what it had begun, parents too, before it leaves."""
    code = f"""if True:
        import os, signal, sys
        import ramify.cli.convert
        from ramify.cli import main

        def layers(numbers, stage):
            print(os.listdir({str(tmp_path / "new")!r}), flush=True)
            os.kill(os.getpid(), signal.{name})
            return numbers

        ramify.cli.convert.progress = layers
        sys.exit(main(["convert", "zoo-drafter", {str(tmp_path / "new" / "out")!r}, "--method", "rtn", "--evaluate", "none"]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ".part" in done.stdout and (done.returncode, done.stderr) == (128 + getattr(signal, name), "")
    assert list(tmp_path.iterdir()) == []


def test_the_bar_is_off_in_a_pipe(capsys):
    assert list(progress(range(3), "layers")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
