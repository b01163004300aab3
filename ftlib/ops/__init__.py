"""Operations with a Triton kernel each, and its PyTorch twin."""

from ftlib.ops.output_head import OutputHead, output_head
from ftlib.ops.simplex import entmax15, sparsemax, top_k_gate
from ftlib.ops.token_loss import TokenLoss
from ftlib.ops.vocabulary_head import HeadOutput, vocabulary_head

__all__ = [
    "HeadOutput",
    "OutputHead",
    "TokenLoss",
    "entmax15",
    "output_head",
    "sparsemax",
    "top_k_gate",
    "vocabulary_head",
]
