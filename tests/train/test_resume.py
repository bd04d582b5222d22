"""Stopped, killed and broken runs."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsa_export.cli import UserError, user_message
from dsa_export.files import TRAINING_STATE
from tests.train.conftest import SMALL_INDEXER, WINDOWS
from train import checkpoint, joint, trainer, warmup


def command(tiny: Path, records: Path, out: Path, steps: int, *more: str) -> list[str]:
    return ["--model", str(tiny), "--data", str(records), "--out", str(out), "--steps", str(steps),
            *WINDOWS, *SMALL_INDEXER, *more]  # fmt: skip


def weights_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def broken_pickle() -> bytes:
    """A state whose pickle takes from an empty stack."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as whole:
        files = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as broken:
        for name, content in files.items():
            broken.writestr(name, b"\x80\x02s." if name.endswith("data.pkl") else content)
    return buffer.getvalue()


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process a SIGINT in the middle of a step."""
    original = trainer.Trainer._step

    def step_and_interrupt(self):
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(trainer.Trainer, "_step", step_and_interrupt)


def test_kill_9_at_any_moment_resumes_to_the_same_bits(tiny: Path, records: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = 20
    program = [sys.executable, "-m", "train.warmup"]
    run = [*program, *command(tiny, records, killed, steps, "--save-every", "1")]
    subprocess.run([*program, *command(tiny, records, whole, steps)], check=True, stdout=subprocess.DEVNULL)
    state = tmp_path / "killed.partial" / TRAINING_STATE
    killed_once = False
    while not killed.exists():
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL)
        while not killed_once and process.poll() is None and not state.exists():
            time.sleep(0.01)
        if not killed_once:
            time.sleep(0.1)  # some steps later, wherever that is
            process.kill()
        code = process.wait()
        assert code == 0 or (not killed_once and code == -signal.SIGKILL)
        killed_once |= code == -signal.SIGKILL
    assert killed_once
    assert weights_bytes(killed) == weights_bytes(whole)


@pytest.mark.parametrize("stage", [warmup, joint])
def test_ctrl_c_saves_and_resumes_to_the_same_bits(
    stage, tiny: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gaps = ["--position-span", "300"]
    arguments = command(tiny, records, tmp_path / "whole", 6, "--passes", "2", *gaps)
    if stage is joint:
        warmup.main(command(tiny, records, tmp_path / "warm", 1))
        arguments = command(tmp_path / "warm", records, tmp_path / "whole", 6)
        arguments = [*arguments[: 2 - len(SMALL_INDEXER)], *gaps]
    stage.main(arguments)
    cut = [str(tmp_path / "cut") if a == str(tmp_path / "whole") else a for a in arguments]
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(KeyboardInterrupt, match="step 3 of 6"):
            stage.main(cut)
    assert not (tmp_path / "cut").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    assert "once more: in the middle of it, when torch's current call is done" in capsys.readouterr().out
    metrics = tmp_path / "cut.partial" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 4, "kl": 1.0}\n{"step": 5, "k')  # lines after the last state
    stage.main(cut)
    assert weights_bytes(tmp_path / "cut") == weights_bytes(tmp_path / "whole")
    assert not (tmp_path / "cut.partial").exists() and not (tmp_path / "cut" / "state.pt").exists()
    for folder in ("cut", "whole"):
        steps = [line.split(",")[0] for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        assert steps[1:7] == [f'{{"step": {n}' for n in range(1, 7)] and len(steps) == 8
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines[1:7]]
    assert seconds == sorted(seconds), "the time before the stop counts"


def test_another_configuration_is_refused_and_overwrite_starts_again(
    tiny: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            warmup.main(command(tiny, records, tmp_path / "w", 4))
    with pytest.raises(UserError, match=r"another configuration .*lr: 0.01 there, 0.5 now"):
        warmup.main(command(tiny, records, tmp_path / "w", 4, "--lr", "0.5"))
    with pytest.raises(UserError, match="seed"):
        warmup.main(command(tiny, records, tmp_path / "w", 4, "--seed", "7"))
    assert (tmp_path / "w.partial" / "state.pt").exists()
    warmup.main(command(tiny, records, tmp_path / "w", 4, "--lr", "0.5", "--overwrite"))
    assert (tmp_path / "w" / "manifest.json").exists()
    assert [m["step"] for m in trainer.read_steps(tmp_path / "w")] == [1, 2, 3, 4]


@pytest.mark.parametrize("changed", ["model", "data"])
def test_a_model_or_data_that_changed_in_place_are_another_configuration(
    changed: str, tiny: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = shutil.copytree(tiny, tmp_path / "tiny"), shutil.copy(records, tmp_path / "sft.jsonl")
    arguments = command(model, text, tmp_path / "w", 4)
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            warmup.main(arguments)
    if changed == "data":
        text.write_text(text.read_text().replace("sparse", "dense"))
    else:
        state = load_file(model / "model.safetensors")
        save_file({name: 2 * tensor for name, tensor in state.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"another configuration \({changed}: .* there, .* now"):
        warmup.main(arguments)


def test_a_stopped_run_that_overwrites_goes_on_too(
    tiny: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    warmup.main(command(tiny, records, tmp_path / "w", 2))
    again = command(tiny, records, tmp_path / "w", 4, "--lr", "0.5", "--overwrite")
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            warmup.main(again)
    before = weights_bytes(tmp_path / "w")
    warmup.main(again)
    assert "resuming from step 3 of 4" in capsys.readouterr().out
    assert weights_bytes(tmp_path / "w") != before


def test_an_interrupt_within_a_step_says_what_is_kept(
    tiny: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first asks for a stop after the step, the second does not wait for that."""
    step = trainer.Trainer._step

    def stopped_in_the_third(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "_step", stopped_in_the_third)
    with pytest.raises(KeyboardInterrupt, match=r"the last state saved is in .*w\.partial: the same command goes on"):
        warmup.main(command(tiny, records, tmp_path / "w", 4, "--save-every", "1"))


def test_differences_are_told_whole_but_for_hashes() -> None:
    names = [{"data": f"/a/long/folder/{name}.jsonl"} for name in ("one", "two")]
    assert trainer.first_difference(*names) == "data: /a/long/folder/one.jsonl there, /a/long/folder/two.jsonl now"
    hashes = [{"sha256": 64 * digit} for digit in "ab"]
    assert trainer.first_difference(*hashes) == f"sha256: {12 * 'a'} there, {12 * 'b'} now"
    assert trainer.first_difference({"a": {}}, {"a": {"lr": 0.5}}) == "a.lr: None there, 0.5 now"


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), "gradient"])
def test_a_loss_that_is_not_finite_stops_with_the_state_before_it(
    poison: float | str, tiny: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = warmup.warmup_terms
    calls = 0

    def poisoned(model, batch, **options):
        nonlocal calls
        calls += 1
        terms = healthy(model, batch, **options)
        if calls != 3:
            return terms
        if poison == "gradient":
            terms["kl"].register_hook(lambda gradient: gradient * float("inf"))
            return terms
        return terms | {"kl": terms["kl"] * poison}

    monkeypatch.setattr(warmup, "warmup_terms", poisoned)
    with pytest.raises(UserError, match=r"at step 3 \(windows \d+, \d+\).*lower --lr"):
        warmup.main(command(tiny, records, tmp_path / "w", 5))
    state = checkpoint.load_state(tmp_path / "w.partial")
    assert state is not None and state["step"] == 2
    assert all(tensor.isfinite().all() for tensor in state["weights"].values())


@pytest.mark.parametrize("when, mend", [("before", "check the checkpoint"), ("after", "lower --lr")])
def test_weights_that_are_not_finite_are_not_written(
    when: str, mend: str, tiny: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations = iter([{"kl": math.nan if when == "before" else 1.0}, {"kl": math.inf}])
    monkeypatch.setattr(warmup, "evaluate", lambda *_, **__: next(evaluations))
    with pytest.raises(UserError, match=f"{when} training: .*{mend}"):
        warmup.main(command(tiny, records, tmp_path / "w", 1))
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_loss_that_explodes_stops_and_a_single_odd_batch_does_not(
    stopped: bool, tiny: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = warmup.warmup_terms
    calls = 0

    def growing(model, batch, **options):
        nonlocal calls
        calls += 1
        terms = healthy(model, batch, **options)
        factor = 6 if calls == 11 else 20 if calls > 20 else 1
        return terms | {"kl": terms["kl"] * factor}

    monkeypatch.setattr(warmup, "warmup_terms", growing)
    if stopped:  # the steps before count
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(15, patch)
            warmup.main(command(tiny, records, tmp_path / "w", 60))
    with pytest.raises(UserError, match=r"kl explodes \(.* at first, .*\) at step 2[1-9] \(windows .*lower --lr"):
        warmup.main(command(tiny, records, tmp_path / "w", 60))
    state = checkpoint.load_state(tmp_path / "w.partial")
    assert state is not None and state["step"] == calls - 1 > 20


def test_a_full_disk_leaves_the_previous_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save_state(tmp_path, {"step": 1, "x": torch.zeros(1000)})

    def full(state, file) -> None:
        file.write(b"half of it")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # what torch raises

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError) as error:
            checkpoint.save_state(tmp_path, {"step": 2})
    assert error.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    state = checkpoint.load_state(tmp_path)
    assert state is not None and state["step"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_torch_reports_a_full_disk_the_way_we_expect(tmp_path: Path) -> None:
    (tmp_path / "state.pt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        checkpoint.save_state(tmp_path, {"x": torch.zeros(10_000_000)})
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "state.pt")


@pytest.mark.parametrize("content", [b"", b"not a state", broken_pickle()])
def test_an_unreadable_state_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(UserError, match="--overwrite"):
        checkpoint.load_state(tmp_path)


@pytest.mark.parametrize(
    "error, said",
    [
        (MemoryError(), "out of memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
            "out of mem",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "state.pt"), "state.pt: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "state.pt: Input/output error"),
    ],
)
def test_a_state_that_could_not_be_read_this_time_is_not_said_to_be_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    """Removing it would cost the hours that it holds."""
    checkpoint.save_state(tmp_path, {"step": 1})

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", failing)
    with pytest.raises(type(error)) as raised:
        checkpoint.load_state(tmp_path)
    message = user_message(raised.value)
    assert message is not None and said in message and "remove" not in message


def test_max_minutes_ends_the_run_early_with_a_checkpoint(tiny: Path, records: Path, tmp_path: Path, capsys) -> None:
    warmup.main(command(tiny, records, tmp_path / "w", 5000, "--max-minutes", "0.01"))
    assert (tmp_path / "w" / "manifest.json").exists()
    done = len((tmp_path / "w" / "metrics.jsonl").read_text().splitlines()) - 2  # the evaluations
    assert 1 <= done < 5000
    capsys.readouterr()
    warmup.main(command(tiny, records, tmp_path / "w", 5000))
    assert f"which ended after step {done} of 5000" in " ".join(capsys.readouterr().out.split())


def test_long_steps_are_saved_by_time(tiny: Path, records: Path, tmp_path: Path, monkeypatch) -> None:
    saved = []
    save = trainer.Trainer._save
    monkeypatch.setattr(trainer.Trainer, "_save", lambda self: (saved.append(self.step), save(self)))
    warmup.main(command(tiny, records, tmp_path / "seldom", 3))
    warmup.main(command(tiny, records, tmp_path / "by steps", 3, "--save-every", "2"))
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    warmup.main(command(tiny, records, tmp_path / "often", 3))
    assert saved == [3, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--length", "1"], "--length"),
        (["--length", "4096"], "beyond the model's 512 positions"),
        (["--position-span", "600"], "--position-span 600 is beyond the model's 512 positions"),
        (["--position-span", "48"], "--position-span 48 leaves no gaps in windows of 48 tokens"),
        (["--warmup-steps", "9"], "--warmup-steps 9 is more than --steps 4"),
        (["--model", "/no/such/model"], "no such folder"),
        (["--data", "/no/such/data"], "no such data"),
        (["--device", "cuda:77"], "--device"),
        (["--index-queries", "shared"], "index_queries"),
        (["--index-dim", "15"], "even"),
    ],
)
def test_bad_arguments_are_one_line_before_time_is_spent(
    arguments: list[str], message: str, tiny: Path, records: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        warmup.main([*command(tiny, records, tmp_path / "w", 4), *arguments])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_somebody_else_is_not_replaced(tiny: Path, records: Path, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not written by this toolchain"):
        warmup.main(command(tiny, records, tmp_path / "w", 4, "--overwrite"))
    assert (tmp_path / "w" / "thesis.tex").exists()


def test_errors_reach_the_shell_as_one_line(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "train.warmup", "--model", "/no/such/model", "--out", str(tmp_path / "w")]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
