"""Triton kernels, installed as ``ftlib.kernels``.

A kernel is reached through ``ftlib.ops``, which pairs each one with a plain
PyTorch twin of the same signature: the twin is the specification.
"""
