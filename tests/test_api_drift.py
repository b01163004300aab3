"""Every name and keyword of the large libraries that the code uses is there.

Read from the source, so that what only runs on a GPU, or at scale ``gpu``, is checked
too. Methods of values are not followed: what a value is, only running the code tells.
"""

import ast
import importlib
import inspect
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from transformers import GenerationConfig, PreTrainedConfig

from paths import MIRROR, ROOT

LIBRARIES = ("accelerate", "peft", "torch", "transformers", "triton")
FOLDERS = (ROOT / "ftlib", ROOT / "kernels", ROOT / "benchmarks", MIRROR)
CONFIGURATIONS = (PreTrainedConfig, GenerationConfig)
# T5Config does not declare it, keeps it all the same, and T5's forward pass reads it.
READ_FROM_T5 = {"decoder_start_token_id"}
SOURCES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))


class Use(NamedTuple):
    """Something of a library, where it is used, and the keywords of a call."""

    line: int
    name: str
    keywords: tuple[str, ...] = ()


def imported(tree: ast.AST) -> dict[str, str]:
    """Return the library's name for each local name that an import binds."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {
        local: name
        for local, name in names.items()
        if name.partition(".")[0] in LIBRARIES
    }


def uses(source: str) -> list[Use]:
    tree = ast.parse(source)
    names = imported(tree)

    def name_of(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := name_of(node.value)):
            return f"{owner}.{node.attr}"
        return None

    found = [Use(1, name) for name in names.values()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := name_of(node)):
            found.append(Use(node.lineno, name))
        elif isinstance(node, ast.Call) and (name := name_of(node.func)):
            keywords = tuple(k.arg for k in node.keywords if k.arg)
            found.append(Use(node.lineno, name, keywords))
    return found


@cache
def resolve(name: str) -> Any:
    """Return what a dotted name is.

    Raises:
        AttributeError: it does not exist.
    """
    owner, _, last = name.rpartition(".")
    if not owner:
        return importlib.import_module(name)
    try:
        return getattr(resolve(owner), last)
    except AttributeError:
        try:
            return importlib.import_module(name)
        except ImportError:
            raise AttributeError(f"{owner} has no {last}") from None


@cache
def parameters(function: Any) -> set[str] | None:
    """Return the keywords that a function takes; None if it takes any.

    A compiled function of torch has no signature, but its operator has schemas.
    """
    try:
        known = inspect.signature(function).parameters.values()
    except ValueError:
        operator = getattr(torch.ops.aten, function.__name__, None)
        if operator is None:
            return None
        schemas = [getattr(operator, one)._schema for one in operator.overloads()]
        python = {"input", "out", "requires_grad"}
        return python.union(a.name for schema in schemas for a in schema.arguments)
    if any(p.kind == p.VAR_KEYWORD for p in known):
        return None
    return {p.name for p in known if p.kind != p.POSITIONAL_ONLY}


def refused(name: str, keywords: tuple[str, ...]) -> list[str]:
    """Return the keywords that a call does not take.

    A configuration of transformers swallows one that it does not know, so there every
    keyword has to be an attribute of an instance.
    """
    function = resolve(name)
    if inspect.isclass(function) and issubclass(function, CONFIGURATIONS):
        instance = function()
        wrong = [k for k in keywords if not hasattr(instance, k)]
        return [keyword for keyword in wrong if keyword not in READ_FROM_T5]
    known = parameters(function) if keywords else None
    return [k for k in keywords if known is not None and k not in known]


def faults(source: str) -> list[str]:
    """Return what a source uses and the installed libraries do not have."""
    found = []
    for line, name, keywords in dict.fromkeys(uses(source)):
        try:
            wrong = refused(name, keywords)
        except (AttributeError, ImportError) as error:
            found.append(f"line {line}: {error}")
        else:
            found += [f"line {line}: {name} takes no {keyword}" for keyword in wrong]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_libraries_have_what_is_used(path):
    assert faults(path.read_text(encoding="utf-8")) == []


def test_much_is_checked():
    """Names and keywords that are known to be used, one of each kind, were read."""
    found = {
        (use.name, keyword)
        for path in SOURCES
        for use in uses(path.read_text(encoding="utf-8"))
        for keyword in use.keywords or ("",)
    }
    assert len(found) > 400
    assert {
        ("accelerate.Accelerator", "mixed_precision"),
        ("peft.LoraConfig", "target_modules"),
        ("torch.nn.functional.cross_entropy", ""),
        ("transformers.GPT2Config", "n_embd"),
        ("triton.language.load", "mask"),
    } <= found


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from transformers import NoSuchModel", "transformers has no NoSuchModel"),
        ("import torch\ntorch.nn.Lineal(1, 1)", "torch.nn has no Lineal"),
        ("import triton.language as tl\ntl.dott(a, b)", "triton.language has no dott"),
        (
            "import triton.language as tl\ntl.dot(a, b, tf32_allowed=True)",
            "triton.language.dot takes no tf32_allowed",
        ),
        ("import peft\npeft.LoraConfig(rank=4)", "peft.LoraConfig takes no rank"),
        (
            "from accelerate import Accelerator as A\nA(cpu=True, fp16=True)",
            "accelerate.Accelerator takes no fp16",
        ),
        (
            "from transformers import GPT2Config\nGPT2Config(embedding=3)",
            "transformers.GPT2Config takes no embedding",
        ),
        (
            "from torch.nn import functional as F\nF.layer_norm(x, s, epsilon=1)",
            "torch.nn.functional.layer_norm takes no epsilon",
        ),
        ("import torch\ntorch.sum(x, axes=1)", "torch.sum takes no axes"),
        (
            "from torch.optim import AdamW\nAdamW(p, learning_rate=1)",
            "torch.optim.AdamW takes no learning_rate",
        ),
    ],
)
def test_what_is_not_there_is_noticed(source, fault):
    (found,) = set(faults(source))
    assert found.endswith(fault)


def test_what_is_there_passes():
    source = """
import torch, numpy
from transformers import GPT2Config, GenerationConfig
import triton.language as tl

torch.sum(torch.ones(2, dtype=torch.float32), dim=0)
GPT2Config(n_embd=4, bos_token_id=None)
GenerationConfig(max_new_tokens=3)
tl.load(pointer, mask=mask, other=0.0)
numpy.no_such_function()
"""
    assert faults(source) == []
