"""The experiment in toy size: twins that differ in attention alone, results, resuming, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from dsa_export.cli import UserError
from dsa_export.files import read_manifest
from dsa_export.model import load_model
from train.data import load_data
from train.distributed import Processes
from train.experiment import __main__ as experiment
from train.experiment import measure, report
from train.experiment.__main__ import main, parser, resolve
from train.experiment.measure import crossover
from train.experiment.presets import PRESETS, quick
from train.experiment.twins import Plan, Twin, fresh, parts_of
from train.trainer import Trainer

TOY = replace(
    PRESETS["glm4-moe"], length=32, hidden_size=32, heads=2, layers=2, expert_size=16, vocabulary=300, index_heads=2,
    index_dim=8, topk=8, tokens_per_update=64, warm_up_updates=3, steps=5, held_out=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _toy_presets(monkeypatch):
    monkeypatch.setitem(PRESETS, "glm4-moe", TOY)
    monkeypatch.setitem(PRESETS, "plain", replace(TOY, name="plain", feed_forward="gated"))


@pytest.fixture
def command(tmp_path, records, monkeypatch):
    """Runs the experiment in tmp_path/out; nothing but its arguments changes from call to call."""

    def run(*arguments: str):
        out = tmp_path / "out"
        common = ["--data", str(records), "--out", str(out), "--cache", str(tmp_path / "tokens"), "--save-every", "2"]
        main([*common, "--speed-lengths", "8", "16", *arguments])
        return out

    return run


def step_peak_mib_here(twin, folder, plan):
    """In this process instead of one of its own, which takes seconds to start."""
    return measure._step_peak_mib(twin, folder, plan.data["glm4-moe"], "cpu", 1, torch.get_num_threads(), plan.dtype)


def results(out):
    return json.loads((out / "report" / "results.json").read_text())


def test_the_whole_experiment(command, capsys, monkeypatch):
    monkeypatch.setattr(measure, "step_peak_mib", step_peak_mib_here)
    plans, measured = [], []
    record_of, selection = measure.record_of, measure.selection
    monkeypatch.setattr(measure, "record_of", lambda *a, **more: plans.append(a[2]) or record_of(*a, **more))
    monkeypatch.setattr(
        measure, "selection", lambda model, windows: measured.append(windows) or selection(model, windows)
    )
    out = command("--seeds", "0")
    assert [windows is plans[0].data["glm4-moe"].held_out for windows in measured] == [True], "once, drawn as well"
    runs = {run["attention"]: run for run in results(out)["runs"]}
    assert list(runs) == ["dense", "dsa", "nsa"]
    for run in runs.values():
        assert (run["updates"], run["tokens"]) == (8, 8 * 64)
        assert (
            0 < run["loss"] < 7 and 0 <= run["accuracy"] <= 1 and run["ms_per_step"] > 0 and run["step_peak_mib"] >= 0
        )
        assert run["perplexity"] == pytest.approx(torch.tensor(run["loss"]).exp().item(), rel=1e-4)
    # Of 32 * 33 / 2 visible pairs, query t selects min(t + 1, 8).
    assert runs["dsa"]["sparsity"] == pytest.approx(1 - (36 + 24 * 8) / 528)
    assert 0 < runs["dsa"]["coverage"] <= runs["dsa"]["coverage_best"] <= 1 and runs["dsa"]["mean_distance"] > 0
    assert {(s["phase"], s["length"]) for s in results(out)["speed"]} == {
        (phase, length) for phase in ("decode", "prefill") for length in (8, 16)
    }
    pictures = {path.name for path in (out / "report").glob("*.png")}
    assert pictures == {"loss.png", "speed.png", *(f"{n}-glm4-moe.png" for n in ("attention", "heads", "selection"))}
    text = (out / "report" / "results.md").read_text()
    assert "| glm4-moe | dsa, k = 8 | 1 |" in text and "against dense over 1 seed" in text
    assert read_manifest(out / "report", "experiment report", "test")["data"]["glm4-moe"]["windows"] > 0
    assert text in capsys.readouterr().out


@pytest.fixture
def no_measuring(monkeypatch):
    monkeypatch.setattr("train.experiment.__main__.write", lambda *arguments: None)
    monkeypatch.setattr("train.trainer.plot_metrics", lambda *arguments: None)


@pytest.mark.usefixtures("no_measuring")
def test_the_tokenizer_reads_no_more_text_than_a_training_may(command, monkeypatch):
    """Of a source on the hub it would read ten million rows."""
    read = []
    monkeypatch.setattr(experiment, "MAX_ROWS", 10)

    def train_tokenizer(texts, _):
        read.extend(texts)
        raise UserError("enough seen")

    monkeypatch.setattr(experiment, "train_tokenizer", train_tokenizer)
    with pytest.raises(UserError, match="enough seen"):
        command("--seeds", "0")
    assert 0 < len(read) <= 10
    with pytest.raises(UserError, match="is a file: choose another --cache folder"):
        command("--cache", __file__)


def test_with_everything_selected_dsa_is_its_dense_twin(command, capsys, monkeypatch):
    """Initial weights, data, order, updates and learning rates are the same: only the attention can differ."""
    monkeypatch.setattr(measure, "step_peak_mib", step_peak_mib_here)
    out = command("--seeds", "1", "--attention", "dense", "dsa", "--k", "32")
    assert "k = 32 covers all 32 tokens" in capsys.readouterr().out
    dense, dsa = (load_model(out / "runs" / f"glm4-moe-{name}-seed1").state_dict() for name in ("dense", "dsa"))
    for name, tensor in dense.items():
        torch.testing.assert_close(dsa[name], tensor, atol=1e-4, rtol=0)
    start = fresh(Twin(TOY, "dense", 1)).state_dict()
    assert all((dense[name] != start[name]).any() for name in dense if "correction_bias" not in name)


@pytest.mark.usefixtures("no_measuring")
def test_k_by_layer(command, capsys):
    arguments = ("--seeds", "0", "--attention", "dense", "dsa", "--k", "4", "8")
    out = command(*arguments)
    assert load_model(out / "runs" / "glm4-moe-dsa-seed0").config.topk_per_layer == (4, 8)
    written = read_manifest(out / "runs" / "glm4-moe-dsa-seed0", "checkpoint", "test")["arguments"]
    assert written["warmup_steps"] == 3 and "warm_up_updates" not in written, "runs of earlier versions are known"
    command(*arguments)
    assert "is there already" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("no_measuring")
def test_stopped_anywhere_it_goes_on_and_ends_in_the_same_weights(command, monkeypatch, tmp_path, capsys):
    arguments = ("--seeds", "0", "--attention", "dense", "dsa", "--k", "auto")
    step, taken, limit = Trainer._step, [], [6]

    def until_limit(self):
        if len(taken) == limit[0]:
            raise KeyboardInterrupt
        taken.append(self.step)
        return step(self)

    monkeypatch.setattr(Trainer, "_step", until_limit)
    for limit[0] in (6, 13, 1000):  # in the main stage of dense, in DSA's main stage, never
        try:
            out = command(*arguments)
        except KeyboardInterrupt:
            assert limit[0] < 1000
    assert 16 <= len(taken) <= 20, "no more than what was not saved is done again"
    said = " ".join(capsys.readouterr().out.split())
    assert "is there already" in said and "which ended after" not in said, "a warm-up has steps of its own"
    resumed = load_model(out / "runs" / "glm4-moe-dsa-seed0")
    assert sum(resumed.config.topk_per_layer) == 2 * TOY.topk and not list((out / "runs").glob("*.warm-up"))

    done = len(taken)
    command(*arguments)
    assert len(taken) == done, "finished twins are not trained again"
    with pytest.raises(UserError, match=r"steps: 5 there, 6 now.*--overwrite"):
        command(*arguments, "--steps", "6")
    command(*arguments, "--overwrite")
    assert len(taken) == done + 16
    for name, tensor in load_model(out / "runs" / "glm4-moe-dsa-seed0").state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.usefixtures("no_measuring")
def test_twins_of_other_data_are_no_twins(command, records, tmp_path):
    source = tmp_path / "rows.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    source.write_text("".join(lines[::2]))
    command("--seeds", "0", "--attention", "dense", "--data", str(source))
    source.write_text("".join(lines[1::2]))
    with pytest.raises(UserError, match=r"finished already, with another configuration \(arguments\.sha256"):
        command("--seeds", "0", "--attention", "dense", "dsa", "--data", str(source))


@pytest.mark.usefixtures("no_measuring")
def test_a_stopped_experiment_that_overwrites_goes_on_too(command, monkeypatch, tmp_path):
    command("--seeds", "0", "--attention", "dense")
    (tmp_path / "out" / "report").mkdir()  # it had come to its end
    step, taken = Trainer._step, []

    def until_the_sixth(self):
        if len(taken) == 6:
            taken.append(None)
            raise KeyboardInterrupt
        taken.append(self.step)
        return step(self)

    monkeypatch.setattr(Trainer, "_step", until_the_sixth)
    again = ("--seeds", "0", "--attention", "dense", "--steps", "6", "--overwrite")
    with pytest.raises(KeyboardInterrupt):
        command(*again)
    command(*again)
    assert 9 <= len([number for number in taken if number is not None]) <= 10, "nine steps, one of them perhaps twice"


@pytest.fixture
def toy_data(records, tokenizer):
    return load_data(str(records), tokenizer, 32, train_windows=4, held_out_windows=2, train_on_prompt=True)


def test_a_steps_memory_is_measured_in_a_process_of_its_own(monkeypatch, toy_data, tmp_path):
    monkeypatch.setattr(measure, "PeakMemory", lambda: pytest.fail("in this process"))
    twin = Twin(TOY, "dsa", 0)
    fresh(twin).save_pretrained(tmp_path)
    processes = Processes(torch.device("cpu"))
    plan = Plan(tmp_path, {"glm4-moe": toy_data}, "rows", {}, processes, torch.bfloat16)
    measured = measure.step_peak_mib(twin, tmp_path, plan)
    assert measured is not None and measured > 0


def test_a_steps_memory_is_beside_the_optimizers_state(monkeypatch, toy_data, tmp_path):
    """AdamW keeps two numbers per weight, which the first step makes."""
    taken = []

    class Peak:
        def __init__(self):
            taken.append(sum(t.numel() for p in made[0].state.values() for t in p.values() if t.numel() > 1))

        def reset(self):
            pass

        def mib(self):
            return 1.0

    made = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **more: made.append(adamw(*a, **more)) or made[0])
    monkeypatch.setattr(measure, "PeakMemory", Peak)
    twin, model = Twin(TOY, "dense", 0), fresh(Twin(TOY, "dense", 0))
    model.save_pretrained(tmp_path)
    assert measure._step_peak_mib(twin, tmp_path, toy_data, "cpu", 1, 1, torch.float32) == 1.0
    assert taken == [2 * sum(p.numel() for p in model.parameters() if p.requires_grad)]


def test_twins_start_alike_and_the_stages_share_no_window(records, tokenizer):
    dense, dsa = (fresh(Twin(TOY, name, 7)).state_dict() for name in ("dense", "dsa"))
    assert all(torch.equal(dsa[name], tensor) for name, tensor in dense.items()) and len(dsa) > len(dense)
    assert any((fresh(Twin(TOY, "dense", 8)).state_dict()[name] != dense[name]).any() for name in dense)
    data = load_data(str(records), tokenizer, 32, train_windows=16, held_out_windows=2)
    warm_up, rest = parts_of(data, TOY)
    assert len(warm_up.train) == 6 and len(rest.train) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--attention dsa", "needs dense"),
        ("--k 8 --attention dense", "needs dsa"),
        ("--k auto --warm-up 0", "--warm-up above 0"),
        ("--k 8 auto", "auto. alone"),
        ("--k 0", "whole numbers from 1"),
        ("--k 8 8 8", "has 2 layers"),
        ("--vocabulary 100", "--vocabulary must be at least 300"),
        ("--speed-lengths 64 32", "must grow"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_done(arguments, message):
    with pytest.raises(UserError, match=message):
        resolve(parser().parse_args(arguments.split()))


@pytest.mark.parametrize(
    "arguments",
    ["--steps 0", "--warm-up -1", "--tokens-per-update 0", "--held-out 0", "--save-every 0", "--prefill-limit -1",
     "--seeds -1", "--seeds 0 4294967296", "--lr 0", "--warm-up-lr inf"],
)  # fmt: skip
def test_a_value_that_no_preset_can_work_with_is_a_wrong_argument(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(arguments.split())
    assert stopped.value.code == 2 and f"argument {arguments.split()[0]}: " in capsys.readouterr().err


def test_presets_are_those_of_the_source(monkeypatch):
    monkeypatch.undo()
    preset = PRESETS["glm4-moe"]
    config = preset.config()
    shape = (config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.moe_intermediate_size)
    assert shape == (256, 8, 6, 512) and (config.num_experts, config.num_experts_per_tok) == (4, 2)
    assert (config.max_position_embeddings, config.index_heads, config.index_dim, config.index_topk) == (128, 4, 64, 64)
    assert (preset.warm_up_updates, preset.warmup_lr, preset.steps, preset.lr) == (200, 1e-3, 3000, 3e-3)
    assert {PRESETS[name].length for name in PRESETS} == {128, 256, 512, 1024, 2048, 4096}
    assert PRESETS["plain"].config().intermediate_size == 1024
    assert all(quick(preset).config() for preset in PRESETS.values())


def run(attention, seed, loss):
    return {"preset": "p", "attention": attention, "seed": seed, "loss": loss, "accuracy": 0.5, "perplexity": 2.0,
            "ms_per_step": 1.0, "step_peak_mib": None}  # fmt: skip


def test_a_step_takes_the_median_of_those_behind_the_first():
    ended = [9, 10, 11, 12, 13, 14, 16, 18]  # the last three took 1, 2 and 2 s
    assert measure.ms_per_step([{"seconds": seconds} for seconds in ended]) == 2000
    assert measure.ms_per_step([{"seconds": seconds} for seconds in (1, 3, 6)]) == 2000, "too few to leave any out"


def test_losses_are_compared_seed_by_seed():
    records = [run("dense", 0, 2.0), run("dense", 1, 4.0), run("dsa", 0, 2.1), run("dsa", 1, 4.12)]
    assert report.increases(records, "p", "dsa") == pytest.approx([0.05, 0.03])
    row = report.table_rows(records)[2]
    assert row[:5] == ["p", "dsa", "2", "3.1100 ± 1.4284", "+4.00 % ± 1.41 %"]
    assert "within 5%" in report.verdicts(records, [])[0]
    assert "NOT within 5%" in report.verdicts([run("dense", 0, 2.0), run("dsa", 0, 2.2)], [])[0]
    assert "within the aim of 1%" in report.verdicts([run("dense", 0, 2.0), run("dsa", 0, 2.0)], [])[0]


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ([0.5, 2.0], 2**0.5 * 100),
        ([2.0, 0.5, 1.0, 2.0], 400),
        ([2.0, 0.5], None),
        ([1.5, 1.5], 100),
        ([0.5, 0.6], None),
    ],
)
def test_crossover(speedups, expected):
    records = [
        {"phase": "decode", "length": 100 * 2**i, "ms": {"dense": speedup, "dsa": 1.0}}
        for i, speedup in enumerate(speedups)
    ]
    assert crossover(records, "decode", "dsa") == (None if expected is None else pytest.approx(expected))
    assert crossover(records, "prefill", "dsa") is None


def test_the_verdict_names_the_lengths_that_pay():
    speeds = [{"phase": "decode", "length": 100 * 2**i, "ms": {"dense": s, "dsa": 1.0}} for i, s in enumerate([1.1, 2])]
    assert report.verdicts([], speeds) == [
        "decode, dsa: faster than dense from about 100 tokens on, 1.2× from about 111 tokens on; 2.00× at 200 tokens"
    ]
