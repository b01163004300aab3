"""CT-SFT: find the circuit of a task, then train only that.

Nur'aini, Purwarianti, Aji and Wijaya, *Beyond Transfer Accuracy: Faithful Circuits for
Controlled Low-Resource Adaptation*, arXiv 2601.08146, with the contextual decomposition
of Hsu et al., arXiv 2407.00886. The chapter is ``notebooks/ctsft.ipynb``.
"""
