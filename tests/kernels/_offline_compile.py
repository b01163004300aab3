"""Compile kernels for a GPU that need not be there.

``python _offline_compile.py CAPABILITY`` (80 or 90) prints one JSON list. It must run
without ``TRITON_INTERPRET``, hence in a process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import triton
from ftlib.kernels import decomposition, head_adamw
from ftlib.kernels import vocabulary_head as kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

V, D = 151_936, 1536
OPTIONAL = ("second_ptr", "squares_ptr", "total_ptr", "argmax_ptr", "softcap")
SCALARS = ("scale", "softcap", "alpha", "beta", "log_columns", "eps")
SCALARS += ("decay", "gain", "beta_sq", "gain_sq")


class Case(NamedTuple):
    name: str
    kernel: Any
    element: str
    constants: dict[str, Any]
    options: dict[str, int]
    scalar: str = "fp32"


def cases(capability: int) -> list[Case]:
    row = {"V": V, "BLOCK": kernels.ROW_BLOCK}
    sced = {"V": V, "BLOCK": kernels.SCED_BLOCK}
    row_options = {"num_warps": kernels.ROW_WARPS}
    dot = {"V": V, "D": D, "BLOCK": 2048}
    bare = dict.fromkeys(OPTIONAL)
    no_sced = {"sced_weight_ptr": None, "mean_slope_ptr": None}
    moments = kernels._row_moments_kernel
    gradient = kernels._row_gradient_kernel
    return [
        Case("row_moments", moments, "bf16", row, row_options),
        Case("row_moments, bare", moments, "bf16", row | bare, row_options),
        Case("row_gradient_", gradient, "bf16", sced | no_sced, row_options),
        Case("row_gradient_, SCED", gradient, "bf16", sced, row_options),
        Case("row_gradient_, f64 scalars", gradient, "bf16", sced, row_options, "fp64"),
        Case("row_sced", kernels._row_sced_kernel, "bf16", sced, row_options),
        Case("target_logits", kernels._target_logits_kernel, "bf16", dot, row_options),
        fused("fused_moments", capability, "bf16", {}),
        fused("fused_moments, bare", capability, "bf16", bare),
        fused("fused_moments, one row", capability, "fp16", {"N": 1}),
        fused("fused_moments, float32", capability, "fp32", {}),
        *decomposed(),
        *head_steps(),
    ]


def decomposed() -> list[Case]:
    """Give the kernels of contextual decomposition, as for 144 sources."""
    norm, epilogue = decomposition._norm_kernel, decomposition._epilogue_kernel
    activation, gate = decomposition._activation_kernel, decomposition._gate_kernel
    longest, columns = decomposition.MAX_COLUMNS, decomposition.COLUMNS
    launches = [
        ("norm", norm, {"CENTRED": True}, 768),
        ("norm, longest", norm, {"CENTRED": True}, longest),
        ("epilogue", epilogue, {"CLEAN_UP": True}, columns),
        ("activation, gelu", activation, {"ACTIVATION": "gelu"}, columns),
        ("activation, relu", activation, {"ACTIVATION": "relu"}, columns),
        ("activation, gelu_tanh", activation, {"ACTIVATION": "gelu_tanh"}, columns),
        ("gate, gelu_tanh", gate, {"ACTIVATION": "gelu_tanh"}, columns),
        ("gate, silu", gate, {"ACTIVATION": "silu"}, columns),
    ]
    cases = []
    for name, kernel, constants, width in launches:
        tile = decomposition.tile(144, width)
        options = {"num_warps": tile.pop("num_warps")}
        cases.append(Case(name, kernel, "bf16", tile | constants, options))
    return [*cases, cases[0]._replace(name="norm, f64 eps", scalar="fp64")]


def head_steps() -> list[Case]:
    """Give the step of head-sliced AdamW, in vectors and one element at a time."""
    options = {"num_warps": head_adamw.WARPS}
    kernel, fields = head_adamw.adamw_kernel, {"BLOCK": head_adamw.BLOCK}
    return [
        Case(
            f"adamw, {element}, width {width}",
            kernel,
            str(element),
            fields | {"ELEMENT": element, "WIDTH": width},
            options,
        )
        for element in head_adamw.ELEMENTS.values()
        for width in (head_adamw.VECTOR, 1)
    ]


def fused(name: str, capability: int, element: str, constants: dict[str, Any]) -> Case:
    config = kernels.fused_config(capability // 10, 4 if element == "fp32" else 2)
    tile = {
        "V": V,
        "D": D,
        "TILES": 100,
        "BLOCK_N": config.rows,
        "BLOCK_V": config.columns,
        "BLOCK_D": config.depth,
    }
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return Case(name, kernels._fused_moments_kernel, element, tile | constants, options)


def source(case: Case) -> ASTSource:
    """Give the types that a launch would find: aligned pointers, rows of 16 or more."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            constants[(i,)] = case.constants[name]
            continue
        signature[name] = argument_type(name, case)
        if name.endswith(("_ptr", "_stride")) or name in ("D", "F"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(case.kernel, signature, constants, attributes)


def argument_type(name: str, case: Case) -> str:
    is_stream = "GROUP" in case.constants and name.endswith("_ptr")
    if is_stream or name in ("tile_ptr", "hidden_ptr", "weight_ptr"):
        return f"*{case.element}"
    if name in ("targets_ptr", "argmax_ptr", "tiles_ptr", "parameters_ptr"):
        return "*i64"
    if name in SCALARS:
        return case.scalar
    return "*fp32" if name.endswith("_ptr") else "i32"


def report(case: Case, capability: int) -> dict[str, Any]:
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source(case), target=target, options=case.options)
    ptx = compiled.asm["ptx"]
    usage = resources(compiled.asm["cubin"])
    return {
        "name": case.name,
        "element": case.element,
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "copies": ptx.count("cp.async.c"),
        "wide": len(re.findall(r"(?:ld|st)\.global\.v4", ptx)),
        "float64": len(re.findall(r"\b(?:add|sub|mul|div|fma)\.\S*f64", ptx)),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Return the registers and the bytes of stack and local memory of a kernel.

    What does not fit the registers is kept on the stack.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True)
    function = listing.stdout.split("Function")[-1]
    return {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", function)}


if __name__ == "__main__":
    capability = int(sys.argv[1])
    print(json.dumps([report(case, capability) for case in cases(capability)]))
