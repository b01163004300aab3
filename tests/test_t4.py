"""What runs on a T4, of compute capability 7.5: no bf16, no Triton, the twins.

Tensors stay on the CPU; ftlib decides as it would on a GPU of that capability. For each
test the same is tried at 8.0, where what must not happen on a T4 does.
"""

import inspect
import sys
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ftlib import ops, runtime
from ftlib.caref import objective as caref
from ftlib.cft import objective as cft
from ftlib.cft.data import PaddingCollator
from ftlib.cgm.calibrate import calibrate
from ftlib.cgm.mixture import right_of_zero, two_bumps
from ftlib.cgm.settings import CalibrationSettings
from ftlib.clipr.distillation import Student, lessons
from ftlib.clipr.rules import RuleSet
from ftlib.clipr.settings import DistillationSettings
from ftlib.clipr.tasks import Option, Task
from ftlib.ctsft.heads import Head
from ftlib.ctsft.tasks import Encoded
from ftlib.ctsft.tuning import Recipe, tune
from ftlib.sequences import IGNORED
from ftlib.training import TrainingSettings, default_accelerator, train

T4, A100 = (7, 5), (8, 0)
KERNELS = ("decomposition", "head_adamw", "simplex", "vocabulary_head")
SETTINGS = TrainingSettings(steps=2, batch_size=2, learning_rate=1e-2)


@pytest.fixture
def gpu(monkeypatch, fresh_accelerate):
    """Let ftlib decide as on a GPU of some capability, whose kernels do not load."""
    cuda, precision = torch.device("cuda"), runtime.precision
    supported = runtime.triton_supported
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setattr(runtime, "precision", lambda on=None: precision(cuda))
    for name, module in list(sys.modules.items()):
        if name.startswith("ftlib.ops.") and hasattr(module, "triton_supported"):
            monkeypatch.setattr(module, "triton_supported", lambda on: supported(cuda))
    for name in KERNELS:
        monkeypatch.setitem(sys.modules, f"ftlib.kernels.{name}", None)
    return lambda capability: monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda on: capability
    )


class NoBfloat16(TorchDispatchMode):
    """Refuse every operation that makes a tensor in bf16."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and result.dtype is torch.bfloat16:
                raise AssertionError(f"{operation} was computed in bf16")
        return results


# --- operations -----------------------------------------------------------------------


def with_gradients(function, *inputs):
    """Return what a function gives, and the gradients by its inputs."""
    inputs = [tensor.requires_grad_() for tensor in inputs]
    outputs = function(*inputs)
    return [*outputs, *torch.autograd.grad([x.sin().sum() for x in outputs], inputs)]


def simplex(operation, normal):
    return with_gradients(lambda x: [operation(x)], normal(3, 40))


def head_statistics(normal):
    floats = ("log_prob", "entropy", "log_sum_exp", "collision_prob", "varentropy")
    targets = torch.tensor([0, 30, 7, IGNORED])

    def statistics(hidden, weight):
        found = ops.vocabulary_head(hidden, weight, targets, statistics=floats)
        return [getattr(found, name) for name in floats]

    return with_gradients(statistics, normal(4, 16), normal(31, 16))


def head_loss(normal):
    targets = torch.tensor([0, 30, 7, IGNORED])
    terms = ops.TokenLoss(0.7, 0.2, -0.1, 1e-3, 0.1, 0.1)

    def loss(hidden, weight):
        return [ops.vocabulary_head(hidden, weight, targets, loss=terms).loss]

    return with_gradients(loss, normal(4, 16), normal(31, 16))


def adamw(normal):
    weight = nn.Parameter(normal(6, 4))
    optimizer = ops.HeadAdamW([ops.WeightSlice(weight, 0, 1, 4)], lr=0.1)
    for _ in range(3):
        weight.grad = normal(6, 4)
        optimizer.step()
    return [weight.detach()]


def norm(kind, normal):
    streams = normal(2, 3, 8), normal(3, 8), normal(8), normal(8)
    return [ops.decomposed_norm(*streams, eps=1e-5, kind=kind)]


def linear(normal):
    streams = normal(2, 3, 8), normal(3, 5), normal(5, 8), normal(5)
    return [ops.decomposed_linear(*streams, clean_up=True)]


def epilogue(normal):
    return [ops.relevant_epilogue_(normal(2, 3, 8), normal(3, 8), normal(8))]


def activation(name, normal):
    return [ops.decomposed_activation(normal(2, 3, 8), normal(3, 8), name)]


def gate(normal):
    streams = normal(2, 3, 8), normal(3, 8), normal(2, 3, 8), normal(3, 8)
    return [ops.decomposed_gate(*streams, "silu")]


CASES = {
    "sparsemax": partial(simplex, ops.sparsemax),
    "entmax15": partial(simplex, ops.entmax15),
    "top_k_gate": partial(simplex, partial(ops.top_k_gate, k=5)),
    "vocabulary_head": head_statistics,
    "vocabulary_head, loss": head_loss,
    "HeadAdamW": adamw,
    "decomposed_norm": partial(norm, "layer"),
    "decomposed_norm, rms": partial(norm, "rms"),
    "decomposed_linear": linear,
    "relevant_epilogue_": epilogue,
    "decomposed_activation": partial(activation, "gelu"),
    "decomposed_activation, silu": partial(activation, "silu"),
    "decomposed_gate": gate,
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def results(case, dtype, wide=False):
    """Return a case's results from numbers that ``dtype`` holds, drawn alike."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        drawn = torch.randn(shape, generator=generator).to(dtype)
        return drawn.double() if wide else drawn

    return case(normal)


def test_every_operation_with_a_kernel_is_here():
    with_kernel = {
        name
        for name in ops.__all__
        if "backend" in inspect.signature(getattr(ops, name)).parameters
    }
    assert with_kernel == {name.partition(",")[0] for name in CASES}


@each_case
@each_dtype
def test_the_twins_are_as_exact_as_the_dtype(gpu, case, dtype):
    """Every number is as in float64, but for some roundings of the largest."""
    gpu(T4)
    exact = results(case, dtype, wide=True)
    with NoBfloat16():
        found = results(case, dtype)
    for ours, reference in zip(found, exact, strict=True):
        bound = 16 * torch.finfo(dtype).eps * max(1.0, reference.abs().max())
        assert (ours.double() - reference).abs().max() <= bound


@each_case
@each_dtype
def test_where_triton_runs_the_kernels_are_asked_for(gpu, case, dtype):
    gpu(A100)
    with pytest.raises(ModuleNotFoundError, match=r"ftlib\.kernels"):
        results(case, dtype)


# --- training -------------------------------------------------------------------------


def llama(vocabulary=64):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=vocabulary,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **sizes,
    )
    return LlamaForCausalLM(config)


def train_cgm():
    torch.manual_seed(0)
    model = two_bumps()
    settings = CalibrationSettings("relax", SETTINGS, kl_weight=0.1, check_samples=0)
    calibrate(model, right_of_zero, torch.tensor([0.8]), settings)
    return model


def train_with(objective):
    model, features = llama(), []
    for start in range(3, 11):
        ids = list(range(start, start + 6))
        features.append({"input_ids": ids, "labels": [IGNORED] * 3 + ids[3:]})
    learner, collate = objective.Learner(model), PaddingCollator()
    train(learner, features, objective.training_loss, SETTINGS, collate=collate)
    return model


def train_ctsft():
    model, circuit = llama(), [Head(0, 1), Head(1, 3)]
    examples = [Encoded([1 + n, 5, 3 + n], n % 3) for n in range(8)]
    tokens = torch.tensor([7, 8, 9])
    tune(model, Recipe("circuit"), circuit, examples, tokens, SETTINGS)
    return model


def train_clipr():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="!")
    student = Student(
        llama(300), tokenizer, DistillationSettings(steps=2, batch_size=2, rank=2), 0
    )
    cups = tuple(Option(m, {"material": m}) for m in ("glass", "plastic"))
    tasks = [Task(f"{n}", "Two cups.", "Bring me one.", "cups", cups) for n in range(3)]
    rules = RuleSet.from_text("Prefer material glass over plastic.")
    student.learn(lessons(tasks, rules), 1e-2)
    return student.model


TRAININGS = {
    "CGM": train_cgm,
    "CFT": partial(train_with, cft),
    "CAREF": partial(train_with, caref),
    "CT-SFT": train_ctsft,
    "CLIPR": train_clipr,
}
each_training = pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)


@pytest.mark.parametrize(("capability", "mixed"), [(T4, "no"), (A100, "bf16")])
def test_the_default_accelerator_casts_from_capability_eight_on(gpu, capability, mixed):
    gpu(capability)
    assert default_accelerator().mixed_precision == mixed


@each_training
def test_every_method_trains_in_float32(gpu, training):
    gpu(T4)
    with NoBfloat16():
        model = training()
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("name", ["CFT", "CAREF", "CT-SFT", "CLIPR"])
def test_bf16_is_noticed(gpu, name):
    """CGM's toy model has no operation that autocast casts."""
    gpu(A100)
    with NoBfloat16(), pytest.raises(AssertionError, match="in bf16"):
        TRAININGS[name]()
