"""Operations with a Triton kernel each, and its PyTorch twin."""

from ftlib.ops.decomposition import (
    decomposed_activation,
    decomposed_gate,
    decomposed_linear,
    decomposed_norm,
    relevant_epilogue_,
)
from ftlib.ops.head_adamw import HeadAdamW, WeightSlice, training_only
from ftlib.ops.output_head import OutputHead, output_head
from ftlib.ops.simplex import entmax15, sparsemax, top_k_gate
from ftlib.ops.token_loss import TokenLoss
from ftlib.ops.vocabulary_head import HeadOutput, vocabulary_head

__all__ = [
    "HeadAdamW",
    "HeadOutput",
    "OutputHead",
    "TokenLoss",
    "WeightSlice",
    "decomposed_activation",
    "decomposed_gate",
    "decomposed_linear",
    "decomposed_norm",
    "entmax15",
    "output_head",
    "relevant_epilogue_",
    "sparsemax",
    "top_k_gate",
    "training_only",
    "vocabulary_head",
]
