"""Print requirements.lock: the exact versions this environment resolved to.

It is used as constraints (``pip install -c``), so a pin for something that a
platform does not need does no harm.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from generated import book_extras, project
from notebooks import write_text
from paths import LOCK

HEADER = "# Written by `make lock`: what ftlib and the book's extras resolve to.\n"
MARKERS = {"triton": " ; platform_system == 'Linux'"}


def closure(name: str, extras: set[str]) -> dict[str, str]:
    """Return what a distribution needs, as installed: name to public version.

    Args:
        name: an installed distribution; it is not part of the answer.
        extras: which of its extras count.
    """
    found: dict[str, str] = {}
    queue, done = [(name, extra) for extra in ("", *sorted(extras))], set()
    while queue:
        owner, extra = item = queue.pop()
        if item in done:
            continue
        done.add(item)
        for requirement in map(Requirement, distribution(owner).requires or ()):
            if _applies(requirement, extra):
                needed = canonicalize_name(requirement.name)
                found[needed] = Version(distribution(needed).version).public
                queue += [(needed, more) for more in ("", *requirement.extras)]
    found.pop(name, None)
    return found


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def lock() -> str:
    """Return the text of requirements.lock."""
    about = project()
    pins = closure(about["name"], set(book_extras(about)))
    lines = [f"{name}=={pins[name]}{MARKERS.get(name, '')}\n" for name in sorted(pins)]
    return HEADER + "".join(lines)


def main(path: Path = LOCK) -> None:
    """Write requirements.lock."""
    write_text(path, lock())


if __name__ == "__main__":
    main()
