"""What autodoc leaves out of the reference, and how it writes types.

A Sphinx extension, loaded from ``_config.yml``.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from dataclasses import is_dataclass
from typing import Any, NamedTuple

from numpy.typing import ArrayLike, NDArray
from sphinx.application import Sphinx
from sphinx.domains.python._object import PyObject
from sphinx.ext.autodoc.preserve_defaults import DefaultValue
from sphinx.util.inspect import stringify_signature
from sphinx.util.typing import stringify_annotation

# numpy's two aliases, spelt out as autodoc finds them.
ARRAY_LIKE = stringify_annotation(ArrayLike, "smart")
ND_ARRAY = re.compile(
    re.escape(stringify_annotation(NDArray[Any], "smart")).replace(
        re.escape("~typing.Any]]"), r"([^][]+)\]\]"
    )
)

TYPE = ":type: "
AFTER_NAPOLEON = 600
LONGEST = 40  # characters of a field's default


class _One(NamedTuple):
    field: Any


# What the class of a named tuple holds for each field.
BARE_FIELD = type(vars(_One)["field"])


def is_bare_field(member: object) -> bool:
    """Whether a member is a named tuple's field: its class describes it."""
    return isinstance(member, BARE_FIELD)


def is_shown_by_package(module: str, name: str, member: object) -> bool:
    """Whether a package exports what this module of it defines.

    Such a name is shown once, where it is imported from.
    """
    package = sys.modules[module.rpartition(".")[0] or module]
    return package.__name__ != module and exports(package, name, member)


def exports(package: object, name: str, member: object) -> bool:
    """Whether a package lists a name in ``__all__`` and means this member."""
    listed = name in getattr(package, "__all__", ())
    return listed and getattr(package, name) is member


def skip(
    app: Sphinx, what: str, name: str, member: object, skipped: bool, options: Any
) -> bool | None:
    """Decide for ``autodoc-skip-member``; ``None`` leaves it to autodoc."""
    module = app.env.temp_data["autodoc:module"]
    if is_bare_field(member):
        return True
    if what == "module" and is_shown_by_package(module, name, member):
        return True
    return None


def with_numpy_aliases(text: str) -> str:
    """Give numpy's aliases their names back in a signature."""
    text = text.replace(ARRAY_LIKE, "~numpy.typing.ArrayLike")
    return ND_ARRAY.sub(r"~numpy.typing.NDArray[\1]", text)


def fields_signature(kind: type) -> str:
    """Return how a dataclass or a named tuple is made, with types to be linked."""
    signature = inspect.signature(kind)
    try:
        types = typing.get_type_hints(kind)
    except NameError:  # a type that is imported for type checkers only
        types = {}
    parameters = [
        parameter.replace(
            annotation=types.get(name, parameter.annotation),
            default=shortened(parameter.default),
        )
        for name, parameter in signature.parameters.items()
    ]
    return stringify_signature(
        signature.replace(parameters=parameters, return_annotation=signature.empty),
        unqualified_typehints=True,
    )


def shortened(default: object) -> object:
    """Return a default that fits a line: a longer one, or a factory, becomes dots."""
    written = repr(default)
    if default is inspect.Parameter.empty or (
        len(written) <= LONGEST and not written.startswith("<")
    ):
        return default
    return DefaultValue("...")


def write_signature(
    app: Sphinx,
    what: str,
    name: str,
    member: Any,
    options: Any,
    signature: str | None,
    returned: str | None,
) -> tuple[str | None, ...]:
    """Write a signature for ``autodoc-process-signature``."""
    if what == "class" and (is_dataclass(member) or hasattr(member, "_fields")):
        signature = fields_signature(member)
    return tuple(text and with_numpy_aliases(text) for text in (signature, returned))


def rejoin(
    app: Sphinx, what: str, name: str, member: Any, options: Any, lines: list[str]
) -> None:
    """Undo what napoleon does to constants and properties.

    It reads "The input: a text." as a type and its description.
    """
    if what in {"attribute", "data", "property"}:
        for line in [line for line in lines if line.startswith(TYPE)]:
            lines.remove(line)
            lines[0] = f"{line.removeprefix(TYPE)}: {lines[0]}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx, which calls the attributes of a class variables."""
    for kind in PyObject.doc_field_types:
        if kind.name == "variable":
            kind.label = "Attributes"
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", write_signature)
    app.connect("autodoc-process-docstring", rejoin, priority=AFTER_NAPOLEON)
    return {"parallel_read_safe": True}
