"""python -m train.evaluate: the ladder, the measurements beside it, k by layer, and what the command writes."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from transformers import Qwen2Config

from dsa_export.cli import UserError
from dsa_export.files import write_manifest
from dsa_export.model import load_model, load_tokenizer
from dsa_export.model.checkpoint import adapted_config, load_config
from train import evaluate as command
from train import ladder, plots, selection, tasks, timing
from train.allocation import allocate
from train.data import IGNORED, Windows
from train.ladder import (
    RUNGS,
    WINDOWS,
    Score,
    best_selection,
    full_selection_error,
    hidden_states,
    random_indexers,
    score,
    window_selection,
)
from train.losses import IndexerObserver
from train.selection import SelectionMeter
from train.study import Choice, Study

K, T = 8, 48


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an indexer that nothing has trained: 2 layers, 2 heads of size 16, k = 8."""
    folder = tmp_path_factory.mktemp("evaluate") / "ckpt"
    torch.manual_seed(3)
    load_model(tiny, index_heads=2, index_dim=16, index_topk=K).save_pretrained(folder)
    load_tokenizer(tiny).save_pretrained(folder)
    return folder


@pytest.fixture
def model(checkpoint: Path):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 250, (1, T), generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 48 tokens here a tile of the usual size holds all."""
    for module in (ladder, selection):
        monkeypatch.setattr(module, "ROWS", 16)


def windows(ids: torch.Tensor) -> Windows:
    return Windows(ids.int(), ids.int(), torch.tensor([ids.shape[1]] * len(ids)))


# ---------------------------------------------------------------- the rungs


def test_best_and_window_select_what_they_say(model, ids: torch.Tensor) -> None:
    traces = []
    model.train().sparse = False
    with torch.no_grad():
        model.model(ids, observer=lambda trace: traces.append(trace) or {})
    for t in traces:
        keys = t.k.repeat_interleave(2, dim=1)
        hidden = ~torch.ones(T, T, dtype=torch.bool).tril()
        mass = (t.q @ keys.transpose(-1, -2) * t.scale).masked_fill(hidden, -torch.inf).softmax(-1)[0]
        added = (mass * t.value_norms()[0, :, None]).square().sum(0)
        mass = mass.mean(0)
        output = best_selection(t, K, "output")[0]
        best, window = best_selection(t, K, "mean")[0], window_selection(t, K)[0]
        for row in range(T):
            expected = set(mass[row, : row + 1].topk(min(K, row + 1)).indices.tolist())
            assert set(best[row].tolist()) - {-1} == expected
            expected = set(added[row, : row + 1].topk(min(K, row + 1)).indices.tolist())
            assert set(output[row].tolist()) - {-1} == expected
            assert set(window[row].tolist()) - {-1} == set(range(max(0, row - K + 1), row + 1))


@pytest.mark.parametrize("rung", ["best", "output", "trained", "random", "window"])
def test_no_rung_sees_the_future_and_all_are_dense_when_k_covers_the_text(model, ids, rung: str) -> None:
    changed = ids.clone()
    changed[:, 30:] = (changed[:, 30:] + 5) % 240 + 3
    dense = hidden_states(model, ids, "dense", K)
    with random_indexers(model):
        before, after = (hidden_states(model, tokens, rung, [K, 5]) for tokens in (ids, changed))
        everything = hidden_states(model, ids, rung, T)
    torch.testing.assert_close(after[:30], before[:30], atol=1e-6, rtol=0)
    assert (before - dense).abs().max() > 1e-3
    torch.testing.assert_close(everything, dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"index_share": 2}, {"index_pool": 2}, {"index_keys": "int8"}, {"index_keys": "fp8"}], ids=str
)
@pytest.mark.parametrize("rung", ["dense", "best", "output", "trained", "window"])
@torch.no_grad()
def test_the_end_of_a_text_after_a_dense_prefix(checkpoint: Path, ids: torch.Tensor, rung: str, options: dict) -> None:
    """As in one pass in which the queries of the prefix select everything."""
    past = 30
    model = load_model(checkpoint, **options)
    study = Study(model, [rung], 1, 0, score_tokens=T - past)
    cache = study.prefix(model, ids)
    after = [hidden_states(model, ids[:, past:], rung, K, cache) for _ in range(2)]
    assert cache.lengths.tolist() == [past] and torch.equal(*after)

    def selector(trace) -> torch.Tensor:
        leader = model.model.layers[trace.layer - trace.layer % model.config.index_share].self_attn
        if rung in ("best", "output"):
            chosen = best_selection(trace, K, {"best": "mean"}.get(rung, rung))
        else:
            chosen = window_selection(trace, K) if rung == "window" else leader.reselect(trace)[0]
        everything = window_selection(trace, T)
        everything[:, past:] = -1
        everything[:, past:, : chosen.shape[-1]] = chosen[:, past:]
        return everything

    model.train().sparse = rung != "dense"
    model.set_topk(K)
    whole = model.model(ids, selector=selector).last_hidden_state[0]
    torch.testing.assert_close(after[0], whole[past:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"index_share": 2}, {"index_pool": 2}], ids=str)
def test_the_meter_after_a_prefix(checkpoint: Path, ids: torch.Tensor, options: dict) -> None:
    """The last query is the only one that both measure at this k."""
    model, k = load_model(checkpoint, **options), 32
    of_end, of_all = (Study(model, [], 24, 0, score_tokens=tokens) for tokens in (24, None))
    records = []
    for study, part in ((of_end, ids[:, -24:]), (of_all, ids)):
        meter = study.meter([k], maps=True)
        study.dense_states(part, meter, study.prefix(model, ids))
        records.append((meter.results(), meter.heads(), meter.maps))
    (ends, end_heads, end_maps), (alls, all_heads, all_maps) = records
    assert ends[0]["queries"] == alls[0]["queries"] == 1 and end_heads == all_heads
    for name in ("recall", "window", "best"):
        assert ends[0]["by_layer"][name] == pytest.approx(alls[0]["by_layer"][name], abs=1e-5)
    for name in ("mean_distance", "share_within_window", "coverage"):
        assert ends[0]["by_layer"][name] == alls[0]["by_layer"][name]
    assert all(torch.equal(end_maps[layer][-1], all_maps[layer][-1]) for layer in all_maps)


def test_random_indexers_are_new_repeatable_and_gone_afterwards(model) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    for _ in range(2):
        with random_indexers(model, seed=7):
            seen.append(model.model.layers[1].self_attn.indexer.q_proj.weight.clone())
    name = "model.layers.1.self_attn.indexer.q_proj.weight"
    assert torch.equal(*seen) and not torch.equal(seen[0], before[name])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_scores_are_the_definitions_on_labelled_tokens(model, ids: torch.Tensor) -> None:
    labels = ids[0].masked_fill(torch.arange(T) < 20, IGNORED)
    states = {"dense": hidden_states(model, ids, "dense", K), "window": hidden_states(model, ids, "window", K)}
    by_reference = score({"dense": model.lm_head}, states, labels, ("dense", "window"))
    scores, other_way = by_reference["dense"], by_reference["window"]
    with torch.no_grad():
        dense, window = (model.lm_head(states[name])[19:-1].log_softmax(-1) for name in ("dense", "window"))
    target = labels[20:]
    assert scores["window"].tokens == len(target) == 28
    loss = torch.nn.functional.nll_loss(window, target, reduction="sum")
    assert scores["window"].loss == pytest.approx(float(loss), rel=1e-5)
    kl = torch.nn.functional.kl_div(window, dense, reduction="sum", log_target=True)
    assert scores["window"].kl == pytest.approx(float(kl), rel=1e-4)
    assert scores["window"].agree == int((dense.argmax(-1) == window.argmax(-1)).sum())
    assert scores["dense"].kl == 0 and scores["dense"].agree == 28
    ((increase, reference),) = scores["window"].windows
    assert increase == pytest.approx(scores["window"].loss - scores["dense"].loss, rel=1e-4)
    assert reference == pytest.approx(scores["dense"].loss, rel=1e-5)
    assert scores["window"].increase_error is None  # one block tells no spread
    kl = torch.nn.functional.kl_div(dense, window, reduction="sum", log_target=True)
    assert other_way["dense"].kl == pytest.approx(float(kl), rel=1e-4) and other_way["window"].kl == 0
    assert other_way["dense"].windows[0] == pytest.approx((-increase, scores["window"].loss), rel=1e-4)


def test_scores_are_the_same_in_any_tiles(model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "BLOCK", 8)
    labels = ids[0].masked_fill(torch.arange(T) < 20, IGNORED)
    states = {rung: hidden_states(model, ids, rung, K) for rung in ("dense", "window")}
    once = score({"dense": model.lm_head}, states, labels)["dense"]
    monkeypatch.setattr(ladder, "HEAD_ROWS", 16)
    tiled = score({"dense": model.lm_head}, states, labels)["dense"]
    for rung, whole in once.items():
        for term, value in asdict(whole).items():
            got = torch.tensor(getattr(tiled[rung], term))
            torch.testing.assert_close(got, torch.tensor(value), rtol=1e-4, atol=1e-4)


def test_the_standard_error_of_an_increase_covers_the_truth() -> None:
    """Whole texts that have something in common: the error is that of the mean over other draws of them. Of fewer
    windows it is made of blocks, which know nothing of what a text has in common, and is too small."""

    def draw(windows: int, g: torch.Generator) -> Score:
        total = Score()
        for _ in range(windows):
            in_common = torch.randn((), generator=g)
            dense = 60 + 5 * torch.randn(16, generator=g)
            increases = dense * 0.02 + in_common + torch.randn(16, generator=g)
            blocks = [(float(one), float(base)) for one, base in zip(increases, dense, strict=True)]
            total += Score(blocks=blocks, windows=[(float(increases.sum()), float(dense.sum()))])
        return total

    def increase(one: Score) -> float:
        changes, bases = zip(*one.windows, strict=True)
        return sum(changes) / sum(bases)

    g = torch.Generator().manual_seed(0)
    for windows, least, most in ((40, 0.85, 1.15), (WINDOWS - 1, 0.1, 0.5)):
        draws = [draw(windows, g) for _ in range(200)]
        truth = torch.tensor([increase(one) for one in draws]).std()
        errors = torch.tensor([one.increase_error for one in draws])
        assert least * truth < errors.mean() < most * truth


def test_a_sparse_path_that_is_wrong_stops_the_evaluation(model, ids, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsa_export.model.attention import dsa

    right = dsa.masked_attention
    monkeypatch.setattr(dsa, "masked_attention", lambda q, k, v, i, scale: right(q, k, v, i, 1.1 * scale))
    with pytest.raises(UserError, match="with everything selected the logits differ from dense"):
        Study(model, ["trained"], 1, 0).text(windows(ids), [Choice("8", (K, K))])


# ---------------------------------------------------------------- what the indexers catch


def test_shares_are_those_of_the_training_loss(model, ids: torch.Tensor) -> None:
    """Two independent computations: sorted and summed at every k here, by top-k in the loss."""
    for k in (5, K, 20):
        meter = SelectionMeter(2, 2, [k], every=1)
        model.train().sparse = False
        with torch.no_grad():
            model.model(ids, observer=meter)
            expected = model.model(ids, observer=IndexerObserver(k, measure_every=1)).aux_losses
        [record] = meter.results()
        assert record["queries"] == T - k
        for ours, theirs in (("recall", "recall"), ("window", "recall_window"), ("best", "recall_best")):
            assert record[ours] == pytest.approx(float(expected[theirs]), abs=1e-5)


def test_selection_statistics(model, ids: torch.Tensor) -> None:
    traces = []
    model.train()
    model.sparse = False
    meter = SelectionMeter(2, 2, [K], every=1, map_layers=[1])
    with torch.no_grad():
        model.model(ids, observer=meter)
        model.sparse = True
        model.set_topk(K)
        model.model(ids, observer=lambda trace: traces.append(trace) or {})
    by_layer = meter.results()[0]["by_layer"]
    chosen = traces[0].indices[0, K:]  # layer 0 sees the same hidden states in both runs
    distance = torch.arange(K, T)[:, None] - chosen
    assert by_layer["mean_distance"][0] == pytest.approx(float(distance.float().mean()), rel=1e-5)
    assert by_layer["coverage"][0] == pytest.approx(len(set(chosen.flatten().tolist())) / T)
    assert by_layer["share_within_window"][0] == pytest.approx(float((distance < K).float().mean()))
    curve = meter.caught()
    assert (curve.diff(dim=1) >= -1e-6).all() and torch.allclose(curve[:, -1], torch.ones(2).double(), atol=1e-5)
    assert set(meter.maps) == {1} and meter.maps[1].shape == (T, T)
    assert meter.maps[1].sum(1).tolist() == [min(K, row + 1) for row in range(T)]
    shares = torch.tensor(meter.heads()["shares"])
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 2))

    exact, under_autocast = (SelectionMeter(2, 2, [K], every=1) for _ in range(2))
    for trace in traces:
        exact(trace)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast(trace)
    assert under_autocast.results() == exact.results()


@torch.no_grad()
def test_a_shorter_text_has_caught_everything_beyond_its_end(model, ids) -> None:
    meter = SelectionMeter(2, 2, [K], 1)
    model.sparse = False
    for text in (ids, ids[:, : T // 2]):
        model.model(text, observer=meter)
    torch.testing.assert_close(meter.caught()[:, -1], torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("every", "shorter"), [(K, 2 * K - 1), (K + 4, K + 3)])
def test_a_text_of_which_no_query_counts_does_not_dilute_the_coverage(model, ids, every: int, shorter: int) -> None:
    """It is longer than k, but its only measured query sees no more than k keys, or there is none."""
    model.sparse = False
    once, with_shorter = (SelectionMeter(2, 2, [K], every) for _ in range(2))
    model.model(ids, observer=once)
    for text in (ids, ids[:, :shorter]):
        model.model(text, observer=with_shorter)
    assert with_shorter.results() == once.results()


# ---------------------------------------------------------------- k by layer


def test_the_budget_goes_where_it_catches_most() -> None:
    k = torch.arange(1, 65) / 64
    caught = torch.stack([k, k**0.1, k**0.5])  # layer 1 has caught most with the first keys
    ks = allocate(caught, 24, step=8, floor=8)
    assert sum(ks) == 3 * 24 and all(k % 8 == 0 for k in ks)
    assert ks[1] == 8 and ks[0] > ks[2] > 8

    def mass(ks: list[int]) -> float:
        return sum(float(caught[layer, k - 1]) for layer, k in enumerate(ks))

    others = [[a, b, 72 - a - b] for a in range(8, 65, 8) for b in range(8, 65, 8) if 8 <= 72 - a - b <= 64]
    assert mass(ks) == pytest.approx(max(mass(other) for other in others))
    assert allocate(caught, 64, step=8, floor=8) == [64, 64, 64]
    most_for_two = torch.stack([k, k, k**0.1])  # but there is room for one layer only
    assert allocate(most_for_two, 12, step=8, floor=8, share=2) == [8, 8, 16]
    first, second, third = allocate(caught, 24, step=8, floor=8, share=2)  # the last group has one layer
    assert first == second > 8 and (first, third) == max(
        ((a, b) for a in range(8, 65, 8) for b in range(8, 65, 8) if 2 * a + b <= 72),
        key=lambda ab: mass([ab[0], ab[0], ab[1]]),
    )


# ---------------------------------------------------------------- the command


def arguments(checkpoint: Path, records: Path, out: Path, *more: str) -> list[str]:
    small = ["--length", "96", "--windows", "2", "--min-tokens", "1", "--device", "cpu"]
    return ["--model", str(checkpoint), "--data", str(records), "--out", str(out), *small, *more]


def test_the_command_writes_tables_json_and_pictures(checkpoint, tiny, records, tmp_path: Path, capsys) -> None:
    out, by_layer = tmp_path / "evaluation", tmp_path / "by-layer"
    options = ["--k", "12", "auto", "--k-budget", "24", "--k-step", "4", "--write-topk", str(by_layer)]
    options += ["--index-pool", "2", "--base", str(tiny)]
    options += ["--tasks", "passkey", "--task-lengths", "400", "--samples", "1"]
    command.main(arguments(checkpoint, records, out, *options))
    shown = capsys.readouterr().out
    assert (
        "Everything selected equals dense" in shown
        and "dense, base" in shown
        and "vs base" in shown
        and "passkey" in shown
    )

    assert json.loads((out / "manifest.json").read_text())["kind"] == "evaluation"
    results = json.loads((out / "results.json").read_text())
    [text] = results["text"]
    rows = {(row["rung"], json.dumps(row["k"])): row for row in text["ladder"]}
    chosen = results["auto"]["topk"]
    assert sum(chosen) <= 2 * 24 and all(k % 4 == 0 for k in chosen)
    assert {rung for rung, _ in rows} == {"best", "output", "trained", "random", "window", "auto"}
    assert ("auto", json.dumps(chosen)) in rows and ("window", "24") in rows
    assert rows["best", "24"]["kl"] < rows["trained", "24"]["kl"]
    assert text["base"]["loss"] == pytest.approx(text["dense"]["loss"], rel=1e-6), "nothing was trained: no drift"
    for row in (text["dense"], *text["ladder"]):
        assert row["from_base"]["kl"] == pytest.approx(row["kl"], rel=1e-4, abs=1e-6)
        assert row["from_base"]["increase"] == pytest.approx(row["increase"], rel=1e-4, abs=1e-6)
    assert text["full_selection"]["max_abs_error"] < 1e-3
    assert [record["k"] for record in text["attention"]] == [12, 24]
    assert results["tasks"][0]["answers"][0]["prompt_tokens"] <= 400
    for name in ("loss", "recall", "heads", "maps", "tasks"):
        assert (out / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    weights = [folder / "model.safetensors" for folder in (checkpoint, by_layer)]
    assert weights[0].stat().st_ino == weights[1].stat().st_ino
    written = load_model(by_layer).config
    assert (list(written.topk_per_layer), written.index_pool) == (chosen, 2), "chosen with this option"
    load_tokenizer(by_layer)
    assert load_model(checkpoint).config.index_topk == K


def test_no_layer_has_fewer_keys_than_are_always_selected(checkpoint, records, tmp_path: Path) -> None:
    options = ["--index-sinks", "2", "--index-window", "4", "--k", "auto", "--k-budget", "24", "--k-step", "4"]
    command.main(arguments(checkpoint, records, tmp_path / "out", *options, "--rungs", "trained"))
    assert min(json.loads((tmp_path / "out" / "results.json").read_text())["auto"]["topk"]) >= 8


def test_layers_that_follow_one_selection_are_measured_and_have_one_k(checkpoint, records, tmp_path: Path) -> None:
    options = ["--index-share", "2", "--k", "auto", "--k-budget", "24", "--k-step", "4", "--rungs", "trained"]
    command.main(arguments(checkpoint, records, tmp_path / "out", *options))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["auto"]["topk"] == [24, 24]
    [attention] = results["text"][0]["attention"]
    first, follower = attention["by_layer"]["recall"]
    assert first != follower and attention["recall"] == pytest.approx((first + follower) / 2)


def test_the_text_is_chosen_as_the_arguments_say(checkpoint, records, tmp_path: Path, monkeypatch) -> None:
    seen: list[dict] = []

    def load(source: str, _: object, length: int, **options: object) -> None:
        seen.append({"source": source, "length": length, **options})
        raise UserError("enough")

    monkeypatch.setattr(command, "load_data", load)
    more = ["--k", "12", "--seed", "3", "--packing", "cut", "--min-tokens", "9"]
    with pytest.raises(UserError, match="enough"):
        command.main(arguments(checkpoint, records, tmp_path / "out", *more))
    chosen = {"source": str(records), "length": 96, "held_out_windows": 2, "train_windows": 0}
    chosen |= {"allow_malformed": False, "scored": None}
    assert seen == [{**chosen, "min_tokens": 9, "packing": "cut", "seed": 3}]


PIECES = ["--length", "48", "96", "--k", "12", "auto", "--k-budget", "24", "--k-step", "4", "--rungs", "trained"]
PIECES += ["--tasks", "passkey", "--task-lengths", "400", "--samples", "1"]


def one_piece_a_run(patch: pytest.MonkeyPatch) -> list[str]:
    """Interrupts every run of the command at its second piece. The list tells what was measured."""
    measured: list[str] = []
    before = [0]

    def limited(name: str):
        original = getattr(Study, name)

        def piece(*arguments):
            if len(measured) > before[0]:
                before[0] = len(measured)
                raise KeyboardInterrupt
            result = original(*arguments)
            measured.append(name)
            return result

        return piece

    for name in ("caught", "text", "task"):
        patch.setattr(Study, name, limited(name))
    return measured


def without_times(results: Path) -> dict:
    found = json.loads((results / "results.json").read_text())
    for record in found["text"]:
        del record["tokens_per_s_dense"], record["tokens_per_s_sparse"]
    return found


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than all else."""
    for name in ("losses", "recall", "heads", "maps", "tasks"):
        monkeypatch.setattr(plots, f"plot_{name}", lambda *arguments: arguments[-1].touch())


@pytest.mark.usefixtures("no_pictures")
def test_a_stopped_run_goes_on_to_the_same_results(checkpoint, records, tmp_path: Path, capsys) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command.main(arguments(checkpoint, records, whole, *PIECES))
    with pytest.MonkeyPatch.context() as patch:
        measured = one_piece_a_run(patch)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt, match=r"kept in .*cut\.partial: the same command goes on"):
                command.main(arguments(checkpoint, records, cut, *PIECES))
            assert not cut.exists()
        capsys.readouterr()
        command.main(arguments(checkpoint, records, cut, *PIECES))
    assert measured == ["caught", "text", "text", "task"]
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("Going on", "k by layer", "48 tokens,", "96 tokens,", "passkey"))
    assert without_times(cut) == without_times(whole)
    assert {path.name for path in cut.iterdir()} == {path.name for path in whole.iterdir()}
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("no_pictures")
def test_k_by_layer_is_chosen_on_text_that_the_ladder_does_not_see(checkpoint, records, tmp_path, monkeypatch) -> None:
    seen: dict[str, Windows] = {}

    def watched(name: str):
        original = getattr(Study, name)
        return lambda study, windows, *rest: (seen.update({name: windows}), original(study, windows, *rest))[1]

    for name in ("caught", "text"):
        monkeypatch.setattr(Study, name, watched(name))
    more = ["--k", "auto", "--k-budget", "24", "--k-step", "4", "--rungs", "trained"]
    command.main(arguments(checkpoint, records, tmp_path / "out", *more))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["auto"]["chosen_on"] == seen["caught"].sha256() != seen["text"].sha256()


@pytest.mark.usefixtures("no_pictures")
def test_only_the_end_of_each_window_is_scored(checkpoint, tiny, records, tmp_path: Path, capsys) -> None:
    more = ["--k", "12", "--score-tokens", "17", "--dtype", "bf16", "--base", str(tiny)]
    command.main(arguments(checkpoint, records, tmp_path / "out", *more))
    assert "2 windows, 32 predictions, the last 17 tokens of each" in capsys.readouterr().out
    (text,) = json.loads((tmp_path / "out" / "results.json").read_text())["text"]
    assert text["score_tokens"] == 17 and text["base"]["loss"] == pytest.approx(text["dense"]["loss"], rel=0.01)
    assert [row["rung"] for row in text["ladder"]] == [rung for rung in RUNGS if rung != "random"]
    assert text["attention"][0]["queries"] == 2 * 17


@pytest.mark.parametrize("options", [["--score-tokens", "17"], ["--packing", "cut", "--length", "400"]], ids=str)
def test_the_maps_say_where_their_keys_and_queries_stand(
    checkpoint, records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    figures: dict[str, Figure] = {}
    first: list[int] = []
    text = Study.text
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.update({path.name: figure}))
    monkeypatch.setattr(Study, "text", lambda *given: (first.append(int(given[1].lengths[0])), text(*given))[1])
    command.main(arguments(checkpoint, records, tmp_path / "out", "--k", "12", "--rungs", "trained", *options))
    (length,) = first
    start = length - 17 if "17" in options else 0
    assert length < 400  # the window's own
    assert {(*axes.get_xlim(), *axes.get_ylim()) for axes in figures["maps.png"].axes} == {(0, length, length, start)}


@pytest.mark.usefixtures("no_pictures")
def test_every_rung_runs_in_bf16(checkpoint, records, tmp_path: Path) -> None:
    losses = []
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        command.main(arguments(checkpoint, records, out, "--k", "12", "--dtype", dtype))
        (text,) = json.loads((out / "results.json").read_text())["text"]
        losses.append([row["loss"] for row in text["ladder"]])
    assert len(losses[0]) == len(RUNGS) and losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.usefixtures("no_pictures")
def test_what_another_run_left_is_not_reused(checkpoint, records, tmp_path: Path) -> None:
    folder, out = tmp_path / "ckpt", tmp_path / "out"
    shutil.copytree(checkpoint, folder)
    short = ["--rungs", "trained", "--k", "12"]

    def run(*more: str) -> None:
        command.main(arguments(folder, records, out, *short, *more))

    with pytest.MonkeyPatch.context() as patch:
        one_piece_a_run(patch)
        with pytest.raises(KeyboardInterrupt):
            run("--length", "48", "96")
    with pytest.raises(UserError, match=r"out\.partial holds an unfinished run .*windows: 2 there, 1 now.*--overwrite"):
        run("--length", "48", "96", "--windows", "1")
    model = load_model(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"source\.sha256: "):
        run("--length", "48", "96")
    [kept] = json.loads((tmp_path / "out.partial" / "results.json").read_text())["text"]
    run("--length", "48", "96", "--overwrite")
    again = json.loads((out / "results.json").read_text())["text"][0]
    assert again["length"] == kept["length"] and again["dense"]["loss"] != pytest.approx(kept["dense"]["loss"])


def test_what_is_lost_from_the_base_is_held_against_the_base(model, tiny, ids) -> None:
    base = load_model(tiny, attention="dense").train()
    with torch.no_grad():
        base.lm_head.weight.mul_(0.5)
    record, _ = Study(model, ["trained"], 1, 0, base).text(windows(ids), [Choice(str(K), (K, K))])
    assert record["base"]["loss"] != pytest.approx(record["dense"]["loss"], rel=0.01)
    for row in (record["dense"], *record["ladder"]):
        assert row["from_base"]["increase"] == pytest.approx(row["loss"] / record["base"]["loss"] - 1)


@pytest.mark.parametrize(
    "options", [{"index_keys": "fp8"}, {"index_keys": "int8"}, {"index_pool": 4, "index_share": 2}]
)
def test_decoding_is_timed_with_every_kind_of_cache(checkpoint, options: dict) -> None:
    model = load_model(checkpoint, **options)
    seen = set()
    model.model.embed_tokens.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):  # as an evaluation in bf16 calls it
        speeds = timing.decoding_speed(model, T)
    assert set(speeds) == {"tokens_per_s_dense", "tokens_per_s_sparse"} and min(speeds.values()) > 0
    assert seen == {False}


def test_speeds_are_tokens_per_second(model, monkeypatch) -> None:
    monkeypatch.setattr(timing, "in_turn", lambda calls, _: dict.fromkeys(calls, 4.0))
    assert set(timing.decoding_speed(model, T).values()) == {250.0}


def test_decoding_is_timed_behind_all_tokens_each_time(model, monkeypatch) -> None:
    call, seen = timing.decode_call(model, T), []
    monkeypatch.setattr(model, "forward", lambda _, cache, **__: seen.append((cache.lengths.tolist(), cache.columns)))
    for _ in range(2):
        call()
    assert seen == [([T], T)] * 2


def test_a_task_is_answered_once_where_everything_is_selected(model, tokenizer, monkeypatch) -> None:
    asked: list[bool] = []

    def answer(model, *_: object) -> tuple[list[int], float]:
        asked.append(model.sparse)
        return tokenizer.encode("no idea"), 2.0 + model.sparse

    monkeypatch.setattr(tasks, "answer", answer)
    choices = [Choice(str(k), (k, k)) for k in (K, 400)]
    few, all_selected = Study(model, ["trained"], 1, 0).task("passkey", 400, 1, choices, tokenizer)
    assert asked == [False, True] and all_selected["k"] == "400"
    assert few["answers"][0]["answers"]["dense"] == few["answers"][0]["answers"]["400"]
    assert [few["dense_nats"], few["sparse_nats"], all_selected["sparse_nats"]] == [2, 3, 2]


def test_two_seeds_ask_different_questions(model, tokenizer, monkeypatch) -> None:
    asked: list[int] = []
    original = tasks.fit
    monkeypatch.setattr(tasks, "fit", lambda *given: asked.append(given[3]) or original(*given))
    monkeypatch.setattr(tasks, "answer", lambda *_: ([5], 2.0))
    for seed in (0, 1):
        Study(model, ["trained"], 1, seed).task("passkey", 400, 5, [Choice(str(K), (K, K))], tokenizer)
    assert len(set(asked)) == 10


def test_a_k_by_layer_that_is_one_of_the_others_counts_once(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tasks, "answer", lambda model, *_: ([5], 2.0 + model.sparse))
    monkeypatch.setattr(tasks, "recall", lambda *_: 1.0)
    choices = [Choice(str(K), (K, K)), Choice("auto", (K, K))]
    (record,) = Study(model, ["trained"], 1, 0).task("passkey", 400, 2, choices, tokenizer)
    assert (record["k"], record["sparse"], record["sparse_nats"]) == (str(K), 1, 3)


def test_every_k_is_asked_the_samples_of_the_seed(model, tokenizer, monkeypatch) -> None:
    asked: list[tuple] = []

    def answer(model, prompt: torch.Tensor, *_: object) -> tuple[list[int], float]:
        asked.append((model.sparse and model.config.topk_per_layer, prompt[0].tolist()))
        return [5], 0.0

    monkeypatch.setattr(tasks, "answer", answer)
    choices = [Choice("8", (8, 8)), Choice("auto", (8, 16))]
    Study(model, ["trained"], 1, 7).task("passkey", 400, 1, choices, tokenizer)
    _, prompt = tasks.fit("passkey", 400, tokenizer, 7 * 1_000_003)
    assert asked == [(False, prompt), ((8, 8), prompt), ((8, 16), prompt)]


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ([], {"length": [512], "windows": 4, "every": 1, "ks": [32, 64, 128], "tasks": [], "samples": 5}),
        (["--quick"], {"windows": 2, "ks": [64], "tasks": ["passkey", "kv"], "samples": 1, "task_lengths": [512]}),
        (["--length", "1024"], {"every": 1, "ks": [64, 128, 256]}),
        (["--length", "2048"], {"every": 8, "ks": [128, 256, 512], "rungs": list(RUNGS)}),
        (["--length", "2048", "--score-tokens", "512"], {"every": 1, "rungs": [r for r in RUNGS if r != "random"]}),
        (["--length", "4096", "--score-tokens", "2000"], {"every": 8}),
        (["--length", "96", "2048", "--topk", "95"], {"every": 8, "ks": [95]}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_left_out_is_filled_as_the_help_says(checkpoint, given: list[str], resolved: dict) -> None:
    config = load_config(checkpoint)
    config.max_position_embeddings = 4096
    args = command.parser().parse_args(["--model", str(checkpoint), "--device", "cpu", *given])
    command.resolve(args, config)
    assert {name: getattr(args, name) for name in resolved} == resolved


@pytest.mark.parametrize(
    ("options", "ks"),
    [
        ({"index_sinks": 4, "index_window": 32, "index_topk": 40}, [36, 64, 128]),
        ({"index_pool": 3, "index_topk": 63}, [30, 63, 126]),
        ({"index_pool": 40, "index_topk": 80}, [40, 120]),
    ],
    ids=str,
)
def test_what_is_left_out_fits_the_checkpoints_selection(checkpoint, options: dict, ks: list[int]) -> None:
    config = load_config(checkpoint)
    for name, value in options.items():
        setattr(config, name, value)
    args = command.parser().parse_args(["--model", str(checkpoint), "--device", "cpu"])
    command.resolve(args, config)
    assert args.ks == ks


AUTO = ["--k", "auto", "--k-budget", "24"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--topk", "many"], "--topk takes whole numbers and `auto`"),
        (["--topk", "0"], "--topk must be at least 1"),
        (["--topk", "96"], "leaves nothing out of 96 tokens"),
        (["--length", "9999"], "beyond the model's 512 positions"),
        (["--k-budget", "9"], "--k-budget needs --topk auto"),
        (["--samples", "9"], "--samples needs --tasks"),
        (["--k", "auto", "--k-budget", "200"], "leaves nothing to choose"),
        ([*AUTO, "--k-step", "3", "--index-pool", "4"], "multiple of the pool of 4"),
        ([*AUTO, "--index-window", "5", "--k-floor", "3"], "--k-floor 3 does not fit the options"),
        ([*AUTO, "--k-step", "16", "--k-floor", "24"], "--k-floor 24 must be a multiple of --k-step 16"),
        ([*AUTO, "--k-step", "32"], "--k-budget 24 is less than --k-floor 32, one --k-step unless given"),
        ([*AUTO, "--write-topk", "new", "--index-share", "2"], "--write-topk keeps the checkpoint's weights"),
        ([*AUTO, "--write-topk", "MODEL"], "would replace --model"),
        ([*AUTO, "--write-topk", "OUT"], "lies in --out"),
        ([*AUTO, "--write-topk", "OUT/topk"], "lies in --out"),
        ([*AUTO, "--write-topk", "OUT/.."], "would replace --out"),
        (["--base", ""], "--base is empty"),
        (["--base", "ONNX"], "holds 'onnx', not a checkpoint"),
        (["--base", "OTHER"], "has another vocabulary than"),
        (["--score-tokens", "96"], "--score-tokens 96 must be at least 2 and less than --length 96"),
        (["--score-tokens", "9", "--packing", "cut"], "--score-tokens needs --packing pack"),
        (["--score-tokens", "9", "--rungs", "random"], "--score-tokens excludes the rung random"),
        (["--index-pool", "7"], "pool must be at least 1 and divide k = 8"),
        (["--model", "TINY"], "has no indexer: run `python -m train.warmup"),
        (["--tasks", "kv", "--task-lengths", "60"], "too short for the task kv"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    checkpoint, tiny, records, tmp_path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    names = {"TINY": str(tiny), "MODEL": str(checkpoint), "OUT": str(tmp_path / "out")}
    names |= {"ONNX": str(tmp_path / "onnx"), "OTHER": str(tmp_path / "other")}
    (tmp_path / "onnx").mkdir()
    write_manifest(tmp_path / "onnx", "onnx", {})
    Qwen2Config(vocab_size=99).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(command, "load_data", None)  # all of it is known before any text is read
    with pytest.raises(UserError) as error:
        given = [names.get(value, value.replace("OUT/", f"{names['OUT']}/")) for value in more]
        command.main(arguments(checkpoint, records, tmp_path / "out", *given))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more",
    [
        ["--every", "97"],
        ["--length", "512", "--topk", "256", "--packing", "cut"],
        ["--score-tokens", "4", "--every", "8"],
    ],
)
def test_windows_without_a_query_to_measure_end_in_one_line(checkpoint, records, tmp_path, more: list[str]) -> None:
    with pytest.raises(UserError, match=r"no measured query \(--every \d+\) .* sees more than k = \d+ keys"):
        command.main(arguments(checkpoint, records, tmp_path / "out", "--min-tokens", "1", *more))
    assert not (tmp_path / "out.partial").exists()


def test_bad_lines_are_left_out_on_request(checkpoint, records, tmp_path, no_pictures) -> None:
    lines = records.read_text().splitlines(keepends=True)
    (tmp_path / "bad.jsonl").write_text("".join(["{\n"] * (len(lines) // 20) + lines))
    given = arguments(checkpoint, tmp_path / "bad.jsonl", tmp_path / "out", "--k", "12", "--rungs", "trained")
    with pytest.raises(UserError, match="pass --allow-malformed"):
        command.main(given)
    command.main([*given, "--allow-malformed"])


@pytest.mark.parametrize("option", ["windows", "samples", "every", "k-budget", "k-step", "k-floor"])
def test_nothing_is_no_number_to_measure_with(option: str, capsys) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args([f"--{option}", "0"])
    assert f"--{option}: '0' is not a whole number of at least 1" in capsys.readouterr().err


def test_a_seed_is_one_that_torch_takes(capsys) -> None:
    with pytest.raises(SystemExit):
        command.parser().parse_args(["--seed", "9999999999"])
    assert "--seed: 9999999999 is not below 4294967296" in capsys.readouterr().err


def test_a_checkpoint_is_not_replaced(checkpoint, records, tmp_path) -> None:
    write_manifest(tmp_path, "checkpoint", {})
    with pytest.raises(UserError, match="holds 'checkpoint', which 'evaluation' would replace"):
        command.main(arguments(checkpoint, records, tmp_path))


def test_a_trained_checkpoint_is_replaced_by_one_with_k_by_layer_only_if_told_so(checkpoint, records, tmp_path) -> None:
    trained = tmp_path / "trained"
    trained.mkdir()
    write_manifest(trained, "checkpoint", {})
    given = arguments(checkpoint, records, tmp_path / "out", *AUTO, "--write-topk", str(trained))
    with pytest.raises(UserError, match=r"trained holds a checkpoint: choose another folder, or --overwrite"):
        command.resolve(command.parser().parse_args(given), load_config(checkpoint))
    command.resolve(command.parser().parse_args([*given, "--overwrite"]), load_config(checkpoint))


def test_on_a_gpu_no_more_keys_than_its_kernels_select(checkpoint, records, tmp_path, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(command, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("plugins.index_topk.plan.MAX_K", 10)
    given = ["--model", str(checkpoint), "--length", "96", "--out", str(tmp_path / "out")]
    args = command.parser().parse_args(given)
    command.resolve(args, load_config(checkpoint))
    assert args.ks == [6, 10]  # of 6, 12 and 24
    with pytest.raises(UserError, match="--topk 12: the GPU kernels select up to 10 keys; --device cpu takes more"):
        command.resolve(command.parser().parse_args([*given, "--topk", "12"]), load_config(checkpoint))


@pytest.mark.parametrize("tokens", [28, 30])
def test_everything_selected_is_dense_where_groups_are_incomplete(checkpoint, tokens: int) -> None:
    model = load_model(checkpoint, index_pool=4, index_topk=8)
    text = torch.arange(5, 5 + tokens)[None]
    error, tolerance = full_selection_error(model, text, hidden_states(model, text, "dense", 8))
    assert error <= tolerance


def test_an_edited_manifest_is_refused_where_the_data_is_left_to_it(tmp_path) -> None:
    write_manifest(tmp_path, "checkpoint", {}, data={"path": "book.txt"})
    assert command.trained_on(str(tmp_path)) == "book.txt"
    write_manifest(tmp_path, "checkpoint", {}, data=None)
    with pytest.raises(UserError, match=r"manifest.json lacks or misstates 'data': run"):
        command.trained_on(str(tmp_path))


def test_data_that_moved_away_is_named_with_its_checkpoint(checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "trained_on", lambda model: "book.txt")
    with pytest.raises(UserError, match=r"no such data: book.txt \(on which .* was trained\): name other --data"):
        command.main(["--model", str(checkpoint), "--length", "96", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out.partial").exists()


def test_an_empty_name_is_no_data(checkpoint, tmp_path) -> None:
    """An unset variable of a script, not "what the checkpoint was trained on"."""
    with pytest.raises(UserError, match="no such data: ''"):
        command.main(["--model", str(checkpoint), "--length", "96", "--data", "", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out.partial").exists()


def test_without_a_checkpoint_it_says_what_makes_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no folder ckpt: `python -m train\.joint` makes it"):
        command.main([])


@pytest.mark.parametrize(("attention", "message"), [("dense", "run `python -m train.warmup"), ("nsa", "nor can it be")])
def test_a_checkpoint_without_an_indexer_is_refused_at_once(tiny, tmp_path, attention: str, message: str) -> None:
    folder = tmp_path / attention
    adapted_config(load_config(tiny), attention).save_pretrained(folder)
    with pytest.raises(UserError, match=message):
        command.main(["--model", str(folder), "--out", str(tmp_path / "out")])


def test_a_hub_model_cannot_be_linked(checkpoint, records, tmp_path) -> None:
    asked = arguments(checkpoint, records, tmp_path / "out", *AUTO, "--write-topk", str(tmp_path / "by-layer"))
    args = command.parser().parse_args([*asked, "--model", "some/name"])
    with pytest.raises(UserError, match="checkpoint folder, some/name is none: download it first"):
        command.resolve(args, load_config(checkpoint))
