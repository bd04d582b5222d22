from __future__ import annotations

from pathlib import Path

import pytest

from engines import build
from engines.session import Runner, open_runner
from tests.engines import toy

ORT_FOLDERS = (*toy.DENSE_CORES.values(), "sparse")


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's export (fp32, k = 16)."""
    return toy.write_export(tmp_path_factory.mktemp("toy") / "onnx")


@pytest.fixture(scope="session")
def engines(export: Path) -> Path:
    """Its ONNX Runtime engines."""
    folder = export.parent / "engines"
    build.build("ort", build.parse_arguments(["--onnx", str(export), "--out", str(folder)]))
    return folder


@pytest.fixture(scope="session")
def runners(engines: Path) -> dict[str, Runner]:
    return {variant: open_runner(engines / "ort" / variant, threads=1) for variant in ORT_FOLDERS}


@pytest.fixture(params=ORT_FOLDERS)
def runner(request: pytest.FixtureRequest, runners: dict[str, Runner]) -> Runner:
    return runners[request.param]
