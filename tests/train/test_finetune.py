"""Plain cross-entropy training: from a checkpoint, from scratch, and twins that start from the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from dsa_export.cli import UserError
from dsa_export.model import load_model
from dsa_export.model.checkpoint import adapted_config, load_config
from train import finetune, joint, warmup
from train.data import IGNORED, Windows
from train.trainer import Trainer

SHORT = "--steps 6 --length 32 --batch-size 2 --held-out 2 --min-tokens 1 --lr 1e-2 --device cpu".split()  # noqa: SIM905


def finetuned(model: Path, records: Path, out: Path, *arguments: str) -> dict:
    finetune.main(["--model", str(model), "--data", str(records), "--out", str(out), *SHORT, *arguments])
    return json.loads((out / "manifest.json").read_text())


def test_dense_training_lowers_the_loss_and_the_warm_up_goes_on_from_it(
    tiny: Path, records: Path, tmp_path: Path
) -> None:
    manifest = finetuned(tiny, records, tmp_path / "dense", "--attention", "dense")
    assert manifest["after"]["loss"] < manifest["before"]["loss"] - 0.2
    dense = load_model(tmp_path / "dense")
    assert dense.config.attention == "dense"
    arguments = [
        "--model",
        str(tmp_path / "dense"),
        "--data",
        str(records),
        "--out",
        str(tmp_path / "dsa"),
        "--topk",
        "8",
    ]
    warmup.main([*arguments, *SHORT, "--steps", "1"])
    sparse = load_model(tmp_path / "dsa")
    assert sparse.config.attention == "dsa"
    assert torch.equal(sparse.model.layers[1].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight)


def test_without_held_out_windows_nothing_is_evaluated(tiny: Path, records: Path, tmp_path: Path, capsys) -> None:
    manifest = finetuned(tiny, records, tmp_path / "out", "--attention", "dense", "--held-out", "0")
    assert manifest["before"] == manifest["after"] == {} and manifest["data"]["windows_held_out"] == 0
    assert "evaluation" not in (tmp_path / "out" / "metrics.jsonl").read_text()
    assert "held-out" not in capsys.readouterr().out


def test_the_evaluation_computes_in_the_type_of_the_training(tiny: Path, records: Path, tmp_path: Path, monkeypatch):
    made: list = []
    monkeypatch.setattr(finetune, "train_from", lambda *arguments: made.append(arguments[-1]()))
    options = ["--model", str(tiny), "--data", str(records), "--out", str(tmp_path / "out"), *SHORT]
    finetune.main([*options, "--attention", "dense", "--dtype", "bf16"])
    ((_, stage),) = made
    assert stage.evaluate.keywords["compute_dtype"] == torch.bfloat16


def test_what_is_evaluated_is_what_was_not_trained_on(tiny: Path, records: Path, tmp_path: Path, monkeypatch) -> None:
    evaluated, data = [], []
    loss, evaluate = finetune.held_out_loss, Trainer._evaluate

    def watched_loss(model, windows, **options):
        evaluated.append(windows)
        return loss(model, windows, **options)

    def watched(trainer: Trainer, when: str) -> dict[str, float]:
        data.append(trainer.data)
        return evaluate(trainer, when)

    monkeypatch.setattr(finetune, "held_out_loss", watched_loss)
    monkeypatch.setattr(Trainer, "_evaluate", watched)
    finetuned(tiny, records, tmp_path / "out", "--attention", "dense")
    assert len(evaluated) == len(data) == 2
    assert all(windows is part.held_out for windows, part in zip(evaluated, data, strict=True))
    trained, held_out = (set(map(tuple, w.input_ids.tolist())) for w in (data[0].train, data[0].held_out))
    assert trained and held_out and not trained & held_out


def test_the_held_out_loss_is_that_of_transformers(tiny: Path) -> None:
    ids = torch.randint(3, 250, (3, 24), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids, ids.clone(), torch.tensor([24, 24, 24]))
    windows.labels[0, :20] = IGNORED  # the mean is over labels, not over windows
    expected = AutoModelForCausalLM.from_pretrained(tiny)(ids, labels=windows.labels).loss.item()
    model = load_model(tiny, attention="dense")
    assert finetune.held_out_loss(model, windows) == {"loss": pytest.approx(expected, abs=1e-5)}
    assert not model.training


NSA = "--nsa-block-size 8 --nsa-stride 4 --nsa-selection-size 8 --nsa-selected-blocks 3 --nsa-window 8".split()  # noqa: SIM905


@pytest.mark.parametrize("start", [(), ("--from-scratch",)])
def test_native_sparse_attention_trains_end_to_end(tiny: Path, records: Path, tmp_path: Path, start: tuple) -> None:
    manifest = finetuned(tiny, records, tmp_path / "out", "--attention", "nsa", *NSA, *start)
    assert manifest["after"]["loss"] < manifest["before"]["loss"] - 0.2
    model = load_model(tmp_path / "out")
    assert (model.config.attention, model.config.nsa_window) == ("nsa", 8)
    assert model.model.layers[0].self_attn.compression.key.position.abs().max() > 0  # it began at 0
    for stage in (warmup, joint):
        with pytest.raises(UserError, match="nor can it be given one: see"):
            stage.main(
                ["--model", str(tmp_path / "out"), "--data", str(records), "--out", str(tmp_path / "no"), *SHORT]
            )


def test_with_adapters_the_base_rests_and_the_branches_train(tiny: Path, records: Path, tmp_path: Path) -> None:
    manifest = finetuned(tiny, records, tmp_path / "out", "--attention", "nsa", *NSA, "--lora-rank", "2")
    assert manifest["after"]["loss"] < manifest["before"]["loss"]
    before, after = load_model(tiny, attention="dense").state_dict(), load_model(tmp_path / "out").state_dict()
    for name, tensor in before.items():
        wanted = 2 if "layers" in name and name.endswith("_proj.weight") else 0
        assert torch.linalg.matrix_rank(torch.atleast_2d(after[name] - tensor), atol=1e-5) == wanted, name
    layer = "model.layers.0.self_attn."
    change = after[layer + "window.k_proj.weight"] - before[layer + "k_proj.weight"]  # where it began
    assert torch.linalg.matrix_rank(change, atol=1e-5) > 2
    assert after[layer + "compression.key.position"].abs().max() > 0  # it began at 0


def test_adapters_need_a_checkpoints_weights(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not with --from-scratch"):
        finetune.main(["--model", str(tiny), "--from-scratch", "--lora-rank", "2", "--out", str(tmp_path / "x")])


def test_options_of_another_attention_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--nsa-window needs --attention nsa"):
        finetune.main(["--model", str(tiny), "--attention", "dense", "--nsa-window", "9", "--out", str(tmp_path / "x")])


def test_a_trained_checkpoint_keeps_its_native_sparse_attention(tiny: Path) -> None:
    trained = adapted_config(load_config(tiny), "nsa", **finetune.SMALL_NSA)

    def options(*given: str) -> dict:
        return finetune.nsa_options(finetune.parser().parse_args(["--model", "trained", *given]), trained)

    assert options() == {} and options("--nsa-window", "32") == {"nsa_window": 32}
    with pytest.raises(UserError, match=r"trained was trained with --nsa-window 32: leave it out, or train --from-s"):
        options("--nsa-window", "64")
    assert options("--nsa-window", "64", "--from-scratch") == {"nsa_window": 64}


def test_new_weights_of_one_seed_are_the_same(tiny: Path) -> None:
    config = adapted_config(load_config(tiny), "dense")
    first, second, other = (finetune.new_model(config, seed).state_dict() for seed in (0, 0, 1))
    trained = load_model(tiny, attention="dense").state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        if tensor.std() > 0:
            assert not torch.equal(tensor, other[name]) and not torch.equal(tensor, trained[name])


def test_new_weights_are_of_the_family_of_the_configuration(tiny: Path) -> None:
    config = Qwen3Config(**{**load_config(tiny).to_dict(), "model_type": "qwen3", "head_dim": 16})
    names = finetune.new_model(adapted_config(config, "dense"), 0).state_dict()
    assert any("q_norm" in name for name in names) and not any("bias" in name for name in names)
