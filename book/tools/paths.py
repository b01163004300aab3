"""Where the book's parts lie in the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
MIRROR = ROOT / "book" / "mirror"
BUILD = ROOT / "_build"
EXECUTED = BUILD / "notebooks"
HTML = BUILD / "html"
PYPROJECT = ROOT / "pyproject.toml"
LOCK = ROOT / "requirements.lock"
ENVIRONMENT = ROOT / "environment.yml"
