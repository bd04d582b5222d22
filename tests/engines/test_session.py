"""Sessions on ONNX Runtime: whatever way the tokens come in, the logits are the same.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsa_export.cli import UserError
from engines import sampling
from engines import session as session_module
from engines.memory import chunk_tokens
from engines.ort import OrtCaches, OrtRunner
from engines.session import Runner, Session, bucket, buckets
from tests.engines import toy

TOLERANCE = 1e-4  # fp32 logits of up to 30; sums of another order


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, toy.END_OF_TEXT, length)


def whole_prefill(runner: Runner, prompt: np.ndarray) -> np.ndarray:
    return Session(runner, capacity=1024, prefill_chunk=1024).prefill([prompt])


@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_chunked_prefill_equals_whole_prefill(runner: Runner, chunk: int):
    prompt = tokens(200)
    chunked = Session(runner, capacity=1024, prefill_chunk=chunk).prefill([prompt])
    np.testing.assert_allclose(chunked, whole_prefill(runner, prompt), atol=TOLERANCE)


def test_decoding_equals_prefill(runner: Runner):
    prompt = tokens(60)
    session = Session(runner)
    session.prefill([prompt[:20]])
    for length in range(21, 61):
        logits = session.decode([prompt[length - 1]])
        np.testing.assert_allclose(logits, whole_prefill(runner, prompt[:length]), atol=TOLERANCE)


def test_a_later_token_does_not_change_an_earlier_result(runner: Runner):
    prompt = tokens(80)
    session = Session(runner)
    session.prefill([prompt[:49]])
    before = session.decode([prompt[49]]).copy()
    session.prefill([prompt[50:]])  # the slots behind position 50 now hold something
    session.truncate(49)
    np.testing.assert_array_equal(session.decode([prompt[49]]), before)


def test_tokens_may_be_a_column_of_a_matrix(runner: Runner):
    session, again = Session(runner, 2), Session(runner, 2)
    matrix = tokens(20).reshape(2, 10)
    logits = session.prefill(list(matrix[:, ::3]))
    np.testing.assert_array_equal(logits, again.prefill([row[::3].tolist() for row in matrix]))
    np.testing.assert_array_equal(session.decode(matrix[:, 1]), again.decode(matrix[:, 1].tolist()))


def test_one_prefill_may_have_chunks_of_its_own(runner: Runner):
    session, taken = Session(runner, prefill_chunk=64), []
    session.prefill([tokens(40)], taken.append, chunk=16)
    session.prefill([tokens(40)], taken.append)
    assert taken == [16, 16, 8, 40]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 90), min_size=2, max_size=4), chunk=st.sampled_from([3, 16, 128]))
def test_rows_of_a_batch_equal_each_alone(runner: Runner, lengths: list[int], chunk: int):
    prompts = [tokens(length, seed) for seed, length in enumerate(lengths)]
    follow_ups = tokens(len(prompts), seed=99)
    batch = Session(runner, len(prompts), prefill_chunk=chunk)
    prefilled = batch.prefill(prompts)
    assert batch.lengths.tolist() == lengths
    decoded = batch.decode(follow_ups)
    for b, prompt in enumerate(prompts):
        alone = Session(runner)
        np.testing.assert_allclose(prefilled[b], alone.prefill([prompt])[0], atol=TOLERANCE)
        np.testing.assert_allclose(decoded[b], alone.decode(follow_ups[b : b + 1])[0], atol=TOLERANCE)


def test_rows_that_end_where_the_caches_end(runner: Runner):
    """Row 0 fills its caches to the last slot while row 1 still has more to come."""
    session = Session(runner, 2, capacity=64, prefill_chunk=16)
    first, second = tokens(64), tokens(64, seed=1)
    session.prefill([first[:62], second[:1]])
    logits = session.prefill([first[62:], second[1:]])
    assert session.capacity == 64
    for b, prompt in enumerate((first, second)):
        np.testing.assert_allclose(logits[b], whole_prefill(runner, prompt)[0], atol=TOLERANCE)


def test_growing_keeps_the_results_and_grows_in_buckets(runner: Runner):
    prompt = tokens(1100)
    growing = Session(runner)
    capacities = [growing.capacity]
    for start in range(0, 1100, 100):
        logits = growing.prefill([prompt[start : start + 100]])
        capacities.append(growing.capacity)
    assert sorted(set(capacities)) == [256, 512, 1024, 2048]
    roomy = Session(runner, capacity=2048).prefill([prompt])
    np.testing.assert_allclose(logits, roomy, atol=TOLERANCE)


@pytest.mark.parametrize("most", [300, 1000, 4096])
def test_no_bucket_exceeds_what_the_engine_was_built_for(runners: dict[str, Runner], most: int):
    engine = runners["sparse"].engine
    engine = replace(engine, limits=replace(engine.limits, max_context=most))
    assert bucket(engine, most) == most and bucket(engine, 1) == 256
    assert buckets(engine) == [*(size for size in (256, 512, 1024, 2048) if size < most), most]


def test_caches_hold_the_largest_k_of_any_layer(runners: dict[str, Runner]):
    """The graph needs so many slots, whatever the engine was built for."""
    engine = runners["sparse"].engine
    assert bucket(replace(engine, topk=(16, 600)), 1) == 1024
    assert bucket(replace(engine, topk=(16, 5000)), 1) == 5000


def test_growing_keeps_what_the_longest_row_holds(runner: Runner):
    prompts, more = [tokens(10), tokens(250, seed=1)], tokens(10, seed=2)
    session = Session(runner, 2)
    session.prefill(prompts)
    logits = session.prefill([more, more])
    assert session.capacity == 512
    for b, prompt in enumerate(prompts):
        np.testing.assert_allclose(logits[b], whole_prefill(runner, np.append(prompt, more))[0], atol=TOLERANCE)


def test_an_interrupt_while_the_caches_grow_leaves_an_empty_session(runner: Runner, monkeypatch: pytest.MonkeyPatch):
    session, prompt = Session(runner), tokens(40)
    session.prefill([tokens(250)])
    original = OrtRunner.copy

    def copy(self: OrtRunner, source: OrtCaches, target: OrtCaches, count: int, **options: bool) -> None:
        original(self, source, target, count, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OrtRunner, "copy", copy)
        session.prefill([tokens(10)])
    assert session.lengths.tolist() == [0]
    np.testing.assert_allclose(session.prefill([prompt]), whole_prefill(runner, prompt), atol=TOLERANCE)


def test_growing_recomputes_nothing(runner: Runner, monkeypatch: pytest.MonkeyPatch):
    session = Session(runner)
    session.prefill([tokens(250)])
    calls = []
    original = OrtRunner.run
    monkeypatch.setattr(
        OrtRunner, "run", lambda *arguments: (calls.append(arguments[2].shape), original(*arguments))[1]
    )
    session.prefill([tokens(10)])
    assert session.capacity == 512
    assert calls == [(1, 10)]


def test_caches_are_updated_in_place(runner: Runner):
    session = Session(runner)
    caches = session.caches
    pointers = {name: value.data_ptr() for name, value in caches.values.items()}
    assert pointers == {name: array.ctypes.data for name, array in caches.arrays.items()}
    session.prefill([tokens(5)])
    session.decode([1])
    assert session.caches is caches
    outputs = caches.binding.get_outputs()
    assert {value.data_ptr() for value in outputs} >= set(pointers.values())
    for name, array in caches.arrays.items():
        assert np.abs(array[:, :, :6]).sum(axis=(0, 1, 3)).all(), f"{name}: a written slot is empty"
        assert not array[:, :, 6:].any(), f"{name}: a slot behind the sequence was written"


def test_truncating_forgets(runner: Runner):
    prompt = tokens(40)
    session = Session(runner)
    session.prefill([tokens(300, seed=5)])
    session.truncate(0)
    np.testing.assert_allclose(session.prefill([prompt]), whole_prefill(runner, prompt), atol=TOLERANCE)
    for length in (41, -1):
        with pytest.raises(ValueError, match="cannot truncate"):
            session.truncate(length)


def test_greedy_generation_stops_at_the_end_token_and_streams(runner: Runner):
    prompts = [tokens(12), tokens(30, seed=1)]
    expected = []
    for prompt in prompts:
        answer: list[int] = []
        while len(answer) < 6:
            answer.append(int(whole_prefill(runner, np.array([*prompt, *answer])).argmax()))
            if answer[-1] == toy.END_OF_TEXT:
                break
        expected.append(answer)
    streamed: list[list[int]] = [[], []]
    answers = Session(runner, 2).generate(prompts, 6, lambda row, token: streamed[row].append(token))
    assert answers == expected == streamed


def test_an_end_token_ends_its_row_only(runner: Runner, monkeypatch: pytest.MonkeyPatch):
    session = Session(runner, 2)

    def next_tokens(*_: object) -> np.ndarray:
        session.lengths += 1
        logits = np.zeros((2, toy.V), np.float32)
        logits[0, toy.END_OF_TEXT] = 1
        logits[1, 7] = 1
        return logits

    monkeypatch.setattr(session, "prefill", next_tokens)
    monkeypatch.setattr(session, "decode", next_tokens)
    assert session.generate([[1], [2]], 3) == [[toy.END_OF_TEXT], [7, 7, 7]]


@pytest.fixture
def first_row_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sampler(sampling.Sampler):
        def __init__(self, settings: sampling.Sampling, row: int):
            super().__init__(settings)
            self.row = row

        def __call__(self, logits: np.ndarray) -> int:
            return toy.END_OF_TEXT if self.row == 0 else int(logits[: toy.END_OF_TEXT].argmax())

    monkeypatch.setattr(session_module, "Sampler", Sampler)


@pytest.mark.usefixtures("first_row_ends_at_once")
def test_a_row_that_has_ended_needs_no_room(runner: Runner):
    """Row 0 ends four tokens before the engine does, row 1 goes on for ten."""
    prompts = [tokens(toy.MAX_POSITIONS - 4), tokens(30, seed=1)]
    first, second = Session(runner, 2).generate(prompts, 10)
    assert first == [toy.END_OF_TEXT]
    session = Session(runner)
    answer = [int(session.prefill(prompts[1:])[0, : toy.END_OF_TEXT].argmax())]
    while len(answer) < 10:
        answer.append(int(session.decode(answer[-1:])[0, : toy.END_OF_TEXT].argmax()))
    assert second == answer


def test_a_row_that_fills_the_engine_ends_there_and_the_others_go_on(runner: Runner, monkeypatch: pytest.MonkeyPatch):
    """Four slots are left to row 0: four tokens of its answer, and the last, which is written to none."""
    monkeypatch.setattr(session_module, "Sampler", lambda *_: lambda logits: int(logits[: toy.END_OF_TEXT].argmax()))
    prompts = [tokens(toy.MAX_POSITIONS - 4), tokens(30, seed=1)]
    first, second = Session(runner, 2).generate(prompts, 10)
    assert [first] == Session(runner).generate(prompts[:1], 5) and len(first) == 5
    assert [second] == Session(runner).generate(prompts[1:], 10)
    assert Session(runner).generate(prompts[1:], 0) == [[]]


@pytest.mark.usefixtures("first_row_ends_at_once")
@pytest.mark.parametrize("lengths", [(5, 3), (3, 5)])
def test_a_row_that_has_ended_keeps_what_it_holds(runner: Runner, lengths: tuple[int, int]):
    prompts = [tokens(length, seed) for seed, length in enumerate(lengths)]
    alone, session = Session(runner), Session(runner, 2)
    alone.prefill(prompts[:1])
    session.generate(prompts, 6)
    session.truncate(list(lengths))
    np.testing.assert_allclose(session.decode([9, 9])[0], alone.decode([9])[0], atol=TOLERANCE)


def test_a_row_that_has_ended_keeps_what_it_answered(runner: Runner, monkeypatch: pytest.MonkeyPatch):
    """Its second token ends row 0: the first stays in the caches while row 1 goes on."""
    drawn = {0: iter([7, *[toy.END_OF_TEXT] * 5]), 1: iter([8] * 6)}
    monkeypatch.setattr(session_module, "Sampler", lambda _, row: lambda logits: next(drawn[row]))
    prompts = [tokens(5), tokens(3, seed=1)]
    session = Session(runner, 2)
    assert session.generate(prompts, 6) == [[7, toy.END_OF_TEXT], [8] * 6]
    session.truncate([6, 3])
    expected = whole_prefill(runner, np.array([*prompts[0], 7, 9]))
    np.testing.assert_allclose(session.decode([9, 9])[0], expected[0], atol=TOLERANCE)


def test_a_prompt_beyond_the_capacity_is_refused_before_anything_is_computed(runner: Runner):
    session = Session(runner)
    with pytest.raises(UserError, match=r"^4097 tokens do not fit into 4096 .*--max-context"):
        session.prefill([tokens(toy.MAX_POSITIONS + 1)])
    assert session.lengths.tolist() == [0]
    session.pretend(toy.MAX_POSITIONS)
    assert session.capacity == toy.MAX_POSITIONS
    with pytest.raises(UserError, match="do not fit"):
        session.decode([1])
    with pytest.raises(UserError, match=r"^row 1: 4097 tokens do not fit"):
        Session(runner, 2).prefill([tokens(3), tokens(toy.MAX_POSITIONS + 1)])


@pytest.mark.parametrize("token", [-1, toy.V])
def test_a_token_outside_the_vocabulary_is_refused(runner: Runner, token: int):
    with pytest.raises(UserError, match=r"token ids must lie in 0\.\.256"):
        Session(runner).prefill([[1, token]])


@pytest.mark.parametrize("rows", [0, 9])
def test_more_or_fewer_rows_than_the_engine_has_are_refused(runner: Runner, rows: int):
    with pytest.raises(UserError, match=f"built for 1 to 8 rows, not for {rows}"):
        Session(runner, rows)


def test_a_call_beyond_the_caches_never_reaches_the_runtime(runner: Runner):
    caches = runner.allocate(2, 32)
    with pytest.raises(ValueError, match="3 tokens after 30 exceed 32 slots"):
        runner.run(caches, np.zeros((2, 3), np.int64), np.array([30, 0]), np.array([3, 3]))


def test_the_prefill_chunk_is_halved_until_its_workspace_fits(runners: dict[str, Runner], monkeypatch):
    dense = runners["dense"].engine
    monkeypatch.setattr("engines.memory.WORKSPACE_BYTES", 2**20)
    chunk = chunk_tokens(dense, 128, batch=2, capacity=4096)
    need = 2 * dense.workspace_bytes_per_query(4096)
    assert chunk * need <= 2**20 < 2 * chunk * need
    assert chunk_tokens(dense, 64, batch=1, capacity=16) == 64
    assert Session(runners["dense"], 2, capacity=4096).chunk_tokens() == chunk


def test_an_engine_of_onnx_runtime_needs_no_torch(engines: Path):
    """Importing it takes four seconds of processor time and 300 MB."""
    code = f"""
import sys
from pathlib import Path
import bench.compare, bench.serving, engines.build, engines.generate, engines.serve
from engines.session import Session, open_runner
from engines.text import Text
runner = open_runner(Path({str(engines / "ort" / "sparse")!r}))
Session(runner).prefill([Text(runner.engine).encode("def f():")])
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
