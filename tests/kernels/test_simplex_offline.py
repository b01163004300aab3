"""The kernels of the simplex maps compile for GPUs and keep their rows in registers.

Run as a script with a compute capability (80 or 90), this file compiles them and
prints a JSON list. The interpreter cannot, so the tests start a process without it.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from packaging.version import Version

# The longest row that must not spill, and T5's vocabulary, which is a multiple of 16:
# Triton then reads several logits at a time, and keeps other things in registers.
LONGEST, T5 = 32_767, 32_128
# Triton 3.9 keeps up to 152 bytes of the longest rows elsewhere: slower, not wrong.
SPILLED_SINCE_3_9 = 152
DTYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


@pytest.mark.parametrize("capability", [80, 90])
def test_no_kernel_spills(capability, tmp_path):
    triton = pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert len(reports) == 12
    spilled = max(report["bytes spilled"] for report in reports)
    is_3_9 = Version(triton.__version__) >= Version("3.9")
    assert spilled <= (SPILLED_SINCE_3_9 if is_3_9 else 0)
    # 1024 threads leave 64 registers to each: more would not launch.
    assert all(r["registers"] * 32 * r["warps"] <= 65_536 for r in reports)


# --- the script --------------------------------------------------------------------


class Recorder:
    """Takes the place of a kernel and notes how it is launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **keywords):
        self.arguments, self.keywords = arguments, keywords


def launches():
    """Give each kernel with the arguments that its host function launches it with."""
    from ftlib.kernels import simplex

    for dtype, columns in ((torch.float32, LONGEST), (torch.bfloat16, T5)):
        row = torch.empty(1, columns, dtype=dtype)
        for alpha in (2.0, 1.5):
            yield record(simplex, "entmax_kernel", simplex.entmax_rows, row, alpha)
        yield record(simplex, "top_k_kernel", simplex.top_k_rows, row, 5)
        for alpha in (2.0, 1.5, 1.0):
            host = simplex.gradient_rows
            yield record(simplex, "gradient_kernel", host, row, row, alpha)


def record(module, name, host, *arguments):
    kernel = getattr(module, name)
    setattr(module, name, Recorder(kernel))
    try:
        host(*arguments)
        return getattr(module, name)
    finally:
        setattr(module, name, kernel)


def compiled(launch, capability):
    """Compile a launch as Triton would specialise it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    keywords = dict(launch.keywords)
    options = {"num_warps": keywords.pop("num_warps")}
    signature, attributes = {}, {}
    for i, (name, value) in enumerate(
        zip(launch.kernel.arg_names, launch.arguments, strict=False)
    ):
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = DTYPES[value.dtype] if is_tensor else "i32"
        if is_tensor or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(keywords, "constexpr")
    source = ASTSource(launch.kernel, signature, keywords, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=options
    )


def report(launch, capability):
    from _offline_compile import resources

    usage = resources(compiled(launch, capability).asm["cubin"])
    return {
        "kernel": launch.kernel.__name__,
        "warps": launch.keywords["num_warps"],
        "registers": usage["REG"],
        "bytes spilled": usage["STACK"] + usage["LOCAL"],
    }


if __name__ == "__main__":
    capability = int(sys.argv[1])
    print(json.dumps([report(launch, capability) for launch in launches()], indent=1))
