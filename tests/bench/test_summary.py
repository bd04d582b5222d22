"""What is said about the numbers: crossover, time to first token, sentence, peers, tables."""

from __future__ import annotations

import pytest

from bench import summary, tables
from bench.tables import Table
from tests.bench import records
from tests.bench.records import Record, pair, peer


def test_the_crossover_is_interpolated():
    found = summary.crossover([(512, 0.5), (2048, 2.0), (8192, 3.0)])
    assert found.tokens == pytest.approx(1024)  # halfway in both logarithms
    assert found.text == "1,024 tokens (between 512 and 2,048)"
    assert summary.crossover([(512, 0.5), (2048, 1.0)]).text == "2,048 tokens (between 512 and 2,048)"
    noisy = summary.crossover([(512, 1.1), (1024, 0.8), (2048, 0.9), (8192, 3.0)])
    assert noisy.tokens is not None and 2048 < noisy.tokens < 8192


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ([(512, 0.9), (2048, 0.8)], "none up to 2,048 tokens"),
        ([(512, 1.2), (2048, 0.8)], "none up to 2,048 tokens"),
        ([(512, 1.0), (2048, 1.8)], "below 512 tokens, the shortest measured"),
        ([(512, 1.3)], "at most 512"),
        ([(512, 0.7)], "none up to 512 tokens"),
    ],
)
def test_no_crossover_is_said_so(points, text):
    assert summary.crossover(points) == summary.Crossover(None, text)


def test_the_strongest_dense_side_counts():
    weak = {**records.timing("dense", 50), "core": "GroupQueryAttention", "strongest": False}
    (only,) = summary.pairs([weak, *pair(30, 10)])
    assert (only.dense["core"], only.sparse["speedup"]) == ("Attention", 3)


def test_options_of_the_selection_tell_pairs_apart():
    found = summary.pairs([*pair(30, 10), *pair(30, 8, selection={"index_pool": 4})])
    assert [(one.series[2], one.sparse["ms_median"]) for one in found] == [("512", 10), ("512, pool 4", 8)]


def test_a_series_is_called_by_what_tells_it_from_others():
    first, second = ("ort", "fp32", "512", 1), ("ort", "int4", "512", 4)
    assert summary.series_text(first, [first, second]) == "fp32, batch 1"
    assert summary.series_text(first, [first]) == ""


def test_a_series_is_of_one_phase_and_in_the_order_of_context():
    decoding = [*pair(20, 10, context=2048), *pair(5, 10, context=512)]
    prefill = [*pair(20, 10, context=2048, phase="prefill"), *pair(10, 20, context=4096, phase="prefill")]
    for phase, contexts in (("decode", [512, 2048]), ("prefill", [2048, 4096])):
        (line,) = summary.by_series(summary.pairs([*decoding, *prefill]), phase).values()
        assert [one.context for one in line] == contexts


def test_time_to_first_token_is_measured_or_summed():
    prefill = {"phase": "prefill", "queries": 100}
    measured = [{**record, "ttft_s": 7.0} for record in pair(30, 10, **prefill)]
    (found,) = summary.first_tokens(summary.pairs(measured))
    assert (found["dense_s"], found["sparse_s"], found["estimated"]) == (7, 7, False)
    weak = {**measured[0], "core": "GroupQueryAttention", "strongest": False, "ttft_s": 5.0}  # but first here
    (found,) = summary.first_tokens(summary.pairs([weak, *measured]))
    assert (found["dense_s"], found["sparse_s"]) == (5, 7)
    estimated = [*pair(100, 50, context=1000, **prefill), *pair(300, 100, context=3000, **prefill)]
    first, second = summary.first_tokens(summary.pairs(estimated))
    assert first["dense_s"] == pytest.approx(1.0)  # 1000 tokens at 1 ms each
    assert second["dense_s"] == pytest.approx(1.0 + 2000 * 0.002)  # then 1 to 3 ms each
    assert second["sparse_s"] == pytest.approx(0.5 + 2000 * 0.00075)
    assert second["estimated"]
    assert summary.first_tokens(summary.pairs(pair(30, 10, **prefill))) == []


def test_the_sentence_says_what_was_measured():
    assert summary.sentence(summary.pairs(pair(30, 10))) == (
        "At 8,192 tokens of context (batch 1, ort, fp32) one decoding step takes 30 ms dense (Attention) and 10 ms "
        "sparse (k = 512): 3.00× as fast where bytes and operations predict 4.50×; both prefer the same next token in "
        "97% of 32 cases."
    )
    slower = summary.sentence(summary.pairs(pair(8, 10, agreement=None, random_indexer=True)))
    assert "slower, at 0.80× the speed" in slower
    assert "the indexer is random, so only the timing means anything" in slower
    assert "prefer" not in slower


def test_the_sentence_is_about_the_best_of_several_pairs():
    best = pair(30, 6, precision="int4", speedup=5.0)
    said = summary.sentence(summary.pairs([*pair(30, 20, speedup=1.5), *best, *pair(30, 15, k=64, speedup=2.0)]))
    assert "6 ms sparse (k = 512, the best of 3 pairs): 5.00× as fast" in said and "int4" in said


def test_the_sentence_is_about_the_fewest_rows():
    said = summary.sentence(summary.pairs([*pair(30, 10, batch=4), *pair(30, 15, batch=1)]))
    assert "(batch 1, ort" in said and "15 ms sparse" in said


def test_the_sentence_is_about_decoding_if_there_is_any():
    decoding, prefill = pair(30, 10, context=512), pair(30, 10, context=8192, phase="prefill", queries=128)
    said = summary.sentence(summary.pairs([*prefill, *decoding]))
    assert said.startswith("At 512 tokens") and "one decoding step takes" in said
    assert "a prefill call of 128 tokens takes" in summary.sentence(summary.pairs(prefill))


def test_the_sentence_says_when_the_machine_was_busy():
    calm, busy = (pair(30, 10, contention=share, context=n) for share, n in ((0.03, 8192), (0.4, 512)))
    assert "measure again" not in summary.sentence(summary.pairs(calm))
    assert "from running for up to 40% of their time" in summary.sentence(summary.pairs([*calm, *busy]))
    said = summary.sentence(summary.pairs(pair(30, 10, contention=0.4, random_indexer=True)))
    assert "measure again" in said and "the indexer is random" in said


def test_peers_are_held_against_the_same_precision_and_context():
    ours = [*pair(30, 10), *pair(20, 5, precision="int4")]
    ours += pair(30, 1, precision="bf16", backend="torch", on_gpu=True)
    others = [peer("c", 50, context=512), peer("d", 50, precision="fp16"), peer("e", 50, precision="bf16")]
    found = summary.against_peers([*ours, peer("a", 50), peer("b", 50, precision="int4"), *others])
    assert [(theirs["peer"], own and (own["precision"], own["ms_median"])) for theirs, own in found] == [
        ("a", ("fp32", 10)),
        ("b", ("int4", 5)),
        ("c", None),
        ("d", None),
        ("e", None),  # ours of that precision ran on a GPU
    ]


def test_peers_are_held_against_the_fastest_engine_that_decodes_as_many_rows():
    ours = [*pair(7, 10), *pair(30, 8, k=64), *pair(30, 2, phase="prefill"), *pair(30, 4, batch=4)]
    ((_, own),) = summary.against_peers([*ours, peer("a", 50)])
    assert own and own["ms_median"] == 8


def titled(found: list[Record]) -> dict[str, Table]:
    return {table.title: table for table in tables.all_tables(found)}


def test_a_table_without_rows_is_left_out():
    found = titled(pair(30, 10, agreement=None))
    assert list(found) == ["ort, fp32, k = 512; dense: Attention", "Crossover", "Throughput and peak memory"]


def test_a_row_of_times_has_the_dense_side_first():
    dense, sparse = pair(30, 2.5, phase="prefill", queries=128, batch=4)
    sparse["floor_fraction"] = 0.25
    (table,) = tables.timing_tables(summary.pairs([dense, sparse]))
    times = ["30 (27–36)", "2.5 (2.2–3)", "12.00×", "4.50×", "50%, 25%"]
    assert table.rows == [["prefill 128", "4", "8,192", *times]]


def test_a_row_names_its_dense_side_where_the_strongest_changes():
    first, second = pair(30, 10), pair(20, 10, context=512)
    second[0]["core"] = "GroupQueryAttention"
    (table,) = tables.timing_tables(summary.pairs([*first, *second]))
    assert table.title == "ort, fp32, k = 512; dense: Attention or GroupQueryAttention (GQA)"
    assert (table.columns[-1], [row[-1] for row in table.rows]) == ("dense is", ["Attention", "GQA"])


def test_throughput_and_memory_have_the_dense_side_first():
    dense, sparse = pair(8, 0.5)
    dense["peak_mib"] = 2000.4
    del sparse["peak_mib"]
    (row,) = titled([dense, sparse])["Throughput and peak memory"].rows
    assert row == ["ort", "fp32", "512", "decode", "1", "8,192", "125", "2,000", "2,000", "–"]


def test_a_time_to_first_token_says_if_it_is_estimated():
    prefill = {"phase": "prefill", "queries": 100, "batch": 4}
    measured = [{**record, "ttft_s": 9.0} for record in pair(300, 100, context=3000, **prefill)]
    measured[1]["ttft_s"] = 3.0
    rows = titled([*pair(100, 50, context=1000, **prefill), *measured])["Time to first token"].rows
    assert rows == [
        ["ort", "fp32", "512", "4", "1,000", "≈ 1", "≈ 0.5", "2.00×"],
        ["ort", "fp32", "512", "4", "3,000", "9", "3", "3.00×"],
    ]


def test_scores_have_a_row_per_context_and_the_dense_side_first():
    agreement = {"loss_error": None, "top1": 0.9, "kl": 0.02, "tokens": 64}
    long = [*pair(30, 10, loss=1.0, agreement=agreement), *pair(30, 10, phase="prefill")]
    long[0]["loss"] = 1.25
    found = titled([*pair(9, 10, context=64, agreement=None), *pair(9, 10, context=512), *long])
    scores = ["1.2500", "1.0000", "-0.2500", "90.0%", "2.0e-02", "64"]
    first, second = found["Agreement and loss"].rows
    assert first[4] == "512" and second == ["ort", "fp32", "512", "1", "8,192", *scores]


def test_parts_of_a_step_that_an_engine_lacks_take_no_time():
    profile = {"kind": "profile", "precision": "int4", "k": 64, "context": 8192}
    dense = {**profile, "core": "Attention", "ms": {"core": 5.0, "head": 0.25}}
    sparse = {**profile, "core": "SparseAttention", "selection": {"index_pool": 4}, "ms": {"core": 1.0, "indexer": 2.0}}
    table = titled([dense, sparse])["Where the time goes"]
    assert table.columns[2:] == ("context", "core", "head", "indexer", "sum")
    assert [row[3:] for row in table.rows] == [["5", "0.25", "0", "5.25"], ["1", "0", "2", "3"]]
    assert table.rows[1][0] == "int4, k = 64, pool 4"


def test_a_peer_stands_beside_the_engine_that_it_is_held_against():
    rows = titled([*pair(30, 10), peer("a", 20), peer("b", 20, context=512, ttft_s=None)])["Peers"].rows
    assert rows[0] == ["a", "fp32", "8,192", "20 (20–20)", "50", "2", "100", "k = 512", "2.00×"]
    assert rows[1] == ["b", "fp32", "512", "20 (20–20)", "50", "–", "–", "none in this precision", "–"]


def test_what_was_not_measured_for_one_reason_is_one_row():
    case = {"kind": "skipped", "backend": "ort", "precision": "int4", "k": 64, "batch": 8, "reason": "no memory"}
    lacking = [{**case, "context": n} for n in (2048, 8192, 2048)]
    others = [{"kind": "skipped", "peer": "llama.cpp", "reason": "not installed"}]
    others += [{"kind": "skipped", "backend": "torch", "k": 64, "reason": "no profile"}]
    assert titled([*lacking, {**case, "context": 512, "reason": "failed"}, *others])["Not measured"].rows == [
        ["ort, int4, k = 64, batch 8", "2,048, 8,192", "no memory"],
        ["ort, int4, k = 64, batch 8", "512", "failed"],
        ["llama.cpp", "", "not installed"],
        ["torch, k = 64", "", "no profile"],
    ]


def test_losses_and_crossovers_are_what_sparse_adds_and_where_it_is_faster():
    pairs = [pair(dense, 10, context=n) for dense, n in ((5, 512), (20, 2048))]
    for dense, sparse in pairs:
        dense["loss"], sparse["loss"] = 1.5, 1.75
    found = titled([record for both in pairs for record in both])
    assert {row[7] for row in found["Agreement and loss"].rows} == {"+0.2500 ± 0.0100"}
    assert found["Crossover"].rows[0][-1] == "1,024 tokens (between 512 and 2,048)"


def test_every_table_has_full_rows():
    found = titled(records.everything())
    assert all(len(row) == len(table.columns) for table in found.values() for row in table.rows)
    assert "ort, fp32, k = 512; dense: Attention" in found
    assert len(found["Crossover"].rows) == 8
    assert found["Peers"].rows[0][-1] == "5.00×"
    assert found["Not measured"].rows == [["tensorrt", "8,192", "needs a <GPU> & more"]]
