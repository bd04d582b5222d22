"""The pieces of the comparison: gate, timing, floor, cases, text, picture."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import cases, measure, parity, prompts, report
from dsa_export.cli import UserError
from engines.session import Session
from tests.engines import toy


@pytest.fixture
def both(runners):
    return {variant: runner.engine for variant, runner in runners.items()}


def test_the_gate_is_green_where_everything_is_selected(runners):
    gate = parity.gate(runners, np.arange(64))
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
    gate = parity.gate({**runners, "sparse": Off(runners["sparse"], change, after)}, np.arange(64))
    assert gate.problem and gate.problem.startswith(problem)


def test_the_gate_looks_at_the_greedy_token(runners, monkeypatch):
    monkeypatch.setattr(parity, "logit_tolerance", lambda dtype, logits: 100.0)

    def swap_the_best_two(logits):
        best = np.argsort(logits[0])[-2:]
        logits = logits.copy()
        logits[0, best] = logits[0, best[::-1]]
        return logits

    gate = parity.gate({**runners, "sparse": Off(runners["sparse"], swap_the_best_two)}, np.arange(64))
    assert gate.problem == "the greedy tokens differ after 8 tokens"


def test_a_wider_tolerance_for_narrower_types():
    logits = np.array([20.0])
    assert parity.logit_tolerance("fp32", logits) == 1e-3
    assert parity.logit_tolerance("fp16", logits) == 16 * 2.0**-11 * 20


def test_agreement_of_equal_and_of_different_outputs(runners):
    tokens = np.random.default_rng(0).integers(0, 256, (2, 6))

    def sessions():
        return {variant: Session(runner, 2) for variant, runner in runners.items()}

    equal = parity.agreement(sessions(), tokens)  # at most 6 <= k tokens
    assert equal is not None
    assert equal.top1 == 1
    assert abs(equal.kl) < 1e-6
    assert equal.tokens == 12
    far = sessions()
    for session in far.values():
        session.prefill(list(np.random.default_rng(1).integers(0, 256, (2, 200))))
    different = parity.agreement(far, tokens)
    assert different is not None
    assert different.top1 < 1
    assert different.kl > 0.01
    assert parity.agreement(sessions(), tokens[:, :0]) is None


def test_alternating_timing():
    order: list[str] = []
    calls = {
        "dense": lambda: (order.append("d"), time.sleep(0.004)),
        "sparse": lambda: (order.append("s"), time.sleep(0.001)),
    }
    pair = measure.alternate(calls, 4, lambda: None, seconds=0)
    assert "".join(order) == "ds" * measure.WARM_UP + "sddssdds"
    assert 2 < pair.speedup < 8
    assert 2 < pair.paired < 8
    assert pair.timings["dense"].p10 <= pair.timings["dense"].median <= pair.timings["dense"].p90
    assert pair.timings["dense"].runs == 4
    assert measure.alternate(calls, 4, lambda: None, seconds=10).timings["sparse"].runs == 40


def test_peak_memory_sees_what_was_freed_again():
    def peak():
        memory = measure.PeakMemory()
        memory.reset()
        block = np.ones(100 * 2**20, np.uint8)
        del block
        return memory.mib()

    assert 95 < measure.in_child(peak) < 130
    assert 95 < measure.in_child(peak) < 130  # and nothing of it stays in this process


def test_a_child_that_dies_is_reported():
    with pytest.raises(UserError, match="exit code 9"):
        measure.in_child(os._exit, 9)
    with pytest.raises(UserError, match="what the child said"):
        measure.in_child(lambda: (_ for _ in ()).throw(UserError("what the child said")))


def test_copy_bandwidth_is_plausible():
    assert 1e8 < measure.copy_bandwidth(1) < 1e12


def test_cases_share_capacity_and_chunk(both):
    planned = cases.plan(both, [64, 8, 64], [2, 1], "both", "prefill")
    assert [(case.phase, case.batch, case.context) for case in planned] == [
        (phase, batch, context) for batch in (1, 2) for context in (8, 64) for phase in ("decode", "prefill")
    ]
    assert {case.capacity for case in planned if case.context == 8} == {16}  # k
    assert [case.queries for case in planned if case.phase == "prefill"] == [8, 64] * 2
    assert all(case.queries == 1 for case in planned if case.phase == "decode")
    assert {case.phase for case in cases.plan(both, [64], [1], "decode", "random")} == {"decode"}


def test_default_contexts_are_affordable(both):
    assert cases.default_contexts(both["dense"], 4096, "prefill") == [512, 2048]
    large = replace(both["dense"], manifest={"step_weight_bytes": 4 * 494_000_000})
    assert cases.default_contexts(large, 32768, "prefill") == [512]
    assert cases.default_contexts(large, 32768, "random") == [512, 2048, 8192, 32768]
    assert cases.default_contexts(large, 100, "prefill") == [100]


def test_contexts_and_rows_that_do_not_fit_are_refused(both):
    with pytest.raises(UserError, match=r"5000 tokens exceeds the engines' capacity of 4096: .*--max-context"):
        cases.plan(both, [5000], [1], "decode", "random")
    with pytest.raises(UserError, match=r"built for 8 rows: build with --max-batch"):
        cases.plan(both, [64], [9], "decode", "random")


def test_the_floor_counts_weights_once_and_caches_per_row(both):
    for variant, engine in both.items():
        one, two = (cases.floor_bytes(engine, cases.Case("decode", batch, 500, 500, 1)) for batch in (1, 2))
        assert two - one == engine.cache_bytes_read(500)
        assert one - engine.cache_bytes_read(500) == engine.manifest["step_weight_bytes"]
        assert one > cases.floor_bytes(engine, cases.Case("decode", 1, 100, 500, 1)), variant


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
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        prompts.rows(export, file, 1, 1)
    with pytest.raises(UserError, match="cannot be read as text"):
        prompts.rows(export, tmp_path / "nothing", 1, 1)


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_missing_or_broken_tokenizer(tmp_path: Path, content: str | None):
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer.json .*dsa_export.onnx"):
        prompts.rows(tmp_path, None, 1, 1)


def record(variant: str, ms: float, **changes: object) -> report.Record:
    return {
        "variant": variant, "backend": "ort", "phase": "decode", "context": 8192, "batch": 1, "queries": 1, "k": 512,
        "dtype": "fp32", "caches": "prefill", "random_indexer": False, "ms_median": ms, "ms_p10": ms, "ms_p90": ms,
        "speedup": 30 / 10, "speedup_by_bytes": 4.5, "floor_fraction": 0.5, "peak_mib": 10.0,
        "agreement": {"top1": 0.97, "kl": 0.01, "tokens": 32}, "machine": {"cpu": "a processor"}, **changes,
    }  # fmt: skip


def test_the_sentence_says_what_was_measured():
    text = report.sentence([record("dense", 30), record("sparse", 10)])
    assert text == (
        "At 8,192 tokens of context (batch 1) one decoding step takes 30 ms dense and 10 ms sparse (k = 512): 3.00× as "
        "fast where the bytes read predict 4.50×, and both prefer the same next token in 97% of 32 cases."
    )
    slower = [record(variant, 10, speedup=0.8, agreement=None, random_indexer=True) for variant in ("dense", "sparse")]
    text = report.sentence(slower)
    assert "slower, at 0.80× the speed" in text
    assert "the indexer is random, so only the timing means anything" in text
    assert "prefer" not in text


def test_the_picture_shows_every_phase(tmp_path: Path):
    records = [
        record(variant, ms, phase=phase, context=context, batch=batch)
        for batch in (1, 4)
        for context in (512, 2048)
        for phase in ("decode", "prefill")
        for variant, ms in (("dense", 30), ("sparse", 10))
    ]
    report.picture(records, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
