# %% [markdown]
# # Calibrating generative models
#
# A placeholder page, with $\mathrm{KL}(q \,\|\, p)$, the Kullback–Leibler divergence
# {cite:p}`smith2025calibrating`.
#
# $$
# \alpha^* = \ln 4, \qquad \mathcal{L}(\theta) = \mathrm{KL}(p_\theta \,\|\, p) + \lambda^{-1} \lVert \mathbb{E}_{p_\theta}[h(x)] - h^* \rVert^2 + \text{a rather long remainder so that the formula is wide}
# $$

# %% tags=["generated", "hide-cell", "nbval-skip", "skip-execution"]
# Written by `make generate`. On Colab this installs ftlib and what is not
# there yet; torch, triton and numpy stay as they are. Colab's torchao is
# older than peft accepts, and ftlib does not use it.
import sys

if "google.colab" in sys.modules:
    source = "git+https://github.com/finetuning-book/finetuning-book@v0.1.0"
    # !pip list --format=freeze | grep -E "^(numpy|torch|triton)=" > kept.txt
    # !pip install -q -c kept.txt "ftlib[models] @ {source}"
    # !pip uninstall -q -y torchao

# %% tags=["generated"]
# Written by `make generate`: where this runs, at which scale, with what.
from ftlib import runtime

print(runtime.report())

# %% tags=["nbval-check-output"]
print(1 + 1)

# %% tags=["nbval-check-output"]
print(1 + 2)

# %% tags=["nbval-check-output"]
print(1 + 3)

# %% tags=["nbval-check-output"]
print(1 + 4)

# %% tags=["nbval-check-output"]
print(1 + 5)

# %% mystnb={"image": {"alt": "A straight line rising from zero to two."}}
import matplotlib.pyplot as plt

plt.plot([0, 1, 2])
plt.show()
