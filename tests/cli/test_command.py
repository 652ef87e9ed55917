"""The command itself, in processes of its own: help, version, env, broken pipes, tracebacks on request."""

import json
import os
import subprocess
import sys

import pytest

import ramify
from ramify.cli import main
from ramify.cli.table import table


def ramify_command(*argv, **options):
    """The finished process of `ramify ARGV`."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **options.pop("env", {})}
    return subprocess.run([sys.executable, "-m", "ramify", *argv], capture_output=True, text=True, env=environment, **options)


def test_version_and_help_load_no_torch():
    code = (
        "import sys\nfrom ramify.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    for argv in (["--version"], ["--help"], ["generate", "--help"], ["convert", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr
    assert ramify.__version__ in ramify_command("--version").stdout


@pytest.mark.parametrize("argv", [[], ["generat"], ["env", "--what"]])
def test_usage_errors_are_one_line(argv, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("ramify")


def test_env_json():
    done = ramify_command("env", "--json", env={"RAMIFY_ISA": "portable", "OMP_NUM_THREADS": "1"})
    found = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == ""
    assert found["ramify"] == ramify.__version__ and "torch" in found["packages"]
    assert found["cpu"]["level"] == "portable" and found["cpu"]["levels"]["portable"] is True
    assert found["threads"] == 1 and len(found["openmp"]) == 1 and "pages" in found["memory"]
    assert found["variables"]["RAMIFY_ISA"] == "portable" and "built" in found["cuda"]
    ops = {row["op"]: row for row in found["kernels"]}
    assert {"tree_attention", "linear", "rms_norm", "verify_greedy"} <= set(ops)
    assert all(row["taken"] == "cpu" and "cpu" not in row["why_not"] for row in ops.values())  # each has a kernel, asked for what it takes


def test_env_for_a_person():
    """Facts first, one a line under its name; then a table without columns that say nothing; every dash has its reason somewhere."""
    done = ramify_command("env", env={"OMP_NUM_THREADS": "1", "RAMIFY_ISA": "portable"})
    assert done.returncode == 0
    facts, table, last = done.stdout.rstrip("\n").split("\n\n")
    facts = facts.splitlines()
    names = [line.partition(" ")[0] for line in facts]
    assert names[:8] == ["ramify", "cpu", "levels", "openmp", "memory", "triton", "cuda", "generate"] and "variables" in names
    assert ramify.__version__ in facts[0] and "1 thread" in facts[1] and "1 threads" not in facts[1]
    assert "portable taken" in facts[2] and "OMP_NUM_THREADS=1" in done.stdout and "RAMIFY_ISA=portable" in done.stdout
    heading, *rows = table.splitlines()
    assert heading.startswith("on the CPU  ") and heading.endswith("taken here")
    columns = list(zip(*(row.split() for row in rows)))
    assert "tree_attention" in columns[0] and all(set(column) != {"-"} for column in columns)
    assert len(heading.removeprefix("on the CPU").removesuffix("taken here").split()) == len(columns) - 2
    greedy = next(row.split() for row in rows if row.startswith("verify_greedy"))
    assert greedy[1] == "int32" and greedy[-1] == "cpu" and {*columns[1]} == {"float32", "int32"}
    assert "ramify.explain" in last and "\n" not in last


def test_env_under_a_forced_backend():
    """What cannot run is not told as taken; generate says that it runs on the CPU kernels alone."""
    for name, taken in (("triton", None), ("reference", "reference")):
        found = json.loads(ramify_command("env", "--json", env={"RAMIFY_BACKEND": name}).stdout)
        ops = {row["op"]: row for row in found["kernels"]}
        assert ops["linear"]["taken"] == ops["kv_append"]["taken"] == taken
        assert found["generate"]["taken"] is None and f'backend "{name}" is forced' in found["generate"]["why_not"]
        done = ramify_command("env", env={"RAMIFY_BACKEND": name})
        assert ("refused" in done.stdout) == (taken is None) and "Use ramify.backend(None), or unset RAMIFY_BACKEND." in done.stdout
        done = ramify_command("generate", "--max-new-tokens", "2", "x", env={"RAMIFY_BACKEND": name})
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "model layer runs on" in done.stderr
    assert json.loads(ramify_command("env", "--json").stdout)["generate"] == {"taken": "cpu", "why_not": ""}


def test_env_with_a_level_that_is_not_there():
    done = ramify_command("env", env={"RAMIFY_ISA": "avx9000"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "avx9000" in done.stderr and "RAMIFY_ISA" in done.stderr


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m ramify env --json | head -c 1 > {os.devnull}; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 141) and done.stderr == ""


def test_traceback_on_request():
    assert "Traceback" in ramify_command("generate", env={"RAMIFY_TRACEBACK": "1"}).stderr
    assert "Traceback" not in ramify_command("generate").stderr


def test_table_columns():
    assert table(["name", "n"], [["a", "1"], ["long one", "100"]]) == "name        n\na           1\nlong one  100"


def test_the_demo_begins_with_held_out_source():
    from ramify.cli import demo
    from ramify.zoo.corpus import held_out_texts

    text = demo.prompt()
    assert held_out_texts()[demo.MODULE].startswith(text) and len(text.splitlines()) == demo.LINES
    with pytest.raises(ValueError, match="module is antigravity"):
        demo.prompt("antigravity")
