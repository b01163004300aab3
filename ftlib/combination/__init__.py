"""Two methods together: the target text of CFT on the heads that CT-SFT finds.

The combination is ours, no paper claims anything of it. It stands above the methods:
it imports two of them, and nothing imports it. The chapter is
``notebooks/combination.ipynb``.
"""
