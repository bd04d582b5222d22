"""What is said about the numbers: crossover, time to first token, sentence, peers, tables."""

from __future__ import annotations

import pytest

from bench import summary, tables
from tests.bench import records
from tests.bench.records import pair, peer


def test_the_crossover_is_interpolated():
    found = summary.crossover([(512, 0.5), (2048, 2.0), (8192, 3.0)])
    assert found.tokens == pytest.approx(1024)  # halfway in both logarithms
    assert found.text == "1,024 tokens (between 512 and 2,048)"
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


def test_the_sentence_says_when_the_machine_was_busy():
    calm, busy = (pair(30, 10, contention=share, context=n) for share, n in ((0.03, 8192), (0.4, 512)))
    assert "measure again" not in summary.sentence(summary.pairs(calm))
    assert "from running for up to 40% of their time" in summary.sentence(summary.pairs([*calm, *busy]))


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
    ours = [*pair(30, 10), *pair(30, 8, k=64), *pair(30, 2, phase="prefill"), *pair(30, 4, batch=4)]
    ((_, own),) = summary.against_peers([*ours, peer("a", 50)])
    assert own and own["ms_median"] == 8


def test_losses_and_crossovers_are_what_sparse_adds_and_where_it_is_faster():
    pairs = [pair(dense, 10, context=n) for dense, n in ((5, 512), (20, 2048))]
    for dense, sparse in pairs:
        dense["loss"], sparse["loss"] = 1.5, 1.75
    found = {table.title: table for table in tables.all_tables([record for both in pairs for record in both])}
    assert {row[7] for row in found["Agreement and loss"].rows} == {"+0.2500 ± 0.0100"}
    assert found["Crossover"].rows[0][-1] == "1,024 tokens (between 512 and 2,048)"


def test_every_table_has_full_rows():
    found = {table.title: table for table in tables.all_tables(records.everything())}
    assert all(len(row) == len(table.columns) for table in found.values() for row in table.rows)
    assert "ort, fp32, k = 512; dense: Attention" in found
    assert len(found["Crossover"].rows) == 8
    assert found["Peers"].rows[0][-1] == "5.00×"
    assert found["Not measured"].rows == [["tensorrt", "8,192", "needs a <GPU> & more"]]
