"""Operations with a Triton kernel each, and its PyTorch twin."""

from ftlib.ops.token_loss import TokenLoss
from ftlib.ops.vocabulary_head import HeadOutput, vocabulary_head

__all__ = ["HeadOutput", "TokenLoss", "vocabulary_head"]
