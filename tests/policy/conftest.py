"""What the policy tests look at: the checkout itself."""

from pathlib import Path

import pytest
from tiny_fixtures import *  # noqa: F403

FOLDERS = ("dirotq", "pipeline", "stages", "models", "kernels", "assets", "conf")


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def folders(root: Path) -> dict[str, Path]:
    """{package: folder} of everything that is importable."""
    return {name if name == "dirotq" else f"dirotq.{name}": root / name for name in FOLDERS}
