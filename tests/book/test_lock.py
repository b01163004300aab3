"""requirements.lock is what is installed, and keeps to pyproject.toml's bounds."""

import itertools
from importlib.metadata import version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import generated
import lock
from paths import LOCK


def pins() -> dict[str, Requirement]:
    lines = [line for line in LOCK.read_text().splitlines() if line[0] != "#"]
    return {r.name: r for r in map(Requirement, lines)}


def test_every_installed_dependency_is_the_locked_one() -> None:
    about = generated.project()
    needed = lock.closure("ftlib", set(generated.book_extras(about)))
    assert len(needed) > 100
    locked = pins()
    differing = {
        name: (found, str(locked.get(name)))
        for name, found in needed.items()
        if name not in locked or not locked[name].specifier.contains(found)
    }
    assert differing == {}


def test_every_bound_is_locked_within_its_range() -> None:
    about = generated.project()
    groups = [about["dependencies"], *generated.book_extras(about).values()]
    locked = pins()
    for bound in map(Requirement, itertools.chain(*groups)):
        (pin,) = locked[canonicalize_name(bound.name)].specifier
        assert pin.operator == "=="
        assert bound.specifier.contains(pin.version, prereleases=True), bound


def test_pins_are_exact_public_and_sorted() -> None:
    names = list(pins())
    assert names == sorted(names)
    for name, requirement in pins().items():
        (pin,) = requirement.specifier
        assert Version(pin.version).local is None, name


def test_triton_is_pinned_on_linux_only() -> None:
    marker = pins()["triton"].marker
    assert marker is not None
    assert marker.evaluate({"platform_system": "Linux"})
    assert not marker.evaluate({"platform_system": "Darwin"})


def test_closure_follows_extras_of_dependencies() -> None:
    """An oracle of one step: pip's own metadata of a known chain."""
    assert lock.closure("nbval", set())["nbformat"] == version("nbformat")
    assert "ftlib" not in lock.closure("ftlib", {"dev"})
    assert "pytest" not in lock.closure("ftlib", set())
