"""Loading a located model. Transformers is imported only once a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib import runtime
from ftlib.models.sources import ModelCorrupt, locate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer by short name.

    The model is in evaluation mode, and the tokenizer has a padding token: where it had
    none, the end-of-sequence token.

    Args:
        name: short name of the model.
        dtype: of the weights; by default :func:`ftlib.runtime.precision`'s choice.
        device: where to put it; by default :func:`ftlib.runtime.device`.

    Raises:
        ValueError: no model has the name.
        ModelUnavailable: the model is neither here nor to be had.
        ModelCorrupt: a file is damaged or altered.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, name, dtype, device)


def load_seq2seq_lm(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an encoder-decoder and its tokenizer by short name.

    As :func:`load_causal_lm` in all else.

    Args:
        name: short name of the model.
        dtype: of the weights; by default :func:`ftlib.runtime.precision`'s choice.
        device: where to put it; by default :func:`ftlib.runtime.device`.

    Raises:
        ValueError: no model has the name, or it is no encoder-decoder.
        ModelUnavailable: the model is neither here nor to be had.
        ModelCorrupt: a file is damaged or altered.
    """
    from transformers import AutoModelForSeq2SeqLM

    return _load(AutoModelForSeq2SeqLM, name, dtype, device)


def _load(
    kind: Any, name: str, dtype: torch.dtype | None, device: torch.device | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of a kind, one of transformers' automatic classes."""
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    folder = locate(name)
    _check_json(folder)
    device = device or runtime.device()
    dtype = dtype or runtime.precision(device).dtype
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    try:
        model, told = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise _damaged_weights(folder, error) from error
    if missing := sorted(told["missing_keys"]):  # transformers has drawn them at random
        raise _damaged_weights(folder, f"they lack {', '.join(missing)}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def _damaged_weights(folder: Path, why: object) -> ModelCorrupt:
    return ModelCorrupt(
        f"the weights in {folder} are damaged: {why}. Remove or replace them."
    )


def _check_json(folder: Path) -> None:
    """Refuse a damaged file by its name, which transformers would not tell."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise ModelCorrupt(
                f"{path} is damaged: {error}. Remove or replace it."
            ) from error
