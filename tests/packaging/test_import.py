"""`import ramify` is cheap, silent and leaves no trace; one OpenMP runtime serves torch and ramify in either order."""

import os
import subprocess
import sys
import tempfile

import pytest

import ramify


def python(code, **environment):
    """Standard output of a fresh interpreter that runs `code`."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tempfile.gettempdir())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_less_than_300_ms_after_torch():
    code = "import time, torch; t = time.perf_counter(); import ramify; dir(ramify); print(time.perf_counter() - t)"
    assert any(float(python(code)) < 0.3 for _ in range(3))


def test_import_only_imports(tmp_path):
    code = """if True:
        import sys, ramify
        heavy = {"torch", "transformers", "matplotlib", "rich", "triton", "tokenizers", "tqdm"} & set(sys.modules)
        print(sorted(heavy), [name for name in sys.modules if name.startswith("ramify.")])
    """
    assert python(code, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path)).strip() == "[] []"
    assert list(tmp_path.iterdir()) == []


def test_the_parts_that_generate_need_no_transformers_and_touch_no_gpu():
    code = """if True:
        import sys, torch, ramify
        ramify.generate, ramify.load, ramify.methods()
        heavy = {"transformers", "matplotlib", "rich"} & set(sys.modules)
        print(sorted(heavy), torch.cuda.is_initialized())
    """
    assert python(code).strip() == "[] False"


@pytest.mark.parametrize("order", ["import torch, ramify._cpu", "import ramify._cpu, torch"])
def test_one_openmp_runtime(order):
    code = f"""if True:
        {order}
        torch.ones(512, 512) @ torch.ones(512, 512)
        maps = open("/proc/self/maps").read().split()
        print(len({{part for part in maps if "gomp" in part or "iomp" in part or "libomp" in part}}))
    """
    assert python(code).strip() == "1"


@pytest.mark.parametrize("there", [False, True])
def test_what_needs_transformers_says_what_to_install(tmp_path, there):
    """Whether transformers is missing or, an empty package here, too old."""
    if there:
        (tmp_path / "transformers").mkdir()
        (tmp_path / "transformers/__init__.py").touch()
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        if not {there}:
            sys.modules["transformers"] = None
        import ramify
        for name in ("CustomGenerate", "RamifyConfig"):
            try:
                getattr(ramify, name)
            except ImportError as error:
                print(error)
    """
    came = "of a version without what it uses" if there else "not installed"
    assert python(code).splitlines() == [
        f"{name}: transformers is {came}. pip install 'ramify[hf]' brings the right one." for name in ("CustomGenerate", "RamifyConfig")
    ]


PUBLIC = [
    *(
        "CheckpointError",
        "CustomGenerate",
        "RamifyConfig",
        "TokenTree",
        "UnsupportedModelError",
        "backend",
        "debug",
        "drafter",
        "explain",
        "generate",
    ),
    *(
        "load",
        "methods",
        "page_format",
        "row_invariant",
        "size_policy",
        "verifier",
        "ops",
        "reference",
        "testing",
        "kernels",
        "__version__",
    ),
]


def test_public_names():
    """A name that is added or taken away is a decision: make it here as well."""
    assert sorted(ramify.__all__) == sorted(PUBLIC)
    assert set(ramify.__all__) <= set(dir(ramify))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves(name):
    if name in ("CustomGenerate", "RamifyConfig"):
        pytest.importorskip("transformers")
    assert getattr(ramify, name) is not None


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        _ = ramify.generat


def test_a_build_for_a_gpu_alone_has_no_cpu_kernels():
    """RAMIFY_CPU=off builds none: ops, models, sampling and what a day on a GPU needs import all the same, and numpy draws."""
    code = """if True:
        import sys
        sys.modules["ramify._cpu"] = None  # as if it were not there
        import ramify.ops, ramify.model.load, ramify.reference, ramify.decode.generate, ramify.testing.on_device
        import numpy as np
        from ramify.sampling.pipeline import Sampling, SamplingParams
        print(Sampling([SamplingParams(temperature=1.0, seed=5)], [[0]]).draw(0, np.zeros(9, np.float32)) in range(9))
    """
    assert python(code).strip() == "True"
