"""The outcome of every single item, packed into the numbers of a record."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ftlib.results import PACKED_PREFIX, Metric, NotRecordedError

Booleans = npt.NDArray[np.bool_]

# A recorded number is a float64, which holds integers of so many bits exactly.
_BITS = 50


def outcome_metrics(name: str, right: Booleans) -> dict[str, Metric]:
    """Pack the outcome of every problem into recorded numbers, fifty a number.

    Comparisons of two arms can then be paired problem by problem, from the records
    alone. :func:`outcomes` unpacks them.

    Args:
        name: what the outcomes are of.
        right: whether each problem was answered rightly, bool [n].

    >>> outcome_metrics("test", np.array([True, False, True]))
    {'bits/test/0': Metric(value=5.0, n=3)}
    """
    parts = [right[i : i + _BITS] for i in range(0, len(right), _BITS)]
    return {
        f"{PACKED_PREFIX}{name}/{index}": Metric(
            float(sum(1 << bit for bit in np.flatnonzero(part).tolist())), len(part)
        )
        for index, part in enumerate(parts)
    }


def outcomes(metrics: Mapping[str, Metric], name: str) -> Booleans:
    """Unpack what :func:`outcome_metrics` packed, bool [n].

    Raises:
        NotRecordedError: there are no outcomes of that name.

    >>> outcomes({"bits/test/0": Metric(value=5.0, n=3)}, "test").tolist()
    [True, False, True]
    """
    found: list[bool] = []
    index = 0
    while metric := metrics.get(f"{PACKED_PREFIX}{name}/{index}"):
        bits = int(metric.value)
        found += [bool(bits >> bit & 1) for bit in range(metric.n or 0)]
        index += 1
    if not found:
        raise NotRecordedError(f"no outcomes of {name!r} among these metrics")
    return np.array(found, dtype=np.bool_)
