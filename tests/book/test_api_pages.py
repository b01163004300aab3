"""The reference: every public module and name of ftlib is on a page, or left out."""

import importlib
import inspect
import pkgutil
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from numpy.typing import ArrayLike, NDArray
from sphinx.util.inspect import signature, stringify_signature

import build
import ftlib
from paths import NOTEBOOKS, ROOT

API = ROOT / "book" / "api"
sys.path.append(str(API))

import api_members  # noqa: E402

LEFT_OUT = {
    "commands, which `ftlib --help` describes": r"ftlib\.(.*\.)?cli",
    "reached through ftlib.ops; they need Triton": r"ftlib\.kernels(?!\.types).*",
}


def described(folder: Path = API) -> Counter[str]:
    """How often each module has a section."""
    text = "\n".join(page.read_text() for page in sorted(folder.glob("*.md")))
    return Counter(re.findall(r"^\.\. automodule:: (\S+)$", text, re.M))


def modules() -> set[str]:
    """Every module whose name is public; kernels/ lies in a room of its own."""
    found = {"ftlib.kernels"}
    for package in (ftlib, importlib.import_module("ftlib.kernels")):
        walk = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        found |= {module.name for module in walk if "._" not in module.name}
    return found


def public_modules() -> set[str]:
    """Modules that the reference has to describe."""
    left_out = re.compile("|".join(LEFT_OUT.values()))
    return {name for name in modules() if not left_out.fullmatch(name)}


def public_names(module: Any) -> list[str]:
    """Functions and classes that a module defines."""
    return [
        name
        for name, member in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(member) or inspect.isroutine(member))
        and member.__module__ == module.__name__
    ]


def undescribed(module: Any) -> list[str]:
    """Public names that autodoc would leave out for want of a docstring."""
    return [name for name in public_names(module) if not vars(module)[name].__doc__]


def test_every_public_module_has_one_section() -> None:
    assert described() == Counter(public_modules())


def test_a_module_without_a_section_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "cft.md").write_text(".. automodule:: ftlib.cft\n" * 2)
    assert described(tmp_path)["ftlib.cft"] == 2
    assert public_modules() - set(described(tmp_path)) >= {"ftlib.training"}


@pytest.mark.parametrize("pattern", LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_is_left_out_is_there(pattern: str) -> None:
    assert any(re.fullmatch(pattern, name) for name in modules())


def test_every_public_name_has_a_docstring() -> None:
    """Autodoc leaves out, without a word, what has none."""
    found = map(importlib.import_module, sorted(public_modules()))
    assert {m.__name__: names for m in found if (names := undescribed(m))} == {}


def test_a_name_without_docstring_is_noticed() -> None:
    def bare() -> None: ...

    def described() -> None:
        """Do nothing."""

    module = ModuleType("ours")
    for function in (bare, described):
        function.__module__ = "ours"
        setattr(module, function.__name__, function)
    assert undescribed(module) == ["bare"]


def test_every_page_is_in_the_table_of_contents() -> None:
    pages = {f"book/api/{page.stem}" for page in API.glob("*.md")}
    assert pages == {name for name in build.pages(ROOT) if "/api/" in name}


def one_way_links(api: Path, notebooks: Path) -> list[str]:
    """Chapters that a page of the reference names and that do not name it."""
    return [
        f"{chapter} → {page.name}"
        for page in sorted(api.glob("*.md"))
        for chapter in re.findall(r"\.\./\.\./notebooks/(\w+\.ipynb)", page.read_text())
        if f"../book/api/{page.name}" not in (notebooks / chapter).read_text()
    ]


def test_pages_and_chapters_link_to_each_other() -> None:
    assert one_way_links(API, NOTEBOOKS) == []
    text = "".join(page.read_text() for page in API.glob("*.md"))
    assert text.count("../../notebooks/") >= 7


def test_a_link_in_one_direction_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "cft.md").write_text("[chapter](../../notebooks/cft.ipynb)")
    (tmp_path / "cft.ipynb").write_text("no link")
    assert one_way_links(tmp_path, tmp_path) == ["cft.ipynb → cft.md"]


class Pair(NamedTuple):
    """Two things."""

    first: "Pair | None"
    second: int = 0

    def swapped(self) -> "Pair":
        """Return the other order."""


def test_fields_of_named_tuples_are_left_to_their_class() -> None:
    assert api_members.is_bare_field(vars(Pair)["first"])
    assert not api_members.is_bare_field(vars(Pair)["swapped"])


@dataclass
class Options:
    """Two options."""

    pair: Pair | None
    long: str = "x" * 50
    short: str = "x"
    made: list[int] = field(default_factory=list)


def test_fields_show_types_that_can_be_linked_and_no_long_default() -> None:
    pair = f"~{Pair.__module__}.Pair | None"
    found = api_members.fields_signature(Pair)
    assert found == f"(first: {pair}, second: int = 0)"
    found = api_members.fields_signature(Options)
    rest = "long: str = ..., short: str = 'x', made: list[int] = ..."
    assert found == f"(pair: {pair}, {rest})"


def test_what_a_package_exports_is_shown_there_only() -> None:
    member = importlib.import_module("ftlib.ops").TokenLoss
    shown = api_members.is_shown_by_package
    assert shown("ftlib.ops.token_loss", "TokenLoss", member)
    assert not shown("ftlib.ops", "TokenLoss", member)
    assert not shown("ftlib.ops.token_loss", "TokenLoss", Pair)
    assert not shown("ftlib.training", "train", member)


def test_numpy_types_have_their_short_names() -> None:
    def f(a: ArrayLike, b: NDArray[Any] | None) -> None: ...

    written = stringify_signature(signature(f), unqualified_typehints=True)
    assert "_NestedSequence" in written
    assert api_members.with_numpy_aliases(written) == (
        "(a: ~numpy.typing.ArrayLike, "
        "b: ~numpy.typing.NDArray[~typing.Any] | None) -> None"
    )


@pytest.mark.parametrize(
    ("what", "lines"),
    [
        ("attribute", ["The input: a text."]),
        ("function", ["a text.", "", ":type: The input"]),
    ],
)
def test_constants_keep_their_colon(what: str, lines: list[str]) -> None:
    found = ["a text.", "", ":type: The input"]
    api_members.rejoin(None, what, "", None, None, found)  # type: ignore[arg-type]
    assert [line for line in found if line] == [line for line in lines if line]
