"""The peers compute what they claim, and a failing one is reported, not fatal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bench import measure, peers, runs
from dsa_export.cli import UserError
from dsa_export.model import dense_twin, load_model

WORKER = Path(peers.__file__).with_name("genai_worker.py")
TOKENS = np.random.default_rng(0).integers(3, 500, 61)

FAKE_GENAI = """
__version__ = "fake"
WEIGHTS_MIB = 64
class Config:
    def __init__(self, folder): self.folder = folder
    def overlay(self, text): assert '"intra_op_num_threads": 3' in text
class Model:
    def __init__(self, config): self.weights = b"w" * (WEIGHTS_MIB << 20)
class GeneratorParams:
    def __init__(self, model): pass
    def set_search_options(self, max_length, do_sample): self.max_length = max_length
class Generator:
    def __init__(self, model, parameters): self.tokens, self.room = 0, parameters.max_length
    def append_tokens(self, tokens):
        self.tokens += len(tokens)
        if self.tokens > self.room: raise RuntimeError("no room")
    def rewind_to(self, length): self.tokens = length
"""


def task(checkpoint: Path, **changes: object) -> peers.Task:
    values = {
        "contexts": [20, 60],
        "text": TOKENS,
        "caches": "prefill",
        "k": 16,
        "selection": {},
        "budget": measure.Budget(3),
        "threads": 1,
    }
    return peers.Task(checkpoint=str(checkpoint), **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["transformers", "masked"])
def test_a_peer_computes_what_the_model_does(name: str, dsa_folder: Path):
    """The stock model is the dense twin, the masked one our sparse model; cropping brings the same token again."""
    selection = {"index_pool": 4}  # as the engine was exported, which its checkpoint was not
    peer = (peers.MaskedPeer if name == "masked" else peers.TransformersPeer)(task(dsa_folder, selection=selection))
    ours = load_model(dsa_folder, index_topk=16, **selection)
    ours = dense_twin(ours) if name == "transformers" else ours
    with torch.no_grad():
        expected = ours(torch.from_numpy(TOKENS)[None]).logits[0, -1]
        seen: list[torch.Tensor] = []
        forward = peer.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0, -1]))
        for chunk in (TOKENS[:40], TOKENS[40:60], TOKENS[60:]):
            peer.append(chunk)
        peer.crop(60)
        peer.append(TOKENS[60:])
        forward.remove()
    for logits in seen[-2:]:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_a_peer_is_timed_on_random_caches(dsa_folder: Path):
    records = peers.measure_torch("masked", task(dsa_folder, caches="random", selection={"index_keys": "int8"}))
    assert [record["context"] for record in records] == [20, 60]
    assert all(record["ttft_s"] is None and record["ms_median"] > 0 for record in records)


def test_the_first_token_of_a_peer_takes_all_chunks(dsa_folder: Path, monkeypatch: pytest.MonkeyPatch):
    def timed(call):
        call()
        return 1.0

    monkeypatch.setattr(measure, "timed", timed)
    monkeypatch.setattr(peers, "CHUNK", 10)
    records = peers._measure_torch("masked", task(dsa_folder), [20, 60])
    assert [record["ttft_s"] for record in records] == [2, 6]


def test_a_peer_has_the_threads_of_the_engines(dsa_folder: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    peers._measure_torch("masked", task(dsa_folder, caches="random", threads=3), [20])
    assert seen == [3]


def test_a_peer_that_needs_too_much_memory_is_skipped(dsa_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "torch_bytes", lambda checkpoint, context: 2**60)
    records = peers.measure_torch("transformers", task(dsa_folder))
    assert [(record["kind"], record["context"]) for record in records] == [("skipped", 20), ("skipped", 60)]


@pytest.fixture
def genai(tmp_path: Path) -> tuple[Path, Path]:
    """A model folder as the builder writes it, and an interpreter with a stand-in for the package."""
    import onnx

    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "onnxruntime_genai.py").write_text(FAKE_GENAI)
    python = tmp_path / "python"
    start = f"import sys, runpy; sys.path.insert(0, {str(tmp_path / 'packages')!r}); "
    start += "runpy.run_path(sys.argv[-1], run_name='__main__')"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
    python.chmod(0o755)
    model = tmp_path / "model"
    model.mkdir()
    (model / "genai_config.json").write_text(json.dumps({"model": {"context_length": 50}}))
    node = onnx.helper.make_node("MatMulNBits", ["x"], ["y"], domain="com.microsoft", bits=4)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [])), model / "model.onnx")
    return model, python


def test_genai_is_timed_in_its_own_interpreter(genai: tuple[Path, Path], tmp_path: Path):
    model, python = genai
    skipped, record = peers.measure_genai(model, str(python), task(tmp_path, threads=3))
    assert (skipped["context"], skipped["reason"]) == (60, "beyond its context length of 50")
    assert (record["precision"], record["context"], record["runs"]) == ("int4", 20, 3)
    assert record["versions"]["onnxruntime-genai"] == "fake"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_the_memory_of_genai_is_what_its_model_added(genai: tuple[Path, Path], tmp_path: Path):
    _, record = peers.measure_genai(genai[0], str(genai[1]), task(tmp_path, threads=3))
    assert 64 <= record["peak_mib"] < 64 + 5  # an interpreter alone takes 10
    assert record["peak_mib_is"] == runs.PEAK_MIB


def test_a_failing_genai_says_why(genai: tuple[Path, Path], tmp_path: Path):
    model, python = genai
    chatter = "import sys; print('warning ' * 20_000, file=sys.stderr)\n"  # more than a pipe holds
    (tmp_path / "packages" / "onnxruntime_genai.py").write_text(
        f"{chatter}raise ImportError('built for another system')"
    )
    with pytest.raises(UserError, match="failed: ImportError: built for another system"):
        peers.measure_genai(model, str(python), task(tmp_path))
    with pytest.raises(UserError, match=r"holds no genai_config.json: make it with `python -m onnxruntime_genai"):
        peers.measure_genai(tmp_path, str(python), task(tmp_path))
    (model / "genai_config.json").write_text("{}")
    with pytest.raises(UserError, match="is not as onnxruntime-genai's builder writes it: 'model'"):
        peers.measure_genai(model, str(python), task(tmp_path))
    (model / "genai_config.json").write_text(json.dumps({"model": {"context_length": 50}}))
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), model / "model.onnx")
    with pytest.raises(UserError, match="is not as onnxruntime-genai's builder writes it"):
        peers.measure_genai(model, str(python), task(tmp_path))
    with pytest.raises(UserError, match="nowhere is no program"):
        peers.genai_python(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [(["--help"], 0, "run by `python bench/compare.py --genai DIR`"), ([], 1, "lacks onnxruntime-genai")],
)
def test_the_worker_alone_says_what_it_needs(options: list[str], code: int, line: str):
    """-S: without the packages of this environment."""
    command = [sys.executable, "-S", str(WORKER), *options]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    said = done.stdout + done.stderr
    assert done.returncode == code and line in said and said.count("\n") == 1
