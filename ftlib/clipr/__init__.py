"""CLIPR: learn the rules behind a person's choices from a short conversation.

Hyk and Saisubramanian, *Learning Transferable Latent User Preferences for Human-Aligned
Decision Making*, arXiv 2605.12682. The chapter is ``notebooks/clipr.ipynb``. No code,
prompts or tables were released: each module says what is the paper's and what is ours.
"""
