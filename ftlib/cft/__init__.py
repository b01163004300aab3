"""CFT: fine-tune a language model on critiques of solutions.

Wang, Yue and Chen, *Critique Fine-Tuning: Learning to Critique is More Effective than
Learning to Imitate*, arXiv 2501.17703. The chapter is ``notebooks/cft.ipynb``.
"""
