"""Warm-up and joint training on a tiny model: what trains what, and what comes out."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

from dsa_export.cli import UserError
from dsa_export.model import AttentionTrace, load_model, load_tokenizer
from dsa_export.model.checkpoint import load_config
from tests.train.conftest import INDEXER, SHORT, SMALL_INDEXER, batch, joint_of, trained, weights
from train import joint, options, precision, warmup
from train.losses import IndexerObserver, indexer_kl_reference
from train.positions import with_gaps
from train.trainer import Settings

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


@pytest.mark.parametrize("keys", ["fp8", "int8"])
def test_an_indexer_learns_by_its_keys_before_they_are_rounded(tiny: Path, keys: str) -> None:
    """Rounding has no gradient."""
    learned = []
    for stored in ("model", keys):
        torch.manual_seed(0)
        model = load_model(tiny, **INDEXER, index_keys=stored).train()
        indexer = model.model.layers[0].self_attn.indexer
        learned.append(torch.autograd.grad(warmup.warmup_terms(model, batch(), 8)["kl"], indexer.k_proj.weight)[0])
    assert torch.equal(*learned) and learned[0].any()


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


def test_some_queries_that_choose_are_measured_however_few_there_are() -> None:
    batch = {"attention_mask": torch.ones(1, 512)}
    observers = {queries: warmup.observer(batch, 8, queries, "rms") for queries in (None, 2048, 128, 16, 2)}
    assert {q: (o.every, o.measure_every) for q, o in observers.items()} == {
        None: (1, 32), 2048: (1, 32), 128: (4, 32), 16: (32, 4), 2: (256, 1)
    }  # fmt: skip


def test_a_model_without_indexer_is_refused(tiny: Path, records: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no indexer"):
        joint.main(["--model", str(tiny), "--data", str(records), "--out", str(tmp_path / "c"), *SHORT])


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


def test_a_warm_up_goes_on_with_the_indexer_that_is_there(warm: Path, records: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(warm), "--data", str(records), *SHORT]
    warmup.main([*arguments, "--out", str(tmp_path / "on")])
    kept = load_config(tmp_path / "on")
    assert (kept.index_heads, kept.index_dim, kept.index_topk) == (2, 16, 8)
    with pytest.raises(UserError, match=r"--index-heads 4: the checkpoint's indexer has 2"):
        warmup.main([*arguments, "--out", str(tmp_path / "other"), "--index-heads", "4"])


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
