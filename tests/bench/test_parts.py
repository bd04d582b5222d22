"""The pieces of the comparison: gate, scores, timing, memory, text."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from bench import floors, matrix, measure, parity, prompts, runs
from dsa_export.cli import UserError, progress_bar
from dsa_export.memory import PeakMemory
from engines.artifacts import open_engine
from engines.session import Session, open_runner
from tests.engines import toy


def gate_of(runners, sparse=None):
    return parity.gates({"dense": runners["dense"]}, sparse or runners["sparse"], np.arange(64))["dense"]


def test_the_gate_is_green_where_everything_is_selected(runners):
    gate = gate_of(runners)
    assert gate.problem is None
    assert gate.tokens == 16  # k
    assert 0 <= gate.error < gate.tolerance


class Off:
    """A runner whose logits are changed by `change` once `after` calls were made."""

    def __init__(self, runner, change, after=0):
        self.runner, self.change, self.after = runner, change, after
        self.engine, self.allocate, self.copy = runner.engine, runner.allocate, runner.copy

    def run(self, *arguments):
        self.after -= 1
        logits = self.runner.run(*arguments)
        return self.change(logits) if self.after < 0 else logits


@pytest.mark.parametrize(
    ("change", "after", "problem"),
    [
        (lambda logits: logits + 0.01, 0, "logits differ by 0.01 after 8 tokens"),
        (lambda logits: logits + 0.01, 3, "logits differ by 0.01 after 11 tokens"),
        (lambda logits: logits * np.nan, 0, "a logit is not finite after 8 tokens"),
    ],
)
def test_the_gate_is_red(runners, change, after, problem):
    gate = gate_of(runners, Off(runners["sparse"], change, after))
    assert gate.problem and gate.problem.startswith(problem)


def test_the_gate_looks_behind_short_caches(engines: Path, runners, tmp_path: Path):
    """Up to k slots the engine attends densely: the selection must be run too."""
    folder = tmp_path / "sparse"
    shutil.copytree(engines / "ort" / "sparse", folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    branches = [a.g for node in model.graph.node if node.op_type == "If" for a in node.attribute]
    cores = [node for branch in branches for node in branch.node if node.op_type == "SparseAttention"]
    assert len(cores) == toy.LAYERS
    for core in cores:
        next(attribute for attribute in core.attribute if attribute.name == "scale").f *= 10
    onnx.save(model, folder / "model.onnx")
    gate = gate_of(runners, open_runner(folder, threads=1, verify=False))
    assert gate.problem and gate.problem.startswith("logits differ by")


def test_the_gate_is_red_where_one_capacity_is(runners, monkeypatch):
    green, red = parity.Gate(16, 0.2, 0.3, None), parity.Gate(8, 0.1, 0.05, "logits differ")
    found = iter([{"dense": red}, {"dense": green}])
    monkeypatch.setattr(parity, "_gates", lambda *_: next(found))
    assert gate_of(runners) == red


def test_the_gate_looks_at_the_greedy_token(runners, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCE", 100.0)

    def swap_the_best_two(logits):
        best = np.argsort(logits[0])[-2:]
        logits = logits.copy()
        logits[0, best] = logits[0, best[::-1]]
        return logits

    gate = gate_of(runners, Off(runners["sparse"], swap_the_best_two))
    assert gate.problem == "the greedy tokens differ after 8 tokens"


def of_type(runner, dtype: str, precision: str):
    runner.engine = replace(runner.engine, dtype=dtype, precision=precision)
    return runner


@pytest.mark.parametrize(
    ("off_later", "off", "problem"),
    [
        (0.1, 0.1, None),
        (0.1, 0.25, "logits differ by 0.25 after 8 tokens, at most 0.2 is rounding"),
        (500, 500, "logits differ by 5e+02 after 8 tokens, at most"),
        (np.inf, 0, "a logit is not finite after 8 tokens"),
    ],
)
def test_the_gate_allows_twice_the_rounding_of_the_dense_engine(runners, off_later, off, problem):
    """Its first eight calls are seven tokens one by one and all at once: what follows differs, by rounding or more."""
    dense = Off(runners["dense"], lambda logits: logits + off_later, after=8)
    sparse = of_type(Off(runners["sparse"], lambda logits: logits + off), "fp32", "int4")
    found = gate_of({"dense": dense}, sparse).problem
    assert found.startswith(problem) if problem else found is None


@pytest.mark.parametrize(("dtype", "precision"), [("fp16", "int4"), ("fp32", "int8")])
def test_the_gate_allows_twice_the_rounding_between_dense_engines(runners, dtype: str, precision: str):
    """In 16 bits, and of packed weights, whose products round their inputs."""
    for off, problem in ((0.1, None), (0.25, "logits differ by 0.25 after 8 tokens, at most 0.2 is rounding")):
        dense = {"first": runners["dense"], "other": Off(runners["dense"], lambda logits: logits + 0.1)}
        sparse = of_type(Off(runners["sparse"], lambda logits, off=off: logits + off), dtype, precision)
        gates = parity.gates(dense, sparse, np.arange(64))
        assert gates["first"].problem == problem and gates["other"].problem is None


def test_the_gate_allows_the_rounding_of_caches_in_fp16(runners):
    off = Off(runners["sparse"], lambda logits: logits + 2e-3)
    assert gate_of(runners, off).problem
    off.engine = replace(off.engine, selection=off.engine.selection | {"kv_cache": "fp16"})
    loud = Off(runners["dense"], lambda logits: logits + 3)  # of logits around 3 an fp16 number keeps 11 bits
    off = Off(off, lambda logits: logits + 3)
    assert gate_of({"dense": loud}, off).problem is None


@pytest.mark.parametrize(("dtype", "precision"), [("fp32", "fp32"), ("fp32", "int4"), ("fp16", "fp16")])
def test_a_broken_dense_engine_excuses_nothing(runners, dtype: str, precision: str):
    dense = {"first": runners["dense"], "broken": Off(runners["dense"], lambda logits: logits + 5)}
    for off, red in ((0, {"broken"}), (5, {"first"}), (-5, {"first", "broken"})):
        sparse = of_type(Off(runners["sparse"], lambda logits, off=off: logits + off), dtype, precision)
        gates = parity.gates(dense, sparse, np.arange(64))
        assert {name for name, gate in gates.items() if gate.problem} == red


def test_the_gate_allows_what_the_type_of_the_engine_rounds(runners):
    """bf16 rounds a logit of 1 by up to 2^-8."""
    sparse = Off(runners["sparse"], lambda logits: logits + 0.01)
    assert gate_of(runners, sparse).problem
    assert gate_of(runners, of_type(sparse, "bf16", "bf16")).problem is None


def test_scores_of_equal_and_of_different_outputs(runners):
    tokens = np.random.default_rng(0).integers(0, 256, (2, 7))

    def sessions():
        return {variant: Session(runner, 2) for variant, runner in runners.items()}

    equal = parity.score(sessions(), tokens)  # at most 6 <= k tokens
    assert equal is not None
    assert equal.agreement["dense"].top1 == 1
    assert abs(equal.agreement["dense"].kl) < 1e-6
    assert equal.agreement["dense"].tokens == 12
    assert equal.loss["dense"] == pytest.approx(equal.loss["sparse"], abs=1e-5)
    logits = Session(runners["dense"], 2).prefill(list(tokens[:, :1]))
    first = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    one = parity.score(sessions(), tokens[:, :2])
    assert one is not None
    assert one.loss["dense"] == pytest.approx(float(np.mean(first - logits[[0, 1], tokens[:, 1]])), abs=1e-5)
    far = sessions()
    for session in far.values():
        session.prefill(list(np.random.default_rng(1).integers(0, 256, (2, 200))))
    different = parity.score(far, tokens)
    assert different is not None
    assert different.agreement["dense"].top1 < 1
    assert different.agreement["dense"].kl > 0.01
    assert different.loss["dense"] != different.loss["sparse"]
    assert parity.score(sessions(), tokens[:, :1]) is None


def test_sparse_is_scored_against_every_dense_side(runners):
    """The strongest, which the tables name, need not be the first."""
    reversed_logits = Off(runners["dense"], lambda logits: -logits)
    sides = {"weak": reversed_logits, "strong": runners["dense"], "sparse": runners["sparse"]}
    found = parity.score({name: Session(runner, 2) for name, runner in sides.items()}, np.arange(14).reshape(2, 7))
    assert found is not None
    assert found.agreement["strong"].top1 == 1 and found.agreement["strong"].loss_error < 1e-5
    assert found.agreement["weak"].top1 == 0 and found.agreement["weak"].loss_error > 1e-3


def test_an_error_is_between_blocks_of_tokens():
    """Eight independent means, each of 64 alike tokens: 512 independent tokens would seem to tell eight times more."""
    means = np.random.default_rng(0).normal(size=8)
    differences = np.repeat(means, 64)[:, None]
    expected = means.std(ddof=1) / np.sqrt(8)
    assert parity.between_blocks(differences) == pytest.approx(expected)
    assert parity.between_blocks(differences.reshape(2, 256).T) == pytest.approx(expected), (
        "rows have blocks of their own"
    )
    assert parity.between_blocks(differences[:100]) is None


def test_caches_are_filled_as_a_whole_text_would_fill_them(runners, monkeypatch):
    """Up to k slots the toy's sparse engine attends to everything: what it keeps of that is not taken over.

    With a second per token, the time to the first token is that of the whole text.
    """
    taken: list[tuple[str, int]] = []
    prefill, clock = Session.prefill, [0.0]

    def noted(session, rows, *others):
        taken.append((next(name for name, one in sessions.items() if one is session), len(rows[0])))
        clock[0] += len(rows[0])
        return prefill(session, rows, *others)

    sessions = {name: Session(runner, capacity=16) for name, runner in runners.items()}
    monkeypatch.setattr(Session, "prefill", noted)
    monkeypatch.setattr(runs, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    settings = runs.Settings("prefill", measure.Budget(1), threads=1, scored=4)
    text = np.random.default_rng(0).integers(0, 256, (1, 65))
    filled = None
    with progress_bar() as progress:
        for context in (16, 32, 64):
            case = matrix.Case("decode", 1, context, context, 1)
            filled = runs.fill(sessions, case, text, settings, filled, progress)
            assert filled.seconds == dict.fromkeys(sessions, context)
    assert taken == [(name, tokens) for tokens in (16, 32, 32) for name in sessions]
    assert filled is not None and filled.context == 64


def test_the_divergence_is_of_sparse_from_dense():
    def says(*probabilities: float):
        return types.SimpleNamespace(decode=lambda _: np.log([probabilities]))

    score = parity.score({"dense": says(0.5, 0.5), "sparse": says(0.9, 0.1)}, np.zeros((1, 2), int))  # type: ignore
    assert score and score.agreement["dense"].kl == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))


def test_alternating_timing():
    order: list[str] = []
    calls = {
        "dense": lambda: (order.append("d"), time.sleep(0.02)),
        "sparse": lambda: (order.append("s"), time.sleep(0.005)),
    }
    times = measure.alternate(calls, measure.Budget(4, at_least=0), lambda: None)
    assert "".join(order) == "ds" * measure.WARM_UP + "sddssdds"
    assert 2 < np.median(times["dense"] / times["sparse"]) < 8
    timing = measure.Timing.of(times["dense"])
    assert timing.p10 <= timing.median <= timing.p90
    assert timing.runs == 4
    assert len(measure.alternate(calls, measure.Budget(1, at_least=0), lambda: None)["sparse"]) == 1
    assert len(measure.alternate(calls, measure.Budget(4, at_least=10), lambda: None)["sparse"]) == 40
    assert len(measure.alternate(calls, measure.Budget(50, at_most=0), lambda: None)["sparse"]) == measure.MIN_RUNS


def test_paired_speedups_are_medians_over_the_rounds(engines: Path):
    (group,), _ = matrix.groups(open_engine(engines / "ort" / name) for name in ("dense", "sparse"))
    times = {"Attention": np.array([2.0, 2.0, 6.0]), "SparseAttention": np.array([1.0, 4.0, 2.0])}
    filled = runs.Filled(32, dict.fromkeys(times, 1.0), None)
    settings = runs.Settings("random", measure.Budget(3), 1, 0)
    case = matrix.Case("decode", 1, 32, 32, 1)
    dense, sparse = runs._records(group, case, times, filled, floors.Rates(1, 1, ""), settings, 32)
    assert (dense["speedup_paired"], sparse["speedup_paired"], sparse["speedup"]) == (1, 2, 1)


def test_sparse_agrees_with_the_strongest_dense_side(engines: Path):
    folders = [engines / "ort" / name for name in ("dense", "dense-gqa", "sparse")]
    (group,), _ = matrix.groups(open_engine(folder) for folder in folders)
    times = {"Attention": np.array([4.0]), "GroupQueryAttention": np.array([3.0]), "SparseAttention": np.array([1.0])}
    agreement = {
        name: parity.Agreement(None, top1, 0.0, 1) for name, top1 in (("Attention", 0), ("GroupQueryAttention", 1))
    }
    filled = runs.Filled(32, dict.fromkeys(times, 1.0), parity.Score(dict.fromkeys(times, 1.0), agreement))
    settings, case = runs.Settings("random", measure.Budget(1), 1, 1), matrix.Case("decode", 1, 32, 32, 1)
    *_, sparse = runs._records(group, case, times, filled, floors.Rates(1, 1, ""), settings, 32)
    assert sparse["agreement"]["top1"] == 1


def test_peak_memory_sees_what_was_freed_again():
    def peak():
        memory = PeakMemory()
        memory.reset()
        block = np.ones(100 * 2**20, np.uint8)
        del block
        return memory.mib()

    assert 95 < measure.in_child(peak) < 130
    assert 95 < measure.in_child(peak) < 130  # and nothing of it stays in this process


def test_peak_memory_on_a_gpu_is_what_torch_took_there(monkeypatch):
    class Gpu:
        peak = allocated = 3 * 2**20

        def memory_allocated(self):
            return self.allocated

        def max_memory_allocated(self):
            return self.peak

        def reset_peak_memory_stats(self):
            self.peak = self.allocated

    gpu = Gpu()
    monkeypatch.setattr("dsa_export.memory._gpu", lambda start=False: gpu)
    watched = PeakMemory()
    gpu.peak = 9 * 2**20
    assert watched.mib() == 6
    watched.reset()
    assert watched.mib() == 0


def test_peak_memory_of_what_torch_does_not_see_is_taken_of_the_whole_gpu(monkeypatch):
    class Gpu:
        free = 70 * 2**20

        def mem_get_info(self):
            return self.free, 80 * 2**20

    gpu, started = Gpu(), []
    monkeypatch.setattr("dsa_export.memory._gpu", lambda start=False: started.append(start) or gpu)
    watched = PeakMemory(outside_torch=True)
    gpu.free = 40 * 2**20
    assert watched.mib() == 30 and started[0]


@pytest.mark.parametrize(("backend", "outside"), [("torch", False), ("tensorrt", True)])
def test_which_engines_torch_does_not_see(monkeypatch, backend: str, outside: bool):
    seen = []

    def watch(outside_torch: bool):
        seen.append(outside_torch)
        raise UserError("enough")

    monkeypatch.setattr(runs, "PeakMemory", watch)
    monkeypatch.setattr(runs.floors, "runs_on_gpu", lambda name: True)
    with pytest.raises(UserError, match="enough"):
        runs.peak_memory.__wrapped__(types.SimpleNamespace(backend=backend), [], np.zeros((1, 2)), 1)  # type: ignore[arg-type]
    assert seen == [outside]


def test_memory_is_counted_where_the_engines_run(monkeypatch):
    monkeypatch.setattr(runs.floors, "runs_on_gpu", lambda backend: backend == "tensorrt")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (5 * 2**30, 80 * 2**30))
    assert runs.free_bytes("tensorrt") == 5 * 2**30 - matrix.MARGIN_BYTES
    assert runs.free_bytes("ort") > 0


def test_peak_memory_is_never_below_nothing():
    def peak():
        block = np.ones(100 * 2**20, np.uint8)
        memory = PeakMemory()
        del block
        memory.reset()
        return memory.mib()

    assert measure.in_child(peak) == 0


def test_only_a_forked_child_freezes_its_parents_garbage():
    """A spawned one has none, and nanobind would call everything frozen a leak."""
    own = gc.get_freeze_count()  # Python 3.12 begins with some
    assert measure.in_child(gc.get_freeze_count, method="spawn") == own < measure.in_child(gc.get_freeze_count)


def test_a_child_that_dies_is_reported():
    with pytest.raises(measure.ChildDied, match="exit code 9"):
        measure.in_child(os._exit, 9)
    with pytest.raises(UserError, match="what the child said"):
        measure.in_child(lambda: (_ for _ in ()).throw(UserError("what the child said")))


def output_of(code: str) -> str:
    """What a Python program prints that ends well and in silence otherwise."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_ctrl_c_at_the_fork_is_not_lost():
    """Python ignores what is raised in what a library registered to run at a fork; and libraries have threads."""
    code = (
        "import os, signal, threading, time\n"
        "from bench.measure import in_child\n"
        "threading.Thread(target=time.sleep, args=(20,), daemon=True).start()\n"
        "os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "try:\n"
        "    in_child(time.sleep, 20)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    assert output_of(code) == "interrupted\n"


def test_a_background_job_ignores_ctrl_c_in_its_child_too():
    code = (
        "import os, signal\n"
        "from bench.measure import in_child\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "print(in_child(lambda: os.kill(os.getpid(), signal.SIGINT)), signal.getsignal(signal.SIGINT).name)\n"
    )
    assert output_of(code) == "None SIG_IGN\n"


def test_text_comes_from_a_file_or_the_standard_library(export: Path, tmp_path: Path):
    rows = prompts.rows(export, None, 2, 3000)
    assert rows.shape == (2, 3000)
    assert rows.max() < toy.V
    np.testing.assert_array_equal(rows[1, : 3000 - prompts.ROW_OFFSET], rows[0, prompts.ROW_OFFSET :])
    file = tmp_path / "prompt.txt"
    file.write_text("déjà vu")
    assert prompts.rows(export, file, 1, 9).shape == (1, 9)
    with pytest.raises(UserError, match=r"prompt.txt has 9 tokens, 10 are needed"):
        prompts.rows(export, file, 1, 10)
    file.write_bytes(b"a\xff\xfe\x00")
    with pytest.raises(UserError, match=r"prompt.txt is not UTF-8 text \(byte 1\)"):
        prompts.rows(export, file, 1, 1)
    with pytest.raises(UserError, match="cannot be read as text"):
        prompts.rows(export, tmp_path / "nothing", 1, 1)


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_missing_or_broken_tokenizer(tmp_path: Path, content: str | None):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer.json .*dsa_export.onnx"):
        prompts.rows(tmp_path, None, 1, 1)
