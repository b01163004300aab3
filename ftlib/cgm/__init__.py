"""CGM: calibrate a generative model to distributional constraints.

Smith, Diamant and Trippe, *Calibrating Generative Models to Distributional
Constraints*, arXiv 2510.10020. The chapters are ``notebooks/cgm.ipynb`` and, beyond
stories, ``notebooks/cgm_beyond.ipynb``.
"""
