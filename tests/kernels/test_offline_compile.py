"""What the interpreter cannot tell: that the kernels compile for GPUs, and to what."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("_offline_compile.py")
COLUMNS = ("registers", "spilled", "shared", "wgmma", "mma", "copies")


@pytest.fixture(scope="module", params=[80, 90])
def compiled(request, tmp_path_factory):
    """Every kernel as compiled for a capability, by name."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, SCRIPT, str(request.param)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    kernels = {kernel["name"]: kernel for kernel in json.loads(done.stdout)}
    print_table(request.param, kernels)
    return request.param, kernels


def print_table(capability, kernels):
    header = f"sm_{capability}"
    print(f"\n{header:26}" + "".join(f"{column:>11}" for column in COLUMNS))
    for name, kernel in kernels.items():
        print(f"{name:26}" + "".join(f"{kernel[column]:11,}" for column in COLUMNS))


def test_no_kernel_spills_a_register(compiled):
    _, kernels = compiled
    assert {name: k["spilled"] for name, k in kernels.items() if k["spilled"]} == {}


def test_the_matmul_runs_on_tensor_cores_fed_by_asynchronous_copies(compiled):
    capability, kernels = compiled
    instruction = "wgmma" if capability == 90 else "mma"
    for name, kernel in kernels.items():
        if name.startswith("fused") and kernel["element"] != "fp32":
            assert kernel[instruction] > 0, name
            assert kernel["copies"] > 0, name


def test_float32_is_multiplied_in_float32(compiled):
    """Tensor cores would round its factors to TF32, ten bits of mantissa."""
    kernel = compiled[1]["fused_moments, float32"]
    assert kernel["wgmma"] == kernel["mma"] == 0


def test_the_scalars_of_torch_compile_bring_no_float64_arithmetic(compiled):
    assert {name for name, k in compiled[1].items() if k["float64"]} == set()


def test_tiles_fit_the_shared_memory(compiled):
    """Of an A100 as of its smaller relatives (99 KiB), and of an H100 (227 KiB)."""
    capability, kernels = compiled
    limit = {80: 99, 90: 227}[capability] * 1024
    assert all(kernel["shared"] <= limit for kernel in kernels.values())


@pytest.mark.parametrize("element", ["fp32", "fp16", "bf16"])
def test_moments_of_heads_move_sixteen_bytes_at_a_time(compiled, element):
    """Nothing in a table of addresses says so by itself: the kernel's hints must."""
    kernels = compiled[1]
    assert kernels[f"adamw, {element}, width 4"]["wide"] >= 8
    assert kernels[f"adamw, {element}, width 1"]["wide"] == 0


@pytest.mark.parametrize("name", ["norm", "epilogue", "activation, relu", "gate, silu"])
def test_streams_move_sixteen_bytes_at_a_time(compiled, name):
    assert compiled[1][name]["wide"] >= 8
