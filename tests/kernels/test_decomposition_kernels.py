"""The kernels of decomposition against their twins: sizes, layouts, dtypes, offsets.

What both compute is tested in ``tests/ops/test_decomposition_ops.py``.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftlib.kernels import decomposition as kernels

from ftlib.ops import decomposition as twins

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [torch.float16, torch.bfloat16][: 2 if DEVICE == "cuda" else 1]
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
# The interpreter's numpy warns where σ(x) = 1 / (1 + exp(−x)) ends in 1 / inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def problem(S, N, F, dtype=torch.float32, total_dtype=None):
    return {
        "relevant": normal(S, N, F, seed=1, dtype=dtype),
        "other": normal(S, N, F, seed=2, dtype=dtype),
        "total": normal(N, F, seed=3, dtype=total_dtype or dtype),
        "up": normal(N, F, seed=4, dtype=total_dtype or dtype),
        "weight": normal(F, seed=5),
        "bias": normal(F, seed=6),
    }


def results(module, relevant, other, total, up, weight, bias):
    """What each function of a module gives, by name."""
    epilogue = relevant.clone(memory_format=torch.contiguous_format)
    module.epilogue_rows_(epilogue, total, bias, True)
    norm, summed = module.norm_rows(relevant, total, weight, bias, 1e-5, "layer", other)
    rms, _ = module.norm_rows(relevant, total, weight, None, 1e-5, "rms", None)
    return {
        "norm": norm,
        "summed": summed,
        "rms": rms,
        "epilogue": epilogue,
        "gelu": module.activation_rows(relevant, total, "gelu"),
        "gate": module.gate_rows(relevant, total, other, up, "silu"),
    }


def agree(inputs, atol=2e-5, rtol=1e-5):
    found, expected = results(kernels, **inputs), results(twins, **inputs)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        torch.testing.assert_close(
            found[name], value, atol=atol, rtol=rtol, msg=lambda m, name=name: name + m
        )


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 300))
def test_every_size(S, N, F):
    agree(problem(S, N, F))


@pytest.mark.parametrize("F", [1024, 1025, 2300])
def test_several_blocks_of_columns_for_several_groups(F):
    agree(problem(5, 2, F))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("total_dtype", [None, torch.float32])
def test_low_precision_is_rounded_once(dtype, total_dtype):
    """Both compute in float32, so that they differ by one rounding at most."""
    agree(problem(3, 2, 100, dtype, total_dtype), rtol=2 * torch.finfo(dtype).eps)


def test_offsets_beyond_32_bits():
    """Three sources 2³⁰ elements apart: the last begins where int32 ends."""
    shape, strides = (3, 1, 8), (2**30, 8, 1)
    # Pages that are not touched take no memory.
    room = torch.empty(2**31 + 8, dtype=torch.float16, device=DEVICE)
    inputs = problem(*shape, dtype=torch.float16)
    apart = room.as_strided(shape, strides)
    apart.copy_(inputs["relevant"])
    expected = results(twins, **inputs)
    found = results(kernels, **inputs | {"relevant": apart, "other": apart})
    for name in ("rms", "gelu"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=1e-3)
    kernels.epilogue_rows_(apart, inputs["total"], inputs["bias"], True)
    torch.testing.assert_close(apart, expected["epilogue"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sources", [1, 3, 144])
@pytest.mark.parametrize("columns", [1, 7, 768, 1024, 3584, kernels.MAX_COLUMNS])
def test_tiles_hold_a_row_and_suit_a_program(sources, columns):
    tile = kernels.tile(sources, columns)
    assert columns <= tile["BLOCK"] < 2 * columns
    assert tile["GROUP"] < 2 * sources
    assert tile["BLOCK"] * tile["GROUP"] <= max(kernels.TILE_ELEMENTS, 2 * columns)
    assert 1 <= tile["num_warps"] <= 16


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_gpt2(dtype):
    for F in (768, 3072):
        rtol = 1e-5 if dtype == torch.float32 else 2**-6
        agree(problem(24, 256, F, dtype), atol=1e-4, rtol=rtol)
