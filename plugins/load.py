"""Finds the plugin library and loads it into a TensorRT plugin registry."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from plugins.registry import DOMAIN, PLUGIN_VERSION

LIBRARY = "libdsa_plugins.so"
PLUGINS = ("IndexTopK", "SparseAttention")


_loaded: tuple[Path, bytes] | None = None
"""What this process loaded, and its hash: a registry keeps the creators of its first library."""


class LibraryNotLoaded(Exception):
    """One line: what is wrong with the library, and what to do."""


def load_library(registry: Any, path: Path) -> Path:
    """Loads the library at `path` into `registry` (tensorrt.get_plugin_registry()) and returns its absolute path.

    Loading it twice is harmless. Raises LibraryNotLoaded if it is missing, if it does not register its operators, or if
    this process has loaded another one.
    """
    global _loaded
    if not path.is_file():
        raise LibraryNotLoaded(f"no plugin library at {path}: run `make plugins`")
    library = path.resolve()
    content = sha256(library.read_bytes()).digest()
    if missing_plugins(registry):
        registry.load_library(str(library))
        _loaded = library, content
    elif _loaded and _loaded[1] != content:
        raise LibraryNotLoaded(
            f"this process runs the plugin library that was {_loaded[0]}, and {library} is another: start a new process"
        )
    if missing := missing_plugins(registry):
        raise LibraryNotLoaded(f"{library} did not register {', '.join(missing)}: run `make plugins` for this TensorRT")
    return library


def missing_plugins(registry: Any) -> list[str]:
    """Operators of this project that `registry` does not know."""
    known = {(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators}
    return [name for name in PLUGINS if (name, PLUGIN_VERSION, DOMAIN) not in known]
