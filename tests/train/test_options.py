"""The training commands' arguments: what they come to, and what is refused before time is spent."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from dsa_export.cli import UserError
from dsa_export.model.checkpoint import load_config
from tests.train.conftest import SHORT, trained
from train import finetune, joint, options, warmup
from train.options import resolve, settings_of
from train.trainer import Settings


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


def test_every_setting_is_what_the_arguments_say() -> None:
    given = {"steps": 7, "batch_size": 3, "accumulation": 2, "lr": 0.5, "schedule": "linear", "warmup_steps": 1}
    given |= {"clip": 2.5, "seed": 9}
    settings = settings_of(argparse.Namespace(**given, length=[16, 32], dtype="bf16"))
    assert settings == Settings(**given, lengths=(16, 32), dtype=torch.bfloat16)


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
