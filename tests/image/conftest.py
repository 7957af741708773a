"""Fixtures of the tests that need a real Docker engine: images that it builds from the Dockerfile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.image.build import Built
from launcher.image.engine import Engine
from tests.image.images import built, cpu_base, cpu_squashfs, kept_engine

TINY_LOCK = """\
idna==3.10 \\
    --hash=sha256:946d195a0d259cbba61165e88e65941f16e9b36ea6ddb97f00452bae8b1287d3
packaging==25.0 \\
    --hash=sha256:29572ef2b1f17581046b3a2227d5c611fb25ec70ca1ba8554b24b0e69331a484
"""


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with kept_engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def base_image(engine: Engine) -> str:
    return cpu_base(engine)


@pytest.fixture(scope="session")
def cpu_image(engine: Engine, base_image: str) -> Built:
    """The channel cpu, built from the Dockerfile and its lock as a user builds it. 2 to 3 minutes."""
    return built("cpu", "amd64", engine, base_image)


@pytest.fixture(scope="session")
def cpu_sqsh(cpu_image: Built) -> Path:
    """The same as a squashfs."""
    return cpu_squashfs()


@pytest.fixture(scope="session")
def tiny_lock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small packages of pure Python: what a build does besides installing torch."""
    path = tmp_path_factory.mktemp("lock") / "tiny.txt"
    path.write_text(TINY_LOCK)
    return path


@pytest.fixture(scope="session")
def tiny_image(engine: Engine, base_image: str, cpu_image: Built, tiny_lock: Path) -> Built:
    """The same Dockerfile with the tiny lock; after `cpu_image` only the last layers are new."""
    return built("cpu", "amd64", engine, base_image, lock_file=tiny_lock, tag="titan:tiny-amd64")
