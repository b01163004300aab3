"""Handwritten digits: images 8 × 8, a model that paints them, and who looks at them.

The images are scikit-learn's (1,797 of them, 17 grey levels, no download). Three people
get disjoint parts: the generator's part trains the model, the judge's trains the
classifier inside h, the examiner's trains a classifier and a network of another kind,
which only the evaluation asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F

from ftlib.cgm.language import Continuations, PromptedLM

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

SIDE = 8  # pixels
BLACK = 16  # the darkest of 17 grey levels; 0 is blank
DIGITS = 10


# -- the images ------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images with what they show.

    Attributes:
        pixels: float64 [n, 8, 8], grey levels from 0 (blank) to 16 (ink).
        digit: int64 [n].
    """

    pixels: Array
    digit: Labels

    def __len__(self) -> int:
        return len(self.digit)

    def __getitem__(self, rows: NDArray[np.integer]) -> Images:
        return Images(self.pixels[rows], self.digit[rows])


@dataclass(frozen=True)
class Parts:
    """Disjoint parts of the data, every digit about equally often in each."""

    generator: Images
    judge: Images
    examiner: Images


def split(seed: int) -> Parts:
    """Deal the images out at random: 60 %, 20 %, 20 %, stratified by digit."""
    pixels, digit = load_digits(return_X_y=True)
    images = Images(pixels.reshape(-1, SIDE, SIDE), digit)
    rows = np.arange(len(images))
    generator, rest = train_test_split(
        rows, train_size=0.6, stratify=digit, random_state=seed
    )
    judge, examiner = train_test_split(
        rest, train_size=0.5, stratify=digit[rest], random_state=seed
    )
    return Parts(images[generator], images[judge], images[examiner])


def unequal(images: Images, counts: Sequence[int]) -> Images:
    """Keep the first ``counts[k]`` images of every digit k.

    Raises:
        ValueError: there are not as many of a digit.
    """
    there = np.bincount(images.digit, minlength=DIGITS)
    if (there < counts).any():
        raise ValueError(f"asked for {tuple(counts)} images of {tuple(there)}")
    kept = [np.flatnonzero(images.digit == k)[:n] for k, n in enumerate(counts)]
    return images[np.concatenate(kept)]


def warped(pixels: Array, copies: int, strength: float, seed: int) -> Array:
    """Images and slightly different copies of them, [copies · n, 8, 8].

    Each copy is turned, stretched, slanted and moved by a little that is normally
    distributed. At strength 1 the standard deviations are 6°, 6 %, 0.1 and 0.35 pixels.
    """
    rng = np.random.default_rng(seed)
    again = np.tile(pixels, (copies - 1, 1, 1))
    return np.concatenate([pixels, *[_warp(p, strength, rng)[None] for p in again]])


def _warp(image: Array, strength: float, rng: np.random.Generator) -> Array:
    angle, slant = strength * rng.normal(size=2) * (np.pi / 30, 0.1)
    stretch = np.exp(strength * rng.normal(size=2) * 0.06)
    turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix = np.array(turn) @ [[1, slant], [0, 1]] @ np.diag(stretch)
    centre = np.full(2, (SIDE - 1) / 2)
    offset = centre - matrix @ centre + strength * rng.normal(size=2) * 0.35
    # It is blank beyond the edge; the default mode would cut off rows of ink there.
    moved = ndimage.affine_transform(image, matrix, offset, mode="grid-constant")
    return np.clip(np.rint(moved), 0, BLACK)


# -- the model -------------------------------------------------------------------------


class Painter(PromptedLM):
    """An autoregressive model of images: patches in reading order, one token each.

    A token is a patch of a codebook, so an image's probability is exact. The prompt is
    token 0, which means "begin" there; its position tells it apart from patch 0.

    Args:
        model: a causal language model of transformers over ``codes`` tokens.
        patch: height and width of a patch, divisors of 8.
        codes: patches in the codebook.

    Attributes:
        codebook: float32 [codes, height · width], grey levels; a buffer, saved with the
            weights.
    """

    codebook: Tensor

    def __init__(self, model: nn.Module, patch: tuple[int, int], codes: int) -> None:
        height, width = patch
        super().__init__(model, [[0]], SIDE * SIDE // (height * width), None)
        self.patch = patch
        self.register_buffer("codebook", torch.zeros(codes, height * width))

    def images(self, samples: Continuations) -> Array:
        """The painted images, float64 [n, 8, 8]."""
        return joined(self.codebook[samples.written].double().cpu().numpy(), self.patch)

    def tokens(self, pixels: Array) -> Tensor:
        """The closest patches to those of images [n, 8, 8], integer [n, T]."""
        patches = torch.from_numpy(cut(pixels, self.patch)).to(self.codebook)
        return torch.cdist(patches, self.codebook[None]).argmin(-1)

    def next_token_loss(self, tokens: Tensor) -> Tensor:
        """Mean negative log-probability of tokens [n, T], in nats a token.

        Trains the network as a language model is trained, without sampling.
        """
        begin = self.prompts.expand(len(tokens), -1)
        logits = self.model(input_ids=torch.cat([begin, tokens[:, :-1]], 1)).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def cut(pixels: Array, patch: tuple[int, int]) -> Array:
    """Cut images [n, 8, 8] into patches in reading order, [n, T, height · width]."""
    height, width = patch
    grid = pixels.reshape(-1, SIDE // height, height, SIDE // width, width)
    return grid.swapaxes(2, 3).reshape(len(pixels), -1, height * width)


def joined(patches: Array, patch: tuple[int, int]) -> Array:
    """Undo :func:`cut`."""
    height, width = patch
    grid = patches.reshape(-1, SIDE // height, SIDE // width, height, width)
    return grid.swapaxes(2, 3).reshape(-1, SIDE, SIDE)


def learn_codebook(patches: Array, codes: int, seed: int) -> Tensor:
    """Find the patches that stand for all others, float32 [codes, pixels of a patch].

    Where there are no more than ``codes`` different patches these are the codebook
    (single pixels: the 17 grey levels), else k-means finds it.
    """
    flat = patches.reshape(-1, patches.shape[-1])
    centres = np.unique(flat, axis=0)
    if len(centres) > codes:
        found = KMeans(codes, n_init=1, max_iter=50, random_state=seed).fit(flat)
        centres = found.cluster_centers_
    return torch.from_numpy(centres).float()


# -- who looks at them -----------------------------------------------------------------


@dataclass(frozen=True)
class Viewers:
    """Those who look at images.

    Attributes:
        judge: the classifier inside h, trained on the judge's part.
        examiner: a classifier of another kind, trained on the examiner's part.
        network: likewise; its hidden layer gives the features of the distances.
    """

    judge: LogisticRegression
    examiner: SVC
    network: MLPClassifier

    def judged(self, pixels: Array) -> Labels:
        """What the judge takes images [n, 8, 8] for, int64 [n]."""
        return np.asarray(self.judge.predict(_flat(pixels)))

    def examined(self, pixels: Array) -> Labels:
        """What the examiner takes them for, int64 [n]."""
        return np.asarray(self.examiner.predict(_flat(pixels)))

    def features(self, pixels: Array) -> Array:
        """The network's hidden layer, float64 [n, 64]."""
        hidden = _flat(pixels) @ self.network.coefs_[0] + self.network.intercepts_[0]
        return np.maximum(hidden, 0)


def train_viewers(parts: Parts, seed: int) -> Viewers:
    """Train the judge on its part, and the examiner and the network on the other."""
    judge = LogisticRegression(C=3, max_iter=2000)
    examiner = SVC(C=10)
    network = MLPClassifier((64,), alpha=0.01, max_iter=1000, random_state=seed)
    own, other = parts.judge, parts.examiner
    return Viewers(
        judge.fit(_flat(own.pixels), own.digit),
        examiner.fit(_flat(other.pixels), other.digit),
        network.fit(_flat(other.pixels), other.digit),
    )


def _flat(pixels: Array) -> Array:
    return pixels.reshape(len(pixels), -1) / BLACK


def indicators(digit: Labels) -> Tensor:
    """One-hot of the digits 0 to 8, float [n, 9].

    The tenth indicator is one minus the others; with it the constraints would be
    redundant. (The paper drops one of its six classes of animals for that reason.)
    """
    return F.one_hot(torch.from_numpy(digit), DIGITS)[:, :-1].float()


def smallest_kl(shares: Array) -> float:
    """KL in nats of the closest model with equal classes: Σ_k 0.1 log(0.1 / p_k).

    Infinite where a class never occurs.
    """
    equal = 1 / DIGITS
    with np.errstate(divide="ignore"):
        return float((equal * np.log(equal / shares)).sum())


# -- distances and blind spots ---------------------------------------------------------


def feature_distance(a: Array, b: Array) -> float:
    """Squared MMD between two sets of features [n, d], [m, d], without bias.

    With the polynomial kernel (x·y / d + 1)³ of the kernel inception distance
    (Bińkowski et al. 2018), on features of a network that knows digits. Its mean is
    zero for two samples of one distribution, so that it is often negative there.

    Raises:
        ValueError: fewer than two rows, which have no unbiased estimate.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} rows: at least two of each are needed")
    return _between_pairs(a) + _between_pairs(b) - 2 * float(_kernel(a, b).mean())


def _kernel(a: Array, b: Array) -> Array:
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)


def _between_pairs(a: Array) -> float:
    """Mean kernel over pairs of different rows."""
    kernel, n = _kernel(a, a), len(a)
    return float((kernel.sum() - np.trace(kernel)) / (n * (n - 1)))


def within_class_distance(a: Array, of_a: Labels, b: Array, of_b: Labels) -> float:
    """Mean over digits of the feature distance within a digit.

    Unlike the distance of the whole sets it does not improve when only the mix of
    digits does. Not-a-number where one has fewer than two images.
    """
    distances = [
        feature_distance(a[of_a == k], b[of_b == k])
        if min((of_a == k).sum(), (of_b == k).sum()) > 1
        else np.nan
        for k in range(DIGITS)
    ]
    return float(np.mean(distances))


def diversity(pixels: Array, digit: Labels) -> float:
    """Mean over digits of the pixel variance within a digit, in squared grey levels.

    Not-a-number where a digit has fewer than two images.
    """
    groups = [pixels[digit == k] for k in range(DIGITS)]
    return float(
        np.mean([g.var(0, ddof=1).mean() if len(g) > 1 else np.nan for g in groups])
    )


def nearest_distance(pixels: Array, known: Array) -> float:
    """Mean distance to the nearest known image: root mean square grey levels a pixel.

    Small where a model repeats what it was trained on.
    """
    neighbours = NearestNeighbors(n_neighbors=1).fit(known.reshape(len(known), -1))
    distance, _ = neighbours.kneighbors(pixels.reshape(len(pixels), -1))
    return float(distance.mean() / SIDE)
