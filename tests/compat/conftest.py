"""As for the unit tests: a login node."""

from tests.unit.conftest import no_torchtitan

__all__ = ["no_torchtitan"]
