"""Warm-up and joint training on a tiny model: what trains what, and what comes out."""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Config

from dsa_export.cli import UserError
from dsa_export.config import DSAConfig
from dsa_export.model import AttentionTrace, DSAForCausalLM, load_model, load_tokenizer
from dsa_export.model.checkpoint import load_config
from train import finetune, joint, options, precision, trainer, warmup
from train.data import IGNORED, Windows
from train.losses import TARGETS, IndexerObserver, indexer_kl_reference
from train.muon import COEFFICIENTS, ITERATIONS, HeadwiseMuon, muon, orthogonalise
from train.options import resolve, settings_of
from train.positions import GAPS, spread, with_gaps
from train.trainer import Settings, Trainer
from train.validation import evaluate

INDEXER = {"index_heads": 2, "index_dim": 16, "index_topk": 8}
SHORT = [
    "--steps",
    "3",
    "--length",
    "48",
    "--batch-size",
    "2",
    "--held-out",
    "2",
    "--min-tokens",
    "1",
    "--device",
    "cpu",
]
SMALL_INDEXER = ["--topk", "8", "--index-heads", "2", "--index-dim", "16"]


def batch(lengths: tuple[int, ...] = (40, 25), seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (len(lengths), max(lengths)), generator=g)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, IGNORED)}


def trained(tiny: Path, records: Path, out: Path, *arguments: str) -> Path:
    warmup.main(["--model", str(tiny), "--data", str(records), "--out", str(out), *SHORT, *SMALL_INDEXER, *arguments])
    return out


@pytest.fixture(scope="module")
def warm(tiny: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny, records, tmp_path_factory.mktemp("warm") / "warmup")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------- warm-up


def test_the_warm_up_trains_the_indexer_and_leaves_the_base_bitwise(tiny: Path, warm: Path) -> None:
    before, after = weights(tiny), weights(warm)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    torch.manual_seed(0)
    untrained = load_model(tiny, **INDEXER).state_dict()
    indexer = [name for name in after if ".indexer." in name]
    assert set(after) - set(before) == set(indexer) and indexer
    assert all(not torch.equal(untrained[name], after[name]) for name in indexer)
    assert len({path.stat().st_mode for path in warm.iterdir()}) == 1  # the weights can be read by whom the rest can


@pytest.mark.parametrize(
    "options", [{}, {"index_share": 2}, {"index_pool": 2}, {"index_keys": "int8"}, {"kl_target": "output"}], ids=str
)
@pytest.mark.parametrize("span", [0, 200])
def test_terms_of_a_recorded_pass_are_those_of_a_whole_one(tiny: Path, options: dict, span: int) -> None:
    """The values and the indexers' gradients; and those of the indexers as they are now, not as they were recorded."""
    target = {"kl_target": options.get("kl_target", "rms")}
    model = load_model(tiny, **INDEXER, **{name: value for name, value in options.items() if name != "kl_target"})
    parameters = warmup.indexer_parameters(model)["indexer"]
    read = with_gaps(batch(), span)
    recorded = warmup.record(model, read)
    for _ in range(2):
        values, gradients = [], []
        for terms, of in ((warmup.warmup_terms, read), (warmup.replayed_terms, recorded)):
            torch.manual_seed(3)
            values.append(terms(model, of, topk=8, kl_queries=10, **target))
            gradients.append(torch.autograd.grad(values[-1]["kl"], parameters))
        assert values[0].keys() == values[1].keys() >= {"kl", "recall"}
        torch.testing.assert_close(values[1], values[0])
        torch.testing.assert_close(gradients[1], gradients[0])
        with torch.no_grad():
            for parameter in parameters:
                parameter += 0.1 * torch.randn_like(parameter)


@given(length=st.integers(2, 40), more=st.integers(1, 1000))
def test_a_window_is_spread_over_positions(length: int, more: int) -> None:
    positions = spread(50, length, length + more)
    steps = positions.diff(dim=1)
    assert positions[:, 0].eq(0).all() and positions.max() < length + more
    assert steps.min() >= 1 and (steps > 1).sum(1).max() <= GAPS
    assert length < 20 or more < 20 or (positions.diff(dim=0) != 0).any(), "every row has gaps of its own"


def test_what_a_window_attends_to_is_what_its_positions_say(tiny: Path) -> None:
    model = load_model(tiny, **INDEXER)
    windows = [with_gaps(batch(), span) for span in (0, 400, 40)]
    near, far, again = (warmup.warmup_terms(model, window, 8)["kl"].item() for window in windows)
    assert again == near != pytest.approx(far, rel=1e-3)
    near, far, again = (joint.joint_terms(model, window, 8)["cross_entropy"].item() for window in windows)
    assert again == near != pytest.approx(far, rel=1e-3)


def test_both_stages_read_windows_with_gaps(warm: Path, records: Path, tmp_path: Path) -> None:
    for stage, more in ((warmup, ()), (warmup, ("--passes", "2")), (joint, ("--topk", "8"))):
        arguments = ["--model", str(warm), "--data", str(records), *SHORT, *more]
        kl = []
        for span in ("0", "400"):
            stage.main([*arguments, "--position-span", span, "--overwrite", "--out", str(tmp_path / "out")])
            first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[1])
            kl.append(first["kl"])
        assert kl[0] != pytest.approx(kl[1], rel=1e-3), stage


def test_what_was_recorded_is_replayed_with_each_layers_own_leader(four_layers: Path) -> None:
    """Two layers to an indexer; of two layers, the first indexer is the only one."""
    model = load_model(four_layers, index_heads=2, index_dim=8, index_topk=5, index_share=2).train()
    indexers = warmup.indexer_parameters(model)["indexer"]
    once = warmup.warmup_terms(model, batch(), 5)
    again = warmup.replayed_terms(model, warmup.record(model, batch()), topk=5, kl_queries=None, kl_target="rms")
    torch.testing.assert_close(again["kl"], once["kl"])
    gradients = [torch.autograd.grad(terms["kl"], indexers) for terms in (again, once)]
    torch.testing.assert_close(*gradients)


def test_what_was_recorded_is_freed_without_the_garbage_collector(tiny: Path) -> None:
    """It is gigabytes, and the collector counts objects."""
    model = load_model(tiny, **INDEXER)
    gc.disable()
    try:
        traces, _ = warmup.record(model, batch())
        assert all(trace.index_q.numel() == 0 for trace in traces)  # the indexers are run again
        freed = weakref.ref(traces[0].q)
        del traces
    finally:
        gc.enable()
    assert freed() is None


def test_passes_are_updates(tiny: Path, records: Path, tmp_path: Path) -> None:
    """Of one window, with all its queries each time: as many steps on it."""
    arguments = ["--batch-size", "1", "--max-rows", "1", "--packing", "cut", "--schedule", "constant"]
    arguments += ["--warmup-steps", "0"]
    passes = trained(tiny, records, tmp_path / "passes", *arguments, "--steps", "1", "--passes", "3")
    steps = trained(tiny, records, tmp_path / "steps", *arguments, "--steps", "3")
    assert weights(passes).keys() == weights(steps).keys()
    torch.testing.assert_close(weights(passes), weights(steps), atol=1e-5, rtol=1e-3)
    metrics = [json.loads(line) for line in (passes / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in metrics] == [0, 1, 1] and metrics[1]["tokens"] == 48


def test_every_update_draws_its_queries_anew(tiny: Path, records: Path, tmp_path: Path, monkeypatch) -> None:
    seeds: list[int] = []
    terms = warmup.replayed_terms
    monkeypatch.setattr(
        warmup, "replayed_terms", lambda *of, **options: (seeds.append(torch.initial_seed()), terms(*of, **options))[1]
    )
    trained(tiny, records, tmp_path / "w", "--steps", "3", "--passes", "2", "--accumulation", "2")
    assert len(seeds) == len(set(seeds)) == 3 * 2 * 2


def test_the_teacher_of_the_warm_up_is_dense(tiny: Path) -> None:
    """Bug of the original: the "dense" teacher is masked by the untrained selection."""
    traces: list[AttentionTrace] = []
    model = load_model(tiny, **INDEXER).train()
    model.sparse = True  # whatever it was
    warmup.warmup_terms(model, batch(), 8)
    assert not model.sparse
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}

    def observer(trace: AttentionTrace) -> dict:
        traces.append(trace)
        return {}

    sparse_free = model.model(**inputs, observer=observer).last_hidden_state
    assert all(trace.indices is None for trace in traces)
    dense = load_model(tiny, attention="dense").model(**inputs).last_hidden_state
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(sparse_free[valid], dense[valid])


def test_the_warm_up_loss_is_the_definition_over_all_visible_keys(tiny: Path) -> None:
    model = load_model(tiny, **INDEXER).train()
    model.sparse = False
    expected = []

    def observer(t: AttentionTrace) -> dict:
        arguments = (t.index_q, t.index_weights, t.index_k, t.q, t.k, t.value_norms(), t.lengths, t.scale)
        expected.append(indexer_kl_reference(*arguments))
        return {}

    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    model.model(**inputs, observer=observer)
    terms = warmup.warmup_terms(model, batch(), 8)
    torch.testing.assert_close(terms["kl"], torch.stack(expected).mean())


def test_a_shared_indexer_learns_from_the_mean_target_of_its_layers(tiny: Path) -> None:
    """indexer_kl of each layer of a group has, together, the gradient of one KL with their mean as the teacher."""
    model = load_model(tiny, **INDEXER, index_share=2).train()
    indexer = list(model.model.layers[0].self_attn.indexer.parameters())
    traces: list[AttentionTrace] = []
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    model.sparse = False
    model.model(**inputs, observer=lambda trace: traces.append(trace) or {})
    assert [t.layer for t in traces] == [0, 1] and traces[0].index_q is traces[1].index_q
    teacher, scores, valid = [], [], []
    for t in traces:
        T = t.q.shape[2]
        visible = torch.ones(T, T, dtype=torch.bool).tril()
        keys = t.k.repeat_interleave(t.q.shape[1] // t.k.shape[1], dim=1)
        a = (t.q @ keys.mT * t.scale).masked_fill(~visible, -torch.inf).softmax(-1).detach()
        roots = a.square().mean(1).sqrt()
        teacher.append(roots / roots.sum(-1, keepdim=True))
        activations = torch.relu(torch.einsum("bthd,bsd->bths", t.index_q, t.index_k))
        scores.append(torch.einsum("bth,bths->bts", t.index_weights, activations).masked_fill(~visible, -torch.inf))
        valid = torch.arange(T) < t.lengths[:, None]
    p = torch.stack(teacher).mean(0)
    log_student = scores[0].log_softmax(-1).clamp(min=-1e30)
    expected = torch.autograd.grad((torch.xlogy(p, p) - p * log_student).sum(-1)[valid].mean(), indexer)
    actual = torch.autograd.grad(warmup.warmup_terms(model, batch(), 8)["kl"], indexer)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_pooled_keys_learn_from_the_attention_of_their_groups(tiny: Path) -> None:
    """The gradient by the scores of groups is (their distribution - the attention mass of the groups)."""
    model = load_model(tiny, **INDEXER | {"index_topk": 12}, index_pool=4).train()
    attention = model.model.layers[1].self_attn
    traces: list[AttentionTrace] = []
    model.sparse = False
    tokens = {"input_ids": batch((40,))["input_ids"]}
    model.model(**tokens, observer=lambda trace: traces.append(trace) or {})
    t = traces[1]
    means = t.index_k.detach().unflatten(1, (10, 4)).mean(2)
    torch.testing.assert_close(t.scored_k.detach(), means.repeat_interleave(4, dim=1))

    row = slice(39, 40)  # sees 10 whole groups
    activations = torch.einsum("bthd,bgd->bthg", t.index_q[:, row], means).relu()
    scores = torch.einsum("bth,bthg->btg", t.index_weights[:, row], activations)
    keys = t.k.repeat_interleave(t.q.shape[1] // t.k.shape[1], dim=1)
    mass = (t.q[:, :, row] @ keys.mT * t.scale).softmax(-1).mean(1).detach().unflatten(-1, (10, 4)).sum(-1)
    by_weights = attention.indexer.weights_proj.weight
    expected = torch.autograd.grad(-(mass * scores.log_softmax(-1)).sum(), by_weights, retain_graph=True)
    observer = IndexerObserver(12, every=40, target="mean")
    observer.first = 39
    torch.testing.assert_close(torch.autograd.grad(observer(t)["kl"], by_weights), expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_padding_changes_no_loss(tiny: Path, sparse: bool) -> None:
    """Bug of the original: padding rows count. A padded batch gives the mean of its rows alone, by their tokens."""
    model = load_model(tiny, **INDEXER).train()
    model.sparse = sparse
    whole = batch((40, 25))
    observer = IndexerObserver(8)
    together = model(**whole, observer=observer)
    alone = [
        model(**{name: tensor[b : b + 1, :n] for name, tensor in whole.items()}, observer=observer)
        for b, n in enumerate((40, 25))
    ]
    kl = (40 * alone[0].aux_losses["kl"] + 25 * alone[1].aux_losses["kl"]) / 65
    torch.testing.assert_close(together.aux_losses["kl"], kl)
    torch.testing.assert_close(together.loss, (39 * alone[0].loss + 24 * alone[1].loss) / 63)


def test_the_warm_up_learns(tiny: Path, records: Path, tmp_path: Path) -> None:
    out = trained(tiny, records, tmp_path / "w", "--steps", "40", "--lr", "1e-2")
    manifest = json.loads((out / "manifest.json").read_text())
    before, after = manifest["before"], manifest["after"]
    assert after["kl"] < 0.8 * before["kl"]
    assert before["recall"] < after["recall"] <= after["recall_best"] + 1e-6
    assert after["loss_dense"] == before["loss_dense"]


@pytest.mark.parametrize(("k", "said"), [("8", "the selection costs +"), ("48", "nothing is known of the selection")])
def test_windows_that_select_everything_tell_nothing(
    tiny: Path, records: Path, tmp_path: Path, capsys, k: str, said: str
):
    trained(tiny, records, tmp_path / "w", "--steps", "1", "--topk", k)
    assert said.rstrip("+") in (shown := " ".join(capsys.readouterr().out.split()))
    assert ("the selection costs" in shown) == (k == "8")


@pytest.mark.parametrize(("sparse", "said"), [(2.2, "costs +10.00% of the dense loss"), (1.9, "costs -5.00% of")])
def test_what_the_selection_costs(sparse: float, said: str, capsys: pytest.CaptureFixture) -> None:
    figures = {"loss_sparse": sparse, "loss_dense": 2.0, "recall": 0.5}
    run = SimpleNamespace(stage=SimpleNamespace(name="joint"), step=4, seconds=3.0, before=figures)
    Trainer._show(run, figures)  # type: ignore[arg-type]
    assert said in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------- joint


def test_cross_entropy_and_kl_do_not_mix(warm: Path) -> None:
    """Bug of the original: the indexer's input is not detached, so the KL trains the base."""
    model = load_model(warm).train()
    terms = joint.joint_terms(model, batch(), 8)
    groups = joint.parameter_groups(model)
    assert {id(p) for g in groups.values() for p in g} == {id(p) for p in model.parameters()}

    kl_to_base = torch.autograd.grad(terms["kl"], groups["base"], allow_unused=True, retain_graph=True)
    assert all(g is None or (g == 0).all() for g in kl_to_base)
    kl_to_indexer = torch.autograd.grad(terms["kl"], groups["indexer"], retain_graph=True)
    assert all((g != 0).any() for g in kl_to_indexer)
    ce_to_indexer = torch.autograd.grad(terms["cross_entropy"], groups["indexer"], allow_unused=True, retain_graph=True)
    assert all(g is None or (g == 0).all() for g in ce_to_indexer)
    ce_to_base = torch.autograd.grad(terms["cross_entropy"], groups["base"])
    assert all((g != 0).any() for g in ce_to_base)


def test_the_joint_loss_is_over_the_selected_keys(warm: Path) -> None:
    model = load_model(warm).train()
    expected = []

    def observer(t: AttentionTrace) -> dict:
        assert t.indices is not None and (t.indices >= 0).sum(-1).max() == 8
        arguments = (t.index_q, t.index_weights, t.index_k, t.q, t.k, t.value_norms(), t.lengths, t.scale)
        expected.append(indexer_kl_reference(*arguments, t.indices))
        return {}

    model.sparse = True
    output = model(**batch(), observer=observer)
    terms = joint.joint_terms(model, batch(), 8)
    torch.testing.assert_close(terms["kl"], torch.stack(expected).mean())
    torch.testing.assert_close(terms["cross_entropy"], output.loss)


def divergence(model: Path, teacher: Path) -> float:
    """Of what `model` predicts with 8 keys from what `teacher` does with all."""
    dense = joint.dense_teacher(str(teacher), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        return joint.joint_terms(load_model(model).train(), batch(seed=1), 8, teacher=dense)["distillation"].item()


def test_the_base_learns_what_the_checkpoint_predicts_with_dense_attention(
    warm: Path, records: Path, tmp_path: Path
) -> None:
    options = ["--steps", "60", "--lr", "2e-3", "--batch-size", "4", "--seed", "1"]
    own = joint_of(warm, records, tmp_path / "own", *options)
    published = joint_of(warm, records, tmp_path / "published", *options, "--objective", "next-token")
    assert divergence(own, warm) < divergence(warm, warm) < divergence(published, warm)
    steps = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()][1:-1]
    first, last = (sum(step["distillation"] for step in some) for some in (steps[:10], steps[-10:]))
    assert last < 0.75 * first
    manifest = json.loads((own / "manifest.json").read_text())
    assert manifest["after"]["distillation"] < 0.75 * manifest["before"]["distillation"]


@pytest.mark.parametrize("dtype", options.DTYPES)
def test_with_everything_selected_there_is_nothing_to_distil(warm: Path, dtype: str) -> None:
    """In bf16 too: the teacher rounds as the model does."""
    cpu, compute = torch.device("cpu"), options.DTYPES[dtype]
    model, dense = load_model(warm, index_topk=64).train(), joint.dense_teacher(str(warm), compute, cpu)
    with precision.autocast(cpu, compute):
        assert joint.joint_terms(model, batch(), 64, teacher=dense)["distillation"].abs() < 1e-5


def test_joint_training_trains_everything_and_writes_a_checkpoint(
    warm: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(warmup, "OUT", str(warm))
    monkeypatch.chdir(tmp_path)
    command = ["--data", str(records), "--lr", "1e-3", *SHORT]
    joint.main(command)
    before, after = weights(warm), weights(tmp_path / "ckpt")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    written = {p.name for p in (tmp_path / "ckpt").iterdir()}
    assert {"config.json", "tokenizer.json", "manifest.json", "metrics.jsonl", "loss.png"} <= written
    assert not {"state.pt"} & written and not (tmp_path / "ckpt.partial").exists()
    assert (tmp_path / "ckpt" / "loss.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((tmp_path / "ckpt" / "manifest.json").read_text())
    assert manifest["kind"] == "checkpoint" and len(manifest["source"]["sha256"]) == len(manifest["data"]["sha256"])
    metrics = [json.loads(line) for line in (tmp_path / "ckpt" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "evaluation" not in m] == [1, 2, 3]
    assert [m["evaluation"] for m in metrics if "evaluation" in m] == ["before", "after"]

    capsys.readouterr()
    modified = (tmp_path / "ckpt" / "model.safetensors").stat().st_mtime_ns
    joint.main(command)  # `make demo` for the second time
    assert "there already" in capsys.readouterr().out
    assert (tmp_path / "ckpt" / "model.safetensors").stat().st_mtime_ns == modified
    with pytest.raises(UserError, match=r"lr: 0.001 there, 0.002 now"):
        joint.main([*command, "--lr", "2e-3"])
    joint.main([*command, "--lr", "2e-3", "--overwrite"])
    assert (tmp_path / "ckpt" / "model.safetensors").stat().st_mtime_ns != modified


def test_joint_training_runs_the_warm_up_first_if_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    class Ran(Exception):
        pass

    def main(argv: list[str]) -> None:
        assert argv == []
        raise Ran

    monkeypatch.setattr(warmup, "main", main)
    with pytest.raises(Ran):
        joint.main([])


@pytest.mark.parametrize("stage", [warmup, joint, finetune])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--length", "40000"], "beyond the model's 32768 positions"),
        (["--steps", "3", "--warmup-steps", "4"], "--warmup-steps 4 is more than --steps 3"),
        (["--data", "nothing.jsonl"], "no such data: nothing.jsonl"),
        (["--out", "a-file"], "a-file is a file: choose another output folder"),
        (["--cache", "a-file"], "a-file is a file: choose another --cache folder"),
    ],
)
def test_what_cannot_work_is_refused_before_a_default_model_is_trained(
    stage, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    with pytest.raises(UserError, match=message):
        stage.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


def test_the_default_warm_up_decides_what_the_joint_stage_can_be_asked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="do not fit: pool must be at least 1 and divide k = 64"):
        joint.main(["--index-pool", "7"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "stage, arguments, message",
    [
        (warmup, ["--index-queries", "shared", "--index-heads", "3"], r"needs \(index_heads, index_dim\) = \(4, 16\)"),
        (warmup, ["--index-pool", "7"], "do not fit"),
        (warmup, ["--gradient-checkpointing", "--passes", "2"], "--gradient-checkpointing needs --passes 1"),
        (joint, ["--index-pool", "7"], "do not fit"),
        (joint, ["--topk", "48"], "--topk 48 selects everything in windows of 48 tokens"),
        (finetune, ["--nsa-stride", "7"], "nsa_stride"),
    ],
)
def test_options_that_exclude_each_other_are_refused_before_any_text_is_read(
    stage, arguments: list[str], message: str, tiny: Path, warm: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(options, "load_data", None)
    model = warm if stage is joint else tiny
    with pytest.raises(UserError, match=message):
        stage.main(["--model", str(model), "--out", str(tmp_path / "out"), *SHORT, *arguments])


def test_some_queries_that_choose_are_measured_however_few_there_are() -> None:
    batch = {"attention_mask": torch.ones(1, 512)}
    observers = {queries: warmup.observer(batch, 8, queries, "rms") for queries in (None, 2048, 128, 16, 2)}
    assert {q: (o.every, o.measure_every) for q, o in observers.items()} == {
        None: (1, 32), 2048: (1, 32), 128: (4, 32), 16: (32, 4), 2: (256, 1)
    }  # fmt: skip


@pytest.mark.parametrize("stage", [warmup, joint, finetune])
def test_a_model_is_not_replaced_by_what_is_trained_from_it(stage, warm: Path, monkeypatch) -> None:
    monkeypatch.chdir(warm.parent)
    with pytest.raises(UserError, match="is the --model, which training would replace"):
        stage.main(["--model", str(warm), "--out", warm.name, "--overwrite", *SHORT])


def test_a_first_model_may_be_trained_into_the_folder_that_one_stands_in(tmp_path: Path, monkeypatch) -> None:
    """Where no --model was given there is none to replace."""
    monkeypatch.chdir(tmp_path)
    args = warmup.parser().parse_args(["--out", str(tmp_path), "--device", "cpu"])
    assert args.model is None and options.start(args).count == 1


@pytest.mark.parametrize("name", ["source", "after"])
def test_a_manifest_that_was_edited_is_refused_by_the_name_of_its_entry(
    name: str, tiny: Path, records: Path, warm: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(warm, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {name: None}))
    message = f"out/manifest.json lacks or misstates '{name}': run `python -m train.warmup --overwrite` again"
    with pytest.raises(UserError, match=message):
        trained(tiny, records, out)


def test_a_model_without_indexer_is_refused(tiny: Path, records: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no indexer"):
        joint.main(["--model", str(tiny), "--data", str(records), "--out", str(tmp_path / "c"), *SHORT])


def joint_of(warm: Path, records: Path, out: Path, *arguments: str) -> Path:
    joint.main(["--model", str(warm), "--data", str(records), "--out", str(out), *SHORT, *arguments])
    return out


def test_the_indexer_can_learn_at_a_rate_of_its_own(warm: Path, records: Path, tmp_path: Path) -> None:
    """After one update the base is the same bit for bit, and the indexer has moved ten times as far."""
    options = ["--steps", "1", "--lr", "1e-4"]
    same = weights(joint_of(warm, records, tmp_path / "same", *options, "--indexer-lr", "1e-4"))
    own = weights(joint_of(warm, records, tmp_path / "own", *options, "--indexer-lr", "1e-3"))
    before = weights(warm)
    for name, weight in before.items():
        if ".indexer." not in name:
            assert torch.equal(same[name], own[name]), name
        else:
            moved = (own[name] - weight).norm() / (same[name] - weight).norm()
            assert 9 < moved < 11, (name, moved)


def test_the_joint_stage_takes_k_by_layer(tiny: Path, records: Path, tmp_path: Path) -> None:
    """As train.evaluate --write-topk writes it."""
    model = load_model(tiny, **INDEXER | {"index_topk": [8, 12]})
    model.save_pretrained(tmp_path / "warm")
    load_tokenizer(tiny).save_pretrained(tmp_path / "warm")
    out = joint_of(tmp_path / "warm", records, tmp_path / "joint")
    assert json.loads((out / "config.json").read_text())["index_topk"] == [8, 12]
    with pytest.raises(UserError, match="--topk 48 selects everything in windows of 48"):
        joint_of(tmp_path / "warm", records, tmp_path / "none", "--topk", "48")


def test_lora_changes_the_matrices_by_its_rank_and_leaves_a_plain_checkpoint(
    warm: Path, records: Path, tmp_path: Path
) -> None:
    out = joint_of(warm, records, tmp_path / "lora", "--lora-rank", "3", "--lr", "1e-2")
    before, after = weights(warm), weights(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        change = after[name] - tensor
        if ".indexer." in name:
            assert (change != 0).any(), name
        elif "_proj.weight" in name:
            assert torch.linalg.matrix_rank(change, atol=1e-5) == 3, name
        else:
            assert torch.equal(change, torch.zeros_like(change)), name
    with pytest.raises(UserError, match="--lora-rank 100000 is more than the model's"):
        joint_of(warm, records, tmp_path / "none", "--lora-rank", "100000")
    # The evaluation is of the checkpoint as it was written.
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["after"]["loss_sparse"] < manifest["before"]["loss_sparse"]
    again = joint_of(out, records, tmp_path / "again", "--steps", "1")
    written = json.loads((again / "manifest.json").read_text())["before"]
    assert written["loss_sparse"] == pytest.approx(manifest["after"]["loss_sparse"], rel=1e-5)


def test_gradient_checkpointing_saves_less_and_changes_nothing(warm: Path) -> None:
    saved, results = [], []
    for checkpointing in (False, True):
        model = load_model(warm).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            terms = joint.joint_terms(model, batch(), 8)
        saved.append(sum(kept.values()))
        (terms["cross_entropy"] + terms["kl"]).backward()
        results.append([terms["kl"], *(p.grad for p in model.parameters())])
    assert saved[1] < 0.6 * saved[0]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------- evaluation


def test_evaluation_measures_selection(tiny: Path) -> None:
    model = load_model(tiny, **INDEXER)
    data = batch((40, 25))
    windows = Windows(data["input_ids"].int(), data["labels"].int(), torch.tensor([40, 25]))
    result = evaluate(model, windows, batch_size=1)
    shares = {"recall", "recall_window", "recall_best", "recall_normalised"}
    assert set(result) == {"loss_dense", "loss_sparse", "kl", *shares}
    assert result["loss_sparse"] != pytest.approx(result["loss_dense"], abs=1e-4)
    assert 0 < result["recall"] <= result["recall_best"] <= 1
    assert all(math.isfinite(value) for value in result.values())
    # Batches of different lengths do not change the means.
    together = evaluate(model, windows, batch_size=2)
    for name in ("loss_dense", "loss_sparse", "kl", "recall", "recall_window", "recall_best"):
        assert together[name] == pytest.approx(result[name], rel=1e-4), name
    # Of fewer queries the measures differ, and the losses do not.
    few = evaluate(model, windows, kl_queries=5)
    assert few["kl"] != result["kl"] and few["kl"] == pytest.approx(result["kl"], rel=0.5)
    assert [few[name] for name in ("loss_dense", "loss_sparse")] == [result["loss_dense"], result["loss_sparse"]]
    model.sparse = False
    dense = model(**data, use_cache=False).loss.item()
    assert result["loss_dense"] == pytest.approx(dense, rel=1e-5)
    model.set_topk(40)
    everything = evaluate(model, windows)
    assert everything["loss_sparse"] == pytest.approx(dense, rel=1e-5)
    assert "recall" not in everything
    assert not model.sparse and not model.training


# ---------------------------------------------------------------- the optimiser's schedule and order


def test_every_window_is_taken_once_per_epoch() -> None:
    settings = Settings(steps=10, lengths=(8,), batch_size=3, accumulation=2)
    taken = torch.cat([settings.rows(step, micro, 9) for step in range(3) for micro in range(2)]).tolist()
    assert sorted(taken[:9]) == sorted(taken[9:]) == list(range(9))
    assert taken[:9] != taken[9:]


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the experiment's 51,200 windows, 16 in an update, it took 8 ms per update to draw it for each window."""
    settings = Settings(steps=10, lengths=(8,), batch_size=3, seed=4321)
    drawn = []
    monkeypatch.setattr(torch, "randperm", lambda n, **_: drawn.append(n) or torch.arange(n))
    taken = torch.cat([settings.rows(step, 0, 9) for step in range(6)]).tolist()
    assert drawn == [9, 9] and taken == [*range(9)] * 2
    trainer._order.cache_clear()


@pytest.mark.parametrize("schedule, last", [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_schedules(schedule: str, last: float) -> None:
    settings = Settings(steps=1000, lengths=(8,), warmup_steps=10, schedule=schedule)
    factors = [settings.lr_factor(step) for step in range(1000)]
    assert 0 < factors[0] < 0.2 and factors[10] == 1.0 == max(factors)
    assert factors[-1] == pytest.approx(last, abs=0.01)


def test_growing_windows_share_the_tokens() -> None:
    settings = Settings(steps=70, lengths=(16, 32, 64), batch_size=3)
    assert [(p.length, p.end - p.first) for p in settings.phases()] == [(16, 40), (32, 20), (64, 10)]
    assert [settings.tokens_before(step) for step in (0, 40, 60, 61, 70)] == [0, 1920, 3840, 4032, 5760]
    assert settings.lr_factor(60) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 2 / 3)) / 2)


def test_the_time_that_is_left() -> None:
    """50 of 200 tokens took half a minute."""
    run = SimpleNamespace(settings=Settings(steps=4, lengths=(10,), batch_size=5), step=1, seconds=30.0)
    assert Trainer._eta(run) == "600.00 s per 1,000 tokens, 1.5 min left"  # type: ignore[arg-type]


def test_windows_grow_while_training(tiny: Path, records: Path, tmp_path: Path) -> None:
    arguments = ("--length", "16", "32", "64", "--steps", "7", "--kl-queries", "16")
    out = trained(tiny, records, tmp_path / "w", *arguments)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["tokens"] for m in steps if "tokens" in m] == [32] * 4 + [64] * 2 + [128]
    assert all(math.isfinite(m["kl"]) for m in steps if "tokens" in m)
    again = weights(trained(tiny, records, tmp_path / "again", *arguments))
    assert all(tensor.equal(again[name]) for name, tensor in weights(out).items())


def test_every_length_has_windows_for_its_updates(tiny: Path, records: Path, tmp_path: Path) -> None:
    """Eight updates read 160 tokens in all, which three windows of 64 hold, but the phases are no equal parts."""
    out = trained(tiny, records, tmp_path / "w", "--length", "8", "16", "32", "64", "--steps", "8", "--batch-size", "1")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["data"]["windows"] == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--length", "64", "32"), "must grow"),
        (("--model", ""), "--model is empty"),
        (("--length", "24", "64"), "does not divide"),
        (("--length", "32", "64", "--packing", "cut"), "takes one --length"),
        (("--length", "16", "32", "64", "--steps", "2"), "--steps 2 leaves no update for windows of 64 tokens"),
    ],
)
def test_lengths_that_cannot_work_are_refused(
    tiny: Path, records: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        trained(tiny, records, tmp_path / "w", *arguments)


@pytest.mark.parametrize(
    "names, wrong, message",
    [
        (
            "steps max-tokens batch-size accumulation kl-queries passes lora-rank save-every max-rows topk index-heads "
            "index-dim",
            ("0", "-1", "1.5"),
            "is not a whole number of at least 1",
        ),
        ("warmup-steps seed min-tokens held-out position-span", ("-1", "few"), "is not a whole number of at least 0"),
        ("seed", (str(2**32),), "4294967296 is not below 4294967296"),
        ("lr indexer-lr clip max-minutes", ("0", "-1", "nan", "inf", "much"), "is not a positive, finite number"),
    ],
)
def test_a_value_that_no_model_can_work_with_is_a_wrong_argument(
    names: str, wrong: tuple[str, ...], message: str, capsys: pytest.CaptureFixture
) -> None:
    parsers = [stage.parser() for stage in (warmup, joint, finetune)]
    for name in names.split():
        takers = [parser for parser in parsers if f"--{name} " in parser.format_help()]
        assert takers, name
        for parser in takers:
            for value in wrong:
                with pytest.raises(SystemExit) as stopped:
                    parser.parse_args([f"--{name}", value])
                said = capsys.readouterr().err
                assert stopped.value.code == 2 and f"argument --{name}: " in said and message in said


def test_accumulation_equals_one_large_batch(tiny: Path, records: Path, tmp_path: Path) -> None:
    """Rows of different lengths: each term is averaged over the whole update, not over micro-batches."""
    options = ["--packing", "cut", "--length", "100", "--indexer-optimizer", "adamw"]  # muon computes in bf16
    one = trained(tiny, records, tmp_path / "one", *options, "--batch-size", "4")
    four = trained(tiny, records, tmp_path / "four", *options, "--batch-size", "1", "--accumulation", "4")
    a, b = weights(one), weights(four)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-4)
    first = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])["kl"] for folder in (one, four)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_what_is_predicted_is_averaged_over_the_labels_of_an_update(tiny: Path, records: Path, tmp_path: Path) -> None:
    """Of windows of equal length, in which prompts take more or less; the first token of a window is not predicted."""
    first = []
    for batch, accumulation in (("4", "1"), ("1", "4")):
        out = tmp_path / batch
        options = ["--attention", "dense", "--steps", "1", "--batch-size", batch, "--accumulation", accumulation]
        finetune.main(["--model", str(tiny), "--data", str(records), "--out", str(out), *SHORT, *options])
        first.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[1])["cross_entropy"])
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_what_is_distilled_is_averaged_over_the_labels_of_an_update(
    warm: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "plot_metrics", lambda *_: None)
    first = []
    for batch, accumulation in (("4", "1"), ("1", "4")):
        options = ["--steps", "1", "--held-out", "0", "--batch-size", batch, "--accumulation", accumulation]
        out = joint_of(warm, records, tmp_path / batch, *options)
        first.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["distillation"])
    assert first[0] == pytest.approx(first[1], rel=1e-4) and first[0] > 1e-3


def test_each_group_is_clipped_by_itself(warm: Path, records: Path, tmp_path: Path, monkeypatch) -> None:
    clipped: list[tuple[int, float]] = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda group, most: (clipped.append((len(group), most)), clip(group, most))[1]
    )
    joint_of(warm, records, tmp_path / "joint", "--steps", "1", "--clip", "0.5")
    groups = joint.parameter_groups(load_model(warm))
    assert clipped == [(len(groups["base"]), 0.5), (len(groups["indexer"]), 0.5)]


def test_muon_takes_the_matrices_of_the_indexer_and_adamw_the_rest(tiny: Path) -> None:
    model = load_model(tiny, **INDEXER)
    indexer = warmup.indexer_parameters(model)["indexer"]
    matrices, others = muon(indexer, Settings(steps=1, lengths=(8,), lr=1e-3), rows=4)
    taken = [p for optimizer in (matrices, others) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, taken)) == sorted(map(id, indexer))
    before = {id(p): p.detach().clone() for p in indexer}
    torch.manual_seed(0)
    for p in indexer:
        p.grad = torch.randn_like(p) * 1e-3
    matrices.step()
    others.step()
    for p in indexer:
        moved = (p.detach() - before[id(p)]).square().mean().sqrt().item()
        assert moved == pytest.approx(0.2e-3 if p.ndim == 2 else 1e-3, rel=0.25)


def test_muon_moves_every_head_as_torchs_moves_a_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    matrix, other, few = (nn.Parameter(torch.randn(*shape, generator=g)) for shape in ((8, 16), (12, 16), (3, 16)))
    heads = [nn.Parameter(head.clone()) for p in (matrix, other) for head in p.detach().split(4)]
    heads.append(nn.Parameter(few.detach().clone()))
    ours = HeadwiseMuon([matrix, other, few], lr=0.1, rows=4)
    theirs = torch.optim.Muon(heads, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p in (matrix, other, few):
            p.grad = torch.randn(p.shape, generator=g)
        for head, gradient in zip(heads, [*matrix.grad.split(4), *other.grad.split(4), few.grad], strict=True):
            head.grad = gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(torch.cat([matrix, other, few]), torch.cat(heads), atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(2, 8, 40), (3, 40, 8), (1, 16, 16), (2, 1, 12)])
@pytest.mark.parametrize("decades", [0, 3, 6])
def test_orthogonalising_by_the_gram_matrix_is_the_published_iteration(shape: tuple[int, ...], decades: int) -> None:
    spread = torch.logspace(0, -decades, shape[1])[:, None] * 1e-4
    blocks = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * spread
    a, b, c = COEFFICIENTS
    x = blocks.double() / blocks.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(orthogonalise(blocks).double(), x, atol=1e-4, rtol=0)
    assert orthogonalise(torch.zeros(shape)).eq(0).all()


@pytest.mark.parametrize(
    "positions, given, lengths, steps",
    [
        (32768, [], [1024, 2048, 4096, 8192], 114),
        (4096, [], [1024, 2048, 4096], 142),
        (512, [], [512], 490),
        (32768, ["--packing", "cut"], [1024], 245),
        (32768, ["--steps", "3"], [1024, 2048], 3),
        (32768, ["--max-tokens", "6000"], [1024, 2048], 4),
    ],
)
def test_a_real_model_reads_so_many_tokens_in_windows_that_grow_as_far_as_its_positions(
    positions: int, given: list[str], lengths: list[int], steps: int
) -> None:
    args = warmup.parser().parse_args([*given, "--accumulation", "1"])
    resolve(args, warmup.SMALL, warmup.REAL, Qwen2Config(hidden_size=896, max_position_embeddings=positions))
    assert (args.length, args.steps, args.kl_queries, args.passes) == (lengths, steps, 128, 16)
    assert args.position_span == min(positions, 32768)
    assert steps < 5 or 240_000 < settings_of(args).tokens_before(steps) <= 250_880


@pytest.mark.parametrize(
    "given, queries", [(["--passes", "1"], 2048), (["--passes", "4"], 512), (["--passes", "4", "--kl-queries", "9"], 9)]
)
def test_the_queries_of_a_step_are_dealt_out_to_its_passes(given: list[str], queries: int) -> None:
    args = warmup.parser().parse_args([*given, "--accumulation", "1"])
    resolve(args, warmup.SMALL, warmup.REAL, Qwen2Config(hidden_size=896))
    assert args.kl_queries == queries


def test_a_warm_up_goes_on_with_the_indexer_that_is_there(warm: Path, records: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(warm), "--data", str(records), *SHORT]
    warmup.main([*arguments, "--out", str(tmp_path / "on")])
    kept = load_config(tmp_path / "on")
    assert (kept.index_heads, kept.index_dim, kept.index_topk) == (2, 16, 8)
    with pytest.raises(UserError, match=r"--index-heads 4: the checkpoint's indexer has 2"):
        warmup.main([*arguments, "--out", str(tmp_path / "other"), "--index-heads", "4"])


def test_every_setting_is_what_the_arguments_say() -> None:
    given = {"steps": 7, "batch_size": 3, "accumulation": 2, "lr": 0.5, "schedule": "linear", "warmup_steps": 1}
    given |= {"clip": 2.5, "seed": 9}
    settings = settings_of(argparse.Namespace(**given, length=[16, 32], dtype="bf16"))
    assert settings == Settings(**given, lengths=(16, 32), dtype=torch.bfloat16)


@pytest.mark.parametrize("command", [warmup, joint])
def test_what_an_indexer_learns_and_is_judged_by_is_what_the_arguments_say(
    command, tiny: Path, warm: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list = []
    monkeypatch.setattr(command, "train_from", lambda *arguments: made.append(arguments[-1]()))
    options = ["--kl-queries", "7", "--kl-target", "mean", "--dtype", "bf16", "--indexer-optimizer", "adamw"]
    options += SMALL_INDEXER if command is warmup else []
    model = str(tiny if command is warmup else warm)
    command.main(["--model", model, "--data", str(records), "--out", str(tmp_path / "out"), *SHORT, *options])
    ((model, stage),) = made
    learned, judged = stage.terms.keywords, stage.evaluate.keywords
    assert [(of["kl_queries"], of["kl_target"]) for of in (learned, judged)] == [(7, "mean")] * 2
    assert judged["compute_dtype"] == torch.bfloat16
    assert judged["teacher"] is learned.get("teacher")
    assert {type(one) for one in stage.optimizers(stage.groups(model), Settings(1, (8,)))} == {torch.optim.AdamW}


@pytest.mark.parametrize("lengths, steps", [([64], 15), ([32, 64], 23), ([2, 4, 8, 64], 221)])
def test_max_tokens_sets_the_steps(lengths: list[int], steps: int, tiny: Path) -> None:
    given = ["--max-tokens", "2000", "--batch-size", "2", "--accumulation", "1", "--length", *map(str, lengths)]
    args = warmup.parser().parse_args(given)
    resolve(args, warmup.SMALL, warmup.REAL, load_config(tiny))
    assert (args.steps, args.passes) == (steps, 1)
    tokens = settings_of(args).tokens_before(steps)
    assert 2000 - 3 * 2 * lengths[-1] < tokens <= 2000


@pytest.mark.parametrize(
    "hidden_size, fast, given, dtype",
    [
        (896, True, [], "bf16"),
        (896, False, [], "fp32"),
        (896, True, ["--dtype", "fp32"], "fp32"),
        (256, True, [], "fp32"),
    ],
)
def test_real_models_compute_in_bf16_where_that_is_fast(
    hidden_size: int, fast: bool, given: list[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "is_fast_in_bf16", lambda device: fast)
    args = joint.parser().parse_args([*given, "--accumulation", "1"])
    resolve(args, joint.SMALL, joint.REAL, Qwen2Config(hidden_size=hidden_size, max_position_embeddings=32768))
    assert args.dtype == dtype


@pytest.mark.parametrize(
    "capabilities, fast",
    [({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), (None, False)],
)
def test_which_cpus_are_fast_in_bf16(
    capabilities: dict[str, bool] | None, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: a torch that cannot tell."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if capabilities is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision.is_fast_in_bf16(torch.device("cpu")) == fast


def test_bf16_computation_keeps_fp32_weights(tiny: Path, records: Path, tmp_path: Path) -> None:
    """All but what bf16 holds exactly, such as norms of ones."""
    warm = trained(tiny, records, tmp_path / "w", "--dtype", "bf16")
    out = joint_of(warm, records, tmp_path / "j", "--dtype", "bf16")
    for folder in (warm, out):
        low = {name: t for name, t in weights(folder).items() if t.dtype != torch.float32}
        assert all(t.dtype == torch.bfloat16 for t in low.values())
        assert not any("proj.weight" in name for name in low)
    assert all(torch.equal(t, weights(warm)[name].float()) for name, t in weights(tiny).items())


@pytest.fixture(scope="module")
def tiny_in_bf16(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16") / "tiny"
    shutil.copytree(tiny, folder)
    low = {name: t.to(torch.bfloat16) for name, t in weights(tiny).items()}
    save_file(low, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_frozen_base_in_bf16_stays_in_bf16(
    tiny_in_bf16: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """In the file, and in memory if computed so, where it changes no bit of what is learned."""
    out = trained(tiny_in_bf16, records, tmp_path / "held", "--dtype", dtype)
    before, after = weights(tiny_in_bf16), weights(out)
    for name, tensor in after.items():
        if name in before:
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name]), name
        elif "proj" in name:
            assert tensor.dtype == torch.float32, name
    assert load_config(out).dtype == torch.float32
    monkeypatch.setattr(warmup, "hold_matrices", lambda *_: None)
    plain = weights(trained(tiny_in_bf16, records, tmp_path / "plain", "--dtype", dtype))
    assert all(torch.equal(after[name], plain[name]) for name in after)


@pytest.mark.parametrize("attention", ["dsa", "mla-dsa"])
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_held_in_bf16_changes_no_bit(attention: str, target: str) -> None:
    latent = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "qkv_bias": False}
    kind = {"num_key_value_heads": 1, **latent} if attention == "mla-dsa" else {"num_key_value_heads": 2}
    config = DSAConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        attention=attention, **kind, **INDEXER,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DSAForCausalLM(config).train()
    for name, parameter in model.named_parameters():
        if "o_proj" not in name:  # which stays in fp32 then
            parameter.data = parameter.bfloat16().float()
    parameters = warmup.indexer_parameters(model)["indexer"]
    found = []
    for _ in range(2):
        with precision.autocast(torch.device("cpu"), torch.bfloat16):
            terms = warmup.warmup_terms(model, batch(), 8, kl_target=target)
        found.append([terms["kl"], *torch.autograd.grad(terms["kl"], parameters)])
        precision.hold_matrices(model, torch.bfloat16)
    kinds = {p.dtype for name, p in model.named_parameters() if "proj.weight" in name and ".indexer." not in name}
    assert kinds == {torch.float32, torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_held_in_bf16(tiny: Path, tiny_in_bf16: Path) -> None:
    def held(model: nn.Module, **options: bool) -> set[str]:
        precision.hold_matrices(model, torch.bfloat16, **options)
        return {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}

    matrices = {name for name, _ in load_model(tiny).named_parameters() if "layers" in name and "norm" not in name}
    base = {name for name in matrices if ".indexer." not in name}
    assert {
        name for name in held(load_model(tiny, **INDEXER)) if "bias" not in name
    } == set()  # it would lose something
    assert held(load_model(tiny, **INDEXER), rounded=True) == base
    assert held(load_model(tiny_in_bf16, **INDEXER)) == base
