"""CAREF: a regulariser of the decoder's distributions, for self-rationalising models.

Nithisopa and Panboonyuen, *CAREF: Calibration-Aware Regularization for Explanation
Faithfulness Without Rationale Supervision*, arXiv 2605.27835. The chapter is
``notebooks/caref.ipynb``.
"""
