"""Several processes for one run: who they are, and how a model is spread over them.

`accelerate launch` or torchrun starts them; a single process is the case count = 1 and needs nothing. The micro-batches
of an update are dealt out to the processes, whatever their number: the same arguments mean the same update. Sums over
the whole update (labels, tokens, losses) are sums over the processes; the gradients are summed by DDP, or by FSDP2,
which also leaves each process only its share of the weights, gradients and optimiser states.
"""

from __future__ import annotations

import copy
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dsa_export.cli import UserError, console, first_line

PATIENCE = timedelta(hours=2)
"""How long the other processes wait while the first one reads data, evaluates or writes."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them."""

    device: torch.device
    rank: int = 0
    count: int = 1
    sharded: bool = False  # FSDP2 instead of DDP

    @property
    def is_first(self) -> bool:
        """Whether this is the one that evaluates, speaks and writes."""
        return self.rank == 0

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over the processes, which must give the same names in the same order."""
        if self.count == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag whether it is true in any process: all of them get the same answers."""
        return [total > 0 for total in self.sum({str(n): float(flag) for n, flag in enumerate(flags)}).values()]

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.count > 1:
            dist.barrier()

    def leave(self) -> None:
        """Ends the run together with the other processes. DDP's wrapper may not be alive any more.

        gloo's thread needs Python's lock to free the tensors of what it did last. If the process group goes, with the
        lock held, before that (as in the destructor of DDP's reducer), both wait forever; if Python ends, it aborts.
        """
        if self.count > 1:
            gc.collect()  # what a cycle holds, such as the frames of an exception that a library keeps
            dist.barrier()
            time.sleep(0.1)  # without the lock
            dist.destroy_process_group()

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process runs the block alone, then the others: what it wrote is there for them."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()


def start(device: str, parallel: str | None) -> Processes:
    """Joins the processes that the launcher started, if it did.

    device: "auto", "cpu", "cuda", "cuda:1" …; with several processes each takes the GPU of its local rank.
    parallel: "ddp" or "fsdp"; None: fsdp if `accelerate launch` was told --use_fsdp, else ddp.
    Raises UserError if there is no such device, or --parallel fsdp is given to a single process.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        if parallel is not None:
            raise UserError(f"--parallel {parallel} needs several processes: torchrun --nproc-per-node 2 -m train.…")
        return Processes(pick_device(device))
    on_cpu = pick_device(device).type == "cpu"  # without being told so, accelerate would join nobody on CPUs
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    console.quiet = not state.is_main_process
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP") if parallel is None else parallel == "fsdp"
    return Processes(state.device, state.process_index, state.num_processes, sharded)


def pick_device(name: str) -> torch.device:
    """A CPU or a GPU, which becomes torch's current one. Raises UserError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {first_line(error)}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda will do")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


class Spread:
    """A model spread over processes. `model` is what trains; `whole` what the first process evaluates and saves.

    They are one and the same except with FSDP2, where `model` is a copy in shards and `whole` waits in CPU memory.
    """

    def __init__(self, model: Any, processes: Processes):
        self.processes = processes
        self.whole = model.cpu() if processes.sharded else model.to(processes.device)
        self.model = copy.deepcopy(model) if processes.sharded else model
        self.module: nn.Module = _Runner(self.model)
        if processes.sharded:
            mesh = dist.device_mesh.init_device_mesh(processes.device.type, (processes.count,))
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.module, mesh=mesh)
        elif processes.count > 1:
            self.module = DistributedDataParallel(self.module)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(model, *args), through the wrapper that gathers weights and gradients."""
        return self.module(function, *args)

    def exchange(self, *, last: bool) -> AbstractContextManager:
        """Around run() and backward() of a micro-batch: DDP exchanges gradients in the `last` one of an update only."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of the sum of all processes' losses."""
        (loss * self.processes.count).backward()  # both wrappers take the mean over the processes

    @torch.no_grad()
    def gather(self) -> Any:
        """Brings the first process's `whole` up to date and returns it. Every process must call it."""
        if self.processes.sharded:
            for shard, parameter in zip(self.model.parameters(), self.whole.parameters(), strict=True):
                if shard.requires_grad:
                    value = collect(shard, self.processes.is_first)
                    if self.processes.is_first:
                        parameter.copy_(value)
        return self.whole


class _Runner(nn.Module):
    """Lets a wrapper, which knows forward() only, run any function of the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


def collect(tensor: Tensor, keep: bool = True) -> Tensor:
    """The whole of a tensor, in the CPU's memory if it was in shards. Every process must call it.

    A process that does not `keep` it gets an empty tensor.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    whole = tensor.full_tensor()
    return whole.cpu() if keep else whole.new_empty(0)


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`, which every process holds whole, in shards if `parameter` is."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def optimizer_state(optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Any]:
    """optimizer.state_dict() with its tensors as collect() returns them. Every process must call it."""
    saved = optimizer.state_dict()
    state = {
        index: {name: collect(value, keep) for name, value in entry.items()} for index, entry in saved["state"].items()
    }
    return saved | {"state": state}


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {name: like(parameters[index], value) if value.ndim else value for name, value in entry.items()}
        for index, entry in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state})
