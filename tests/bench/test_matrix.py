"""Which engines are compared, in which cases, and what a case must cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import floors, matrix
from bench.matrix import Case, Group, Wish
from dsa_export.cli import UserError
from engines.artifacts import open_engine
from plugins import cpu
from tests.engines import toy
from tests.engines.commands import copy_tree

PLENTY = 2**40


@pytest.fixture(scope="module")
def group(engines: Path) -> Group:
    found, _ = matrix.groups(matrix.discover([engines])[0])
    return found[0]


def wish(**changes: object) -> Wish:
    return replace(Wish([64], [1], ("decode", "prefill"), "prefill"), **changes)  # type: ignore[arg-type]


def narrowed(group: Group, side: str, **limits: int) -> Group:
    """With lower limits of the sparse engine, or of one of the dense ones."""
    first, *others = group.dense
    narrow = group.sparse if side == "sparse" else first
    narrow = replace(narrow, limits=replace(narrow.limits, **limits))
    return replace(group, sparse=narrow) if side == "sparse" else replace(group, dense=(narrow, *others))


def test_engines_are_found_and_paired(engines: Path, tmp_path: Path):
    copy_tree(engines / "ort" / "sparse", tmp_path / "deep" / "down" / "sparse")
    copy_tree(engines / "ort" / "sparse", tmp_path / "deep" / "sparse.partial")
    found, skips = matrix.discover([engines, tmp_path])
    assert len(found) == len(toy.DENSE_CORES) + 2 and not skips
    (pair,), alone = matrix.groups(found)
    assert (pair.backend, pair.precision, pair.k) == ("ort", "fp32", 16)
    assert list(pair.sides) == [*toy.DENSE_CORES, "SparseAttention"]
    assert [skip["engine"] for skip in alone] == [str(tmp_path / "deep" / "down" / "sparse")]
    assert alone[0]["reason"].startswith(f"selects as {pair.sparse.folder} does")
    none, alone = matrix.groups(matrix.discover([tmp_path])[0])
    assert not none
    assert alone[0]["reason"] == "no dense engine of the same weights"


def test_engines_of_two_models_are_not_mixed_in_one_table(group: Group):
    other = replace(group.sparse, folder=Path("other/sparse"))
    matrix.check_comparable([group, replace(group, sparse=replace(other, topk=(8, 8)))])
    with pytest.raises(UserError, match=r"sparse and other/sparse are .* both ort, fp32, k = 16"):
        matrix.check_comparable([group, replace(group, sparse=other)])


@pytest.mark.skipif(not cpu.fast_here(), reason="this processor has no AVX2")
def test_a_sparse_engine_meets_the_dense_ones_that_cache_as_it_does(engines: Path):
    """Or, of an operator that no engine with such caches has, the one as exported."""
    found, _ = matrix.discover([engines])
    halved = [
        replace(engine, folder=engine.folder / "half", selection=engine.selection | {"kv_cache": "fp16"})
        for engine in found
        if matrix.core_of(engine) in ("SparseAttention", "DenseAttention")
    ]
    groups, skips = matrix.groups([*found, *halved])
    assert not skips and len(groups) == 2
    for group in groups:
        caches = {core: engine.kv_cache for core, engine in group.sides.items()}
        own = group.sparse.kv_cache
        assert caches == {"Attention": None, "GroupQueryAttention": None, "DenseAttention": own, "SparseAttention": own}
    assert {group.name for group in groups} == {"ort, fp32, k = 16", "ort, fp32, k = 16, kv cache fp16"}


def test_models_that_read_other_tokens_are_not_compared(group: Group):
    larger = replace(group.sparse, topk=(8, 8), model=replace(group.sparse.model, vocab_size=9))
    files = group.sparse.manifest["files"] | {"tokenizer.json": {"sha256": "another"}}
    other = replace(group.sparse, topk=(8, 8), manifest=group.sparse.manifest | {"files": files})
    for engine in (larger, other):
        with pytest.raises(UserError, match="engines of different models, or have different tokenizers: compare each"):
            matrix.check_comparable([group, replace(group, sparse=engine)])


def test_an_engine_of_another_version_is_skipped_with_the_reason(engines: Path, tmp_path: Path):
    copy_tree(engines, tmp_path / "engines")
    path = tmp_path / "engines" / "ort" / "dense" / "manifest.json"
    path.write_text(path.read_text().replace('"runtime": "1.', '"runtime": "0.'))
    found, skips = matrix.discover([tmp_path])
    others = sorted({*toy.DENSE_CORES.values(), "sparse"} - {"dense"})
    assert [engine.folder.name for engine in found] == others
    assert "was built with ort 0." in skips[0]["reason"]
    path.write_text('{"kind": "engine"}')
    found, skips = matrix.discover([tmp_path])
    assert len(found) == len(others) and skips[0]["engine"] == str(path.parent)


def test_cases_share_capacity_and_chunk(group: Group):
    planned, skips = matrix.plan(group, wish(contexts=[64, 8, 64], batches=[2, 1]), PLENTY)
    assert [(case.phase, case.batch, case.context) for case in planned] == [
        (phase, batch, context) for batch in (1, 2) for context in (8, 64) for phase in ("decode", "prefill")
    ]
    assert not skips
    assert {case.capacity for case in planned if case.context == 8} == {16}  # k
    assert [case.queries for case in planned if case.phase == "prefill"] == [8, 64] * 2
    assert all(case.queries == 1 for case in planned if case.phase == "decode")
    assert {case.phase for case in matrix.plan(group, wish(phases=("decode",)), PLENTY)[0]} == {"decode"}


@pytest.mark.parametrize("side", ["dense", "sparse"])
def test_a_prefill_call_is_one_that_every_engine_takes(group: Group, side: str):
    (case,), _ = matrix.plan(narrowed(group, side, prefill_chunk=16), wish(phases=("prefill",)), PLENTY)
    assert case.queries == 16


def test_default_contexts_are_affordable(group: Group):
    assert matrix.default_contexts(group, 4096, "prefill") == [512, 2048]
    heavy = replace(group.dense[0], manifest={"step_weights": 494_000_000})
    large = replace(group, dense=(heavy,))
    assert matrix.default_contexts(large, 32768, "prefill") == [512]
    assert matrix.default_contexts(large, 32768, "random") == [512, 2048, 8192, 32768]
    assert matrix.default_contexts(large, 100, "prefill") == [100]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"contexts": [5000]}, "beyond the engines' capacity of 4,096 tokens: build with --max-context"),
        ({"batches": [9]}, "built for 8 rows: build with --max-batch 9"),
        ({"prefill_up_to": 63}, "--quick prefills up to 63 tokens only"),
    ],
)
def test_what_cannot_run_is_skipped_with_a_reason(group: Group, changes: dict, reason: str):
    cases, skips = matrix.plan(group, wish(**changes), PLENTY)
    assert reason in skips[0]["reason"]
    assert [case.phase for case in cases] == (["decode"] if "prefill_up_to" in changes else [])


def test_a_quick_run_prefills_up_to_its_bound(group: Group):
    assert len(matrix.plan(group, wish(prefill_up_to=64), PLENTY)[0]) == 2


@pytest.mark.parametrize("side", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("limit", "reason"),
    [({"max_context": 63}, "beyond the engines' capacity of 63 tokens"), ({"max_batch": 1}, "built for 1 rows")],
)
def test_no_case_exceeds_what_one_engine_takes(group: Group, side: str, limit: dict, reason: str):
    cases, skips = matrix.plan(narrowed(group, side, **limit), wish(batches=[2], phases=("decode",)), PLENTY)
    assert not cases and reason in skips[0]["reason"]


def test_memory_is_estimated_before(group: Group):
    case = Case("decode", 2, 4096, 4096, 1)
    needed = matrix.memory_bytes(group.sides.values(), case, "random")
    cached = sum(2 * 4096 * engine.cache_bytes_per_token() for engine in group.sides.values())
    assert needed > cached + matrix.WORKSPACE_BYTES
    assert matrix.memory_bytes(group.sides.values(), case, "prefill") > needed  # grows by copying
    fits, _ = matrix.plan(group, wish(contexts=[4096], batches=[2], caches="random"), available=needed)
    assert fits
    fits, skips = matrix.plan(group, wish(contexts=[4096], batches=[2], caches="random"), available=needed - 1)
    assert not fits
    assert "GiB are free" in skips[0]["reason"]


def test_the_floor_counts_weights_once_and_caches_per_row(group: Group):
    for variant, engine in group.sides.items():
        one, two = (floors.call_bytes(engine, Case("decode", batch, 500, 500, 1)) for batch in (1, 2))
        assert two - one == engine.cache_bytes_read(500)
        assert one - engine.cache_bytes_read(500) == engine.manifest["step_weight_bytes"]
        assert one > floors.call_bytes(engine, Case("decode", 1, 100, 500, 1)), variant


def test_operations_of_a_call_are_counted_query_by_query(engines: Path):
    for variant in ("dense", "sparse"):
        engine = open_engine(engines / "ort" / variant)
        model = engine.model
        for context, queries in ((40, 1), (40, 30), (10, 10)):
            expected = 2 * model.hidden_size * model.vocab_size
            expected += 2 * (engine.manifest["step_weights"] - model.hidden_size * model.vocab_size) * queries
            for position in range(context - queries + 1, context + 1):
                attended = min(position, 16) if variant == "sparse" else position
                expected += model.layers * 4 * model.query_heads * model.head_dim * attended
                if variant == "sparse" and context > 16:
                    expected += model.layers * 2 * model.index_heads * model.index_dim * position
            assert floors.call_flops(engine, Case("prefill", 3, context, 64, queries)) == 3 * expected


@pytest.mark.parametrize(
    ("topk", "selection", "scored"),
    [
        ((16, 16), {}, 2 * 500),
        ((16, 16), {"index_share": 2}, 500),
        ((16, 16), {"index_pool": 4}, 2 * 500 // 4),
        ((16, 600), {}, 500),  # the second layer selects everything, and scores nothing
    ],
)
def test_an_indexers_operations_are_those_of_the_keys_that_it_scores(
    group: Group, topk: tuple[int, ...], selection: dict[str, int], scored: int
):
    engine = replace(group.sparse, topk=topk, selection=selection)
    model, attended = engine.model, sum(min(k, 500) for k in topk)
    rest = 2 * engine.manifest["step_weights"] + 4 * model.query_heads * model.head_dim * attended
    scores = floors.call_flops(engine, Case("decode", 1, 500, 1000, 1)) - rest
    assert scores == 2 * model.index_heads * model.index_dim * scored


def test_operations_are_those_of_dense_attention_while_caches_are_short(group: Group):
    engine = replace(group.sparse, manifest=group.sparse.manifest | {"dense_slots": 64})
    short, long = (floors.call_flops(engine, Case("decode", 1, 60, capacity, 1)) for capacity in (64, 65))
    weights, each = 2 * engine.manifest["step_weights"], 4 * engine.model.query_heads * engine.model.head_dim
    assert short == weights + engine.model.layers * each * 60
    assert long == floors.call_flops(group.sparse, Case("decode", 1, 60, 65, 1)) < short


def test_what_selects_without_an_indexer_scores_nothing(group: Group):
    sparse = group.sparse
    cache = tuple(tensor for tensor in sparse.cache if tensor.name in ("key", "value"))
    without, case = replace(sparse, cache=cache), Case("decode", 1, 500, 1000, 1)
    scores = sparse.model.layers * 2 * sparse.model.index_heads * sparse.model.index_dim * 500
    assert floors.call_flops(sparse, case) - floors.call_flops(without, case) == scores


def test_a_floor_is_the_larger_of_both_times(group: Group):
    case = Case("decode", 1, 500, 500, 1)
    by_bytes = floors.floor(group.sparse, case, floors.Rates(1e9, 1e30, ""))
    by_flops = floors.floor(group.sparse, case, floors.Rates(1e30, 1e9, ""))
    assert by_bytes.ms == pytest.approx(by_bytes.bytes / 1e6)
    assert by_flops.ms == pytest.approx(by_flops.flops / 1e6)


def test_rates_are_what_was_moved_and_done_in_the_time_that_it_took(monkeypatch: pytest.MonkeyPatch):
    """Every floor and predicted speed-up is off by what a rate is off by, too little to be implausible."""

    def timed(call):
        call()
        return next(seconds)

    monkeypatch.setattr(floors, "timed", timed)
    monkeypatch.setattr(floors, "COPY_BYTES", 2**16)
    monkeypatch.setattr(floors, "TRIES", 1)
    monkeypatch.setattr(floors, "PRODUCT", 64)
    for summing, moved in ((0.25, 2**16 / 0.25), (0.5, 2 * 2**16 / 0.5)):  # a copy in 0.5 s moves twice as much
        seconds = iter([0.5, summing])
        assert floors.cpu_bandwidth(3) == 3 * moved
    for bits in (None, 4, 8):
        seconds = iter([1.0, 4.0])  # of 8 rows, and of 64
        assert floors.cpu_flops(1, bits) == 2 * 64**3 / 4


@pytest.mark.parametrize("precision", ["fp32", "int4", "int8"])
def test_rates_are_plausible(precision: str):
    measured = floors.rates("ort", "fp32", precision, 1)
    assert f"; {precision} product" in measured.how
    assert 1e8 < measured.bytes_per_s < 1e12
    assert 1e8 < measured.flops_per_s < 1e13
    assert np.isfinite(measured.flops_per_s)
