"""Arrays out of a pickle, without running what the pickle asks for.

A ``.npy`` file of objects is a pickle, and a pickle is a program: loading one can call
anything. Here every name that a pickle may call is replaced by a class of this module,
which only keeps what it is given, and any other name is refused. Arrays are then made
from what was kept.
"""

from __future__ import annotations

import io
import pickle  # only an unpickler, with a find_class of our own
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

_PLAIN = "biufU"  # kinds of dtypes whose bytes are plain values


class _Dtype:
    """A pickled dtype: its code, such as ``i8``, and byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple) -> None:
        self.order = "=" if state[1] == "|" else state[1]

    @property
    def objects(self) -> bool:
        return self.code.startswith("O")

    def plain(self) -> np.dtype:
        dtype = np.dtype(f"{self.order}{self.code}")
        if dtype.kind not in _PLAIN:
            raise ValueError(f"a pickled array has the dtype {dtype}, which is refused")
        return dtype


class _Array:
    """A pickled array: its state, before anything is made of it."""

    def __init__(self, *_: object) -> None:
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def value(self) -> Any:
        """A numeric array; of an array of objects the list of them, or the only one."""
        _, shape, dtype, fortran, content = self.state
        if dtype.objects:
            values = [_value(item) for item in content]
            return values[0] if shape == () else values
        array = np.frombuffer(content, dtype.plain())
        return array.reshape(shape, order="F" if fortran else "C")


class _Scalar:
    """A pickled number or text of numpy's."""

    def __init__(self, dtype: _Dtype, content: bytes) -> None:
        self.dtype, self.content = dtype, content

    def __setstate__(self, state: object) -> None:
        raise ValueError("a pickled scalar has a state, which none has")

    def value(self) -> Any:
        return np.frombuffer(self.content, self.dtype.plain())[0].item()


_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_STANDINS: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{(module, "_reconstruct"): _Array for module in _MODULES},
    **{(module, "scalar"): _Scalar for module in _MODULES},
}


# Python's own unpickler, not the one in C: that one sets aside memory for as many
# objects as the pickle announces, gigabytes for one wrong byte.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> type:
        try:
            return _STANDINS[module, name]
        except KeyError:
            raise ValueError(
                f"the pickle asks for {module}.{name}, which is no part of an array: "
                "it is refused"
            ) from None


def read_pickled_arrays(path: Path) -> Any:
    """Read a ``.npy`` file that holds one object, such as a dictionary of arrays.

    Args:
        path: of the file.

    Returns:
        The object. Arrays of objects in it are lists, however many axes they had.

    Raises:
        ValueError: the file is not of this form, or its pickle asks for a function or
            class that is no part of an array. Nothing it names has been called then.
    """
    with path.open("rb") as file:
        try:
            version = npy.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"it has version {version} of the format, not (1, 0)")
            shape, _, dtype = npy.read_array_header_1_0(file)
            if shape != () or not dtype.hasobject:
                raise ValueError(f"it holds an array of {dtype}, not one object")
            return _value(_Unpickler(io.BytesIO(file.read())).load())
        except Exception as error:  # a broken pickle can run into any
            raise ValueError(f"{path} cannot be read: {error}") from error


def _value(item: Any) -> Any:
    if isinstance(item, _Array | _Scalar):
        return item.value()
    if isinstance(item, dict):
        return {key: _value(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return [_value(part) for part in item]
    return item
