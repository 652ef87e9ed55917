"""Each benchmark runs with --quick on tiny shapes, its document is of the schema, its picture is a picture; and the probes answer."""

import json

import pytest
import torch

from benchmarks import end_to_end, engines, models, probes, report, step, tree_attention
from benchmarks.peers import llama_model


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(main, folder, *words):
    json_file, png = folder / "out.json", folder / "out.png"
    code = main(["--quick", "--threads", "1", "--rounds", "1", "--json", str(json_file), "--plot", str(png), *words])
    doc = json.loads(json_file.read_text())
    report.validate(doc)
    assert png.read_bytes().startswith(b"\x89PNG")
    return code, doc


def test_tree_attention(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    code, doc = run(tree_attention.main, tmp_path, "--only", "dtype=f32")
    rows = {(row["provider"], row["shape"]["T"]): row for row in doc["rows"]}
    assert code == 0 and len(rows) == 8
    for row in rows.values():
        assert row["status"] == "ok" and row["max_error"] < 1e-4 and row["share_of_floor"] > 0, row
    assert rows["sdpa, heads packed by hand", 8]["ratio"] <= 1
    assert "verdict: ramify" in capsys.readouterr().out


def test_tree_attention_would_see_a_wrong_mask(tmp_path, monkeypatch):
    words = tree_attention.words
    monkeypatch.setattr(tree_attention, "words", lambda visible: words(torch.eye(len(visible), dtype=torch.bool)))  # no ancestors
    code, doc = run(tree_attention.main, tmp_path, "--only", "dtype=f32", "--only", "T=8")
    [row] = [row for row in doc["rows"] if row["provider"] == "ramify"]
    assert row["status"] == "wrong" and "us" not in row and code == 1


def test_random_tree_and_words():
    rng = torch.Generator().manual_seed(5)
    for T in (1, 2, 63, 64, 65, 200):
        visible = tree_attention.random_tree(T, rng)
        packed = tree_attention.words(visible)
        assert packed.shape == (T, -(-T // 64))
        for row in range(0, T, 7):
            for other in range(T):
                assert bool(int(packed[row, other >> 6]) >> (other & 63) & 1) == bool(visible[row, other])
            above = visible[row].nonzero().flatten().tolist()
            assert above[-1] == row and all(bool((visible[a] & ~visible[row]).sum() == 0) for a in above)


def test_bad_axis_is_a_usage_error(capsys):
    with pytest.raises(ValueError, match="axis is 'rows'"):
        tree_attention.main(["--quick", "--only", "rows=3"])
    with pytest.raises(ValueError, match="takes model or temperature"):
        end_to_end.main(["--quick", "--only", "rows=3"])
    with pytest.raises(SystemExit) as stop:
        report.run_main(lambda _: tree_attention.main(["--only", "T"]))
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = (
        "--only",
        "model=tiny",
        "--methods",
        "plain,prompt_lookup,draft_chain",
        "--new-tokens",
        "6",
        "--zoo",
        str(tmp_path),
        "--weights",
        "",
    )
    code, doc = run(end_to_end.main, tmp_path, *words)
    rows = {row["provider"]: row for row in doc["rows"]}
    assert code == 0
    assert rows["transformers assistant model"]["status"] == "not run"
    assert rows["ramify draft_chain"]["status"] == "not run"  # no second model has this vocabulary
    for name in ("ramify plain", "ramify prompt_lookup", "transformers prompt lookup"):
        assert rows[name]["status"] == "ok", rows[name]
        assert rows[name]["tokens"] == 12 and rows[name]["tokens_per_step"] >= 1
    assert rows["ramify plain"]["steps"] == 12 and rows["ramify prompt_lookup"]["identical"] == "2/2"
    best = [row for row in doc["rows"] if row.get("ratio") == 1]
    assert len(best) == 1 and best[0]["provider"].startswith("transformers generate")


def test_end_to_end_in_low_bits(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refused = engines.ramify_entries(models.random_model("tiny"), None, ["plain"], ["int5"])
    assert list(refused) == ["ramify plain", "ramify plain, int5"] and refused["ramify plain, int5"][0] is None
    assert refused["ramify plain, int5"][1]["status"] == "failed" and "int5" in refused["ramify plain, int5"][1]["reason"]
    entries = engines.ramify_entries(models.random_model("tiny"), None, ["plain", "prompt_lookup"], ["int4-g64"])
    if "status" in entries["ramify plain, int4-g64"][1]:
        pytest.skip(entries["ramify plain, int4-g64"][1]["reason"])
    (dense, facts), (plain, small), (lookup, _) = (
        entries[f"ramify {name}"] for name in ("plain", "plain, int4-g64", "prompt_lookup, int4-g64")
    )
    assert small["dtype"] == "int4-g64" and small["bytes"] < facts["bytes"]
    prompt = [5, 6, 7] * 5
    assert plain(prompt, 12, 0.0, 0).tokens == lookup(prompt, 12, 0.0, 0).tokens
    assert len(dense(prompt, 12, 0.0, 0).tokens) == 12


def test_each_weight_has_its_own_plain():
    for name, plain in (
        ("ramify auto", "ramify plain"),
        ("ramify auto, int4-g64", "ramify plain, int4-g64"),
        ("ramify plain, int8", "ramify plain, int8"),
        ("transformers generate, bf16", "ramify plain"),
        ("llama.cpp Q4_0", "ramify plain"),
    ):
        assert end_to_end.plain_of(name) == plain
    us = {"ramify plain": 100, "ramify plain, int4-g64": 50, "ramify auto, int4-g64": 25, "transformers generate, bf16": 400}
    rows = [
        {"provider": name, "status": "ok", "us": {"median": value}, "baseline": name.startswith("t"), "backend": name}
        for name, value in us.items()
    ]
    end_to_end.finish(rows)
    assert [row["over_plain"] for row in rows] == [1, 1, 2, 0.25] and [row["ratio"] for row in rows] == [4, 8, 16, 1]


def test_verdict_of_low_bits():
    shape = {"model": "160m", "temperature": 0.0}
    facts = {"status": "ok", "shape": shape, "backend": "ramify avx2", "over_plain": 1.0, "ratio": 4.0, "share_of_floor": 0.9}
    facts["tokens_per_step"] = 1.0
    low = {**facts, "dtype": "int4-g64", "ms_per_step": 8.0}
    rows = [
        {**facts, "provider": "ramify plain", "dtype": "bf16", "us": {"median": 100.0}, "ms_per_step": 10.0},
        {**facts, "provider": "ramify plain, int4-g64", "dtype": "int4-g64", "us": {"median": 40.0}, "ms_per_step": 4.0},
        {**low, "provider": "ramify auto, int4-g64", "us": {"median": 20.0}, "over_plain": 2.0, "tokens_per_step": 1.9},
        {**low, "provider": "ramify draft_chain, int4-g64", "us": {"median": 19.0}, "over_plain": 2.1},
        {**facts, "provider": "llama.cpp Q4_0", "backend": "llama.cpp", "dtype": "Q4_0", "us": {"median": 50.0}, "ms_per_step": 5.0},
    ]
    text = end_to_end.verdict(rows)
    assert "int4-g64 2.50x plain in bf16, step 0.80 of llama.cpp Q4_0's, best auto, int4-g64 2.00x that" in text
    assert "no method guessed right" in end_to_end.verdict([row for row in rows if "auto" not in row["provider"]])


def test_step(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, doc = run(step.main, tmp_path, "--providers", "ramify bf16")
    rows = {row["shape"]["M"]: row for row in doc["rows"]}
    assert code == 0 and sorted(rows) == [1, 8] and rows[1]["single_steps"] == 1 and rows[8]["single_steps"] > 0
    assert rows[1]["bytes"] > 0 and rows[8]["share_of_floor"] > 0 and step.Models.held == {}
    assert "in single steps" in capsys.readouterr().out


def test_step_figures():
    limits = probes.Limits("native", 2, read=10.0, read_one=8.0, peak={"fp32": 100.0, "int8": 200.0})
    rows = []
    for M, ours, theirs in ((1, 2000.0, 2500.0), (8, 3000.0, 9000.0)):
        facts = {"status": "ok", "bytes": 9_000_000, "arithmetic": "int8", "shape": {"model": "160m", "context": 256, "M": M}}
        rows += [{**facts, "provider": "ramify int4-g64", "baseline": False, "us": {"median": ours}}]
        rows += [{**facts, "provider": "llama.cpp Q4_0", "baseline": True, "us": {"median": theirs}}]
        step.finish(rows[-2:], limits, 18_000_000, {9_000_000: 20.0})
    report.single_steps(rows)
    assert rows[0]["floor_us"] == 450 and rows[2]["floor_us"] == 2 * 8 * 18e6 / 200e9 * 1e6
    text = step.verdict(rows)
    assert "160m: int4-g64 step 2.00 ms, 0.80 of llama.cpp Q4_0's; in single steps: 8 rows 1.50. 2 of 2 gates held. 0 wrong" in text
    rows[2]["single_steps"], rows[0]["ratio"] = 1.6, 0.5
    assert "(missed: 160m 2.00 of llama.cpp Q4_0's step, to be 1.0; 160m M=8 1.60 steps, to be 1.5)" in step.verdict(rows)


def test_a_lossless_method_that_parts_from_plain_has_no_speed():
    same, other = (models.Run([1, 2, last], 3, 0.1, 3) for last in (3, 4))
    contest = object.__new__(end_to_end.Contest)
    contest.prompts = {"argparse": [1]}
    rows = {name: {"status": "ok", "us": {}, "tokens_per_second": 1.0} for name in ("ramify plain", "ramify x", "transformers generate")}
    contest._identity(rows, {"ramify plain": [same], "ramify x": [other], "transformers generate": [other]}, 0.0)
    assert rows["ramify x"]["status"] == "wrong" and "us" not in rows["ramify x"]
    assert rows["ramify x"]["reason"] == "parts from plain at token 2 after argparse"
    assert rows["transformers generate"]["status"] == "ok" and rows["transformers generate"]["identical"] == "0/1"


def test_parting():
    assert end_to_end.parting([1, 2], [1, 2]) is None
    assert end_to_end.parting([1, 2], [1, 3]) == 1
    assert end_to_end.parting([1, 2, 3], [1, 2]) == 2


def test_floor_is_bytes_or_operations():
    limits = probes.Limits("native", 2, read=10.0, read_one=8.0, peak={"fp32": 100.0})
    assert limits.floor(10**9) == pytest.approx(0.1)
    assert limits.floor(10**9, flops=10**12) == pytest.approx(10.0)
    assert limits.floor(10**9, flops=10**12, arithmetic="bf16") == pytest.approx(10.0)  # no bf16 dot products: widened to fp32
    assert probes.Limits("torch", 2, 10.0, 8.0, peak={"fp32": 100.0, "bf16": 1.0}).floor(0, 10**12, "bf16") == pytest.approx(10.0)
    assert limits.floor(10**9, read=20.0) == pytest.approx(0.05)


def test_probe_answers():
    probe = probes.Probe(samples=1, block=8 << 20)
    assert probe.read(1 << 20, 1) > 0.05 and probe.peak("fp32", 1) > 0.05
    assert probe.peak("bf16", 1) >= 0


def test_the_own_benchmark_of_a_peer(tmp_path, monkeypatch):
    """A program named llama-bench on the path: its words become a row of new tokens alone, which nothing is compared with."""
    program, folder = tmp_path / "llama-bench", tmp_path / "model"
    program.write_text('#!/bin/sh\necho "$@" > "$0.words"\necho \'[{"samples_ns": [2000000000, 1000000000, 3000000000]}]\'\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llama_model, "missing", lambda: "")
    monkeypatch.setattr(llama_model, "convert", lambda folder, file: 1000)
    name, seconds, facts = engines.llama_bench_entry(folder, 256, 100, 3)
    assert (seconds, facts["bytes"], facts["status"]) == ([2.0, 1.0, 3.0], 1000, "ok")
    words = (tmp_path / "llama-bench.words").read_text().split()
    assert words[words.index("-d") + 1] == "256" and words[words.index("-n") + 1] == "100" and words[words.index("-p") + 1] == "0"
    row = {"provider": name, **facts, "us": {"median": 20_000.0}}
    plain = {"provider": "ramify plain", "status": "ok", "us": {"median": 100.0}, "baseline": False, "backend": "ramify"}
    end_to_end.finish([{**plain, "provider": "transformers", "baseline": True}, plain, row])
    assert "ratio" not in row and "over_plain" not in row and plain["over_plain"] == 1
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 1\n")
    failed = engines.llama_bench_entry(folder, 256, 100, 3)[2]
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: llama-bench: no such model")
    program.unlink()
    assert engines.llama_bench_entry(folder, 256, 100, 3)[2]["status"] == "not installed"
