"""ftlib: the code the chapters of the fine-tuning book share.

Importing the package is cheap: every submodule is imported by name, and torch
and transformers are loaded only by the submodules that compute with them.
"""

__version__ = "0.1.0"
