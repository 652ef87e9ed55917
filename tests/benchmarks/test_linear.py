"""The linear benchmark: its figures on made-up rows, its providers against the reference, a whole run on a tiny layer."""

import json
import sys
import types

import pytest
import torch

from benchmarks import layers, linear, probes, report
from benchmarks.harness import Entry, Machine, Plan, measure
from benchmarks.peers import llama_cpp, llama_model, onnxruntime, pytorch
from benchmarks.registry import OPS, error_of

LIMITS = probes.Limits("native", 2, read=10.0, read_one=8.0, peak={"fp32": 100.0, "int8": 200.0})


def row(provider, us, M, layer="4096x4096", dtype="int4-g64", baseline=False, **more):
    facts = {"op": "linear", "provider": provider, "backend": "x", "dtype": dtype, "baseline": baseline, "status": "ok"}
    times = {"us": {"median": us, "p20": us, "p80": us}, "bursts": {"clean": 3, "disturbed": 0}}
    return {**facts, "shape": {"layer": layer, "M": M}, **times, "bytes": 8_900_000, "arithmetic": "int8", **more}


def cell(M, ours, int4, int8, bf16=5000.0):
    return [
        row("ramify int4-g64", ours, M),
        row("llama.cpp Q4_0", int4, M, dtype="int4-g32", baseline=True),
        row("torch dynamic int8", int8, M, dtype="int8", baseline=True),
        row("torch bf16 F.linear", bf16, M, dtype="bf16", baseline=True, arithmetic="bf16"),
        row("torch fp32 F.linear", bf16 + 1, M, dtype="fp32", baseline=True, arithmetic="fp32"),
    ]


def finished(*cells):
    for rows in cells:
        linear.finish(rows, LIMITS, {})
    rows = [each for rows in cells for each in rows]
    report.single_steps(rows)
    return rows


def test_ratios_floors_and_single_steps():
    rows = finished(cell(1, 1000.0, 990.0, 1500.0), cell(8, 1200.0, 3000.0, 1800.0))
    mine = {r["shape"]["M"]: r for r in rows if r["provider"] == "ramify int4-g64"}
    assert mine[1]["over_int4"] == mine[1]["ratio"] == 0.99
    assert mine[8]["over_int4"] == 2.5 and mine[8]["ratio"] == 1.5  # the best of any kind is another
    assert mine[1]["floor_us"] == 890.0 and mine[1]["single_steps"] == 1
    assert mine[8]["floor_us"] == pytest.approx(2 * 8 * 4096**2 / 200e9 * 1e6) and mine[8]["single_steps"] == 1.2
    dense = [r for r in rows if r["provider"].endswith("F.linear") and r["shape"]["M"] == 8]
    assert [r.get("faster_dense") for r in dense] == [True, None]
    assert dense[1]["floor_us"] == pytest.approx(2 * 8 * 4096**2 / 100e9 * 1e6)  # fp32 peak


def test_hot_floors_are_those_of_the_cache():
    rows = cell(1, 100.0, 100.0, 100.0)
    linear.finish(rows, LIMITS, {8_900_000: 89.0})
    assert rows[0]["floor_us"] == pytest.approx(2 * 4096**2 / 200e9 * 1e6)


def test_gates():
    good = finished(cell(1, 1000.0, 980.0, 1500.0), cell(8, 1250.0, 1800.0, 1800.0), cell(16, 1400.0, 4e3, 1800.0), cell(64, 3e3, 9e3, 3e3))
    assert linear.gates(good) == "8 of 8 gates held"  # three of them shares of the floor
    bad = finished(cell(1, 1000.0, 900.0, 1500.0), cell(8, 1350.0, 1800.0, 1800.0))
    text = linear.gates(bad)
    assert text.startswith("1 of 4 gates held") and "M=1 0.90x llama.cpp Q4_0, to be 0.97" in text
    assert "M=8 1.33x int4, to be 1.4" in text and "M=8 1.35 steps, to be 1.3" in text
    assert linear.gates([{**r, "shape": {"layer": "1024x1024", "M": r["shape"]["M"]}} for r in bad]) == ""  # too small to be judged
    assert linear.gates([r for r in good if not r["baseline"] and r["shape"]["M"] == 1]) == "1 of 1 gates held"  # no peer is needed
    slow = linear.gates(finished(cell(1, 1060.0, 1060.0, 1500.0), cell(4, 1200.0, 3e3, 3e3)))
    assert slow.startswith("1 of 3 gates held (missed: ")
    assert "4096x4096 M=1 84% of the floor, to be 85%; 4096x4096 M=4 74% of the floor, to be 75%" in slow
    old = [{**r, "backend": "ramify avx2"} if r["provider"] == linear.MAIN else r for r in bad + cell(16, 1400.0, 4e3, 1.0)[:1]]
    old[-1] |= {"share_of_floor": 0.65, "backend": "ramify avx2"}
    held = [r for r in old if r["provider"] == linear.MAIN and r["shape"]["M"] == 8][0]["share_of_floor"]
    text = linear.gates(old)  # without VNNI further rows are held to that level's peak
    assert "M=16 65% of the int8 peak, to be 70%" in text and "steps" not in text and "torch dynamic" not in text
    assert text.startswith(f"{1 + (held >= 0.7)} of 5 gates held")
    assert "gates held" in linear.verdict(good) and "M=8 1.44x int4, 1.44x any, 1.25 steps" in linear.verdict(good)


def test_a_call_of_many_parts_counts_for_each():
    class Clock(Machine):
        time = 0.0

        def now(self):
            return self.time

        def sleep(self, seconds):
            self.time += seconds

        def kept_off(self):
            return None

        def others(self):
            return 0

    clock, calls = Clock(), []

    def call():
        calls.append(0)
        clock.time += 1.0

    plan = Plan(rounds=2, burst=0.0, calls=(3, 9), enough=1, quiet=0)
    [timing] = measure([Entry("graph", call, [()], parts=100)], plan, clock)
    assert timing.median == pytest.approx(0.01)
    assert len(calls) == 2 + 2 * 1  # one call of a hundred parts is enough for a burst


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "4096"], "--shapes has '4096'; takes NxK"),
        (["--shapes", "4096x100"], "N a multiple of 32 and K of 256"),
        (["--shapes", "0x256"], "--shapes has '0x256'"),
        (["--rows", "0"], "--rows has '0'; takes 1 to 128"),
        (["--rows", "129"], "--rows has '129'"),
        (["--only", "T=3"], "axis is 'T'; takes one of layer, M"),
    ],
)
def test_bad_options(words, message):
    with pytest.raises(ValueError, match=message):
        linear.main(["--quick", *words])


def test_list_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["linear"])
    [peer] = [each for each in OPS["linear"].providers if each.name == "llama.cpp Q4_0"]
    monkeypatch.setattr(peer, "needs", lambda: "pip install it")
    assert linear.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(OPS["linear"].providers) and any(
        line.split() == ["llama.cpp", "Q4_0", "pip", "install", "it"] for line in lines
    )


@pytest.fixture
def few_copies(monkeypatch):
    """A tiny layer is cold at four copies, in graphs of two or so: thousands would be as many bytes as a real one needs."""
    monkeypatch.setattr(layers, "copies_needed", lambda size, cold: 4 if cold else 1)
    monkeypatch.setattr(layers, "GRAPH", 20_000)


@pytest.mark.parametrize("provider", OPS["linear"].providers, ids=lambda each: each.name)
@torch.inference_mode()
def test_every_provider_multiplies_its_own_weights(provider, few_copies):
    if provider.needs and (reason := provider.needs()):
        pytest.skip(reason)
    for cold in (False, True):
        layer = layers.Layer(64, 256, seed=3)
        for M in (1, 3, 17):
            loaded = provider.load(layer, M, cold)
            assert len(loaded.copies) * loaded.parts in ((4,) if cold else (1, layers.NODES)) and loaded.want.shape == (M, 64)
            for args in loaded.copies:
                assert error_of(provider.call(*args), loaded.want) <= loaded.limit


def test_cold_copies_are_other_memory(few_copies):
    load = layers.loader("x", pytorch.dense(torch.float32), 1.0, "fp32")
    assert len({weight.data_ptr() for _, weight in load(layers.Layer(64, 256, 0), 2, True).copies}) == 4
    assert len(load(layers.Layer(64, 256, 0), 2, False).copies) == 1


def test_graphs_are_alike_and_take_no_copy_twice():
    assert layers.graphs(1, 1 << 20) == [[0] * layers.NODES]
    assert layers.graphs(3, 1 << 30) == [[0], [1], [2]]
    for copies, size in ((241, 557_056), (5, 2 << 20), (2, 100)):
        found = layers.graphs(copies, size)
        flat = [number for graph in found for number in graph]
        assert len({len(graph) for graph in found}) == 1 and flat == list(range(len(flat))) and copies - len(found[0]) < len(flat) <= copies


def test_weights_are_made_once_for_all_rows():
    made = []

    def hold(layer, count):
        made.append(0)
        return pytorch.dense(torch.float32)(layer, lambda size: 1)

    load, layer = layers.loader("x", hold, 1.0, "fp32"), layers.Layer(32, 256, 0)
    few, many = load(layer, 2, False), load(layer, 5, False)
    assert len(made) == 1 and torch.equal(few.want, many.want[:2]) and layer.held["x"].weight is None


def test_a_whole_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    before = torch.get_num_threads()
    files = "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")
    words = ("--providers", "ramify int4-g64,torch int4pack_mm g64,torch dynamic,onnxruntime", "--shapes", "64x256", "--rows", "1,3")
    code = linear.main(["--quick", "--threads", "1", "--rounds", "1", *files, *words])
    torch.set_num_threads(before)
    doc = json.loads((tmp_path / "out.json").read_text())
    report.validate(doc)
    assert code == 0 and (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    rows = {(r["provider"], r["shape"]["M"]): r for r in doc["rows"]}
    mine = rows["ramify int4-g64", 3]
    assert mine["status"] == "ok" and mine["bytes"] == 64 * 256 * 4.25 / 8 and mine["arithmetic"] == "int8"
    assert mine["over_int4"] > 0 and mine["ratio"] > 0 and mine["single_steps"] > 0 and mine["share_of_floor"] > 0
    assert rows["ramify int4-g64", 1]["single_steps"] == 1
    out = capsys.readouterr().out
    assert "linear N x K = 64x256" in out and "in single steps" in out and "verdict: 64x256: ramify int4-g64 M=1" in out


def test_a_wrong_kernel_prints_no_number(tmp_path, monkeypatch):
    [mine] = [each for each in OPS["linear"].providers if each.name == "ramify int4-g128"]
    call = mine.call
    monkeypatch.setattr(mine, "call", lambda *args: 1.2 * call(*args))
    words = ("--providers", "int4-g128", "--shapes", "64x256", "--rows", "2", "--rounds", "1", "--json", str(tmp_path / "x.json"))
    code = linear.main(["--quick", *words])
    [bad] = [r for r in json.loads((tmp_path / "x.json").read_text())["rows"] if r["provider"] == "ramify int4-g128"]
    assert code == 1 and bad["status"] == "wrong" and "us" not in bad


def test_absent_peers_say_how_to_get_them(monkeypatch):
    for module in (onnxruntime, llama_cpp, llama_model):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
        assert module.missing().startswith("pip install")
    without = types.SimpleNamespace(origin="/nowhere/llama_cpp/__init__.py")
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: without)
    assert llama_cpp.missing() == llama_cpp.HOW


def test_rotation_pairs_and_names_of_gguf():
    heads, D, K = 2, 4, 3
    w = torch.arange(heads * D * K).view(heads * D, K).float()
    got = llama_model.pairs(w, heads)
    assert [int(r[0]) // K for r in got] == [0, 2, 1, 3, 4, 6, 5, 7]  # i beside i + D/2
    assert llama_model.pairs(w, 0) is w
    assert llama_model.renamed("model.layers.11.mlp.down_proj.weight") == "blk.11.ffn_down.weight"
    assert llama_model.renamed("lm_head.weight") == "output.weight"
