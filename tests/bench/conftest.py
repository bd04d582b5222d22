from tests.engines.conftest import engines, export, runners  # noqa: F401  (the toy and its engines)
