"""Others that run the same weights, in the same run: what a user would reach for instead. Decoding, batch 1.

    transformers  the stock model of the checkpoint's family, attention by sdpa, its default cache
    masked        "sparse" attention as research code writes it: dense scores, all but the selected ones masked
    genai         onnxruntime-genai's own export of the model, in a process of its own

A peer that cannot run here is reported as skipped, with the reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError

from bench import measure
from bench.matrix import MARGIN_BYTES, Group, host_bytes
from bench.runs import PEAK_MIB
from dsa_export.cli import UserError, progress_bar
from dsa_export.files import read_manifest
from dsa_export.memory import PeakMemory

if TYPE_CHECKING:
    import torch

NAMES = ("transformers", "masked")
CHUNK = 512
WORKER = Path(__file__).with_name("genai_worker.py")
MASKED = "masked (dense scores, top-k mask)"

Record = dict[str, Any]
Cache = Any


@dataclass(frozen=True)
class Task:
    """checkpoint: folder or hub name. contexts: ascending. text: tokens [longest]. k: one, or one per layer."""

    checkpoint: str
    contexts: Sequence[int]
    text: np.ndarray
    caches: str  # prefill | random
    k: int | list[int]
    selection: dict[str, Any]  # its other options, by field of DSAConfig
    budget: measure.Budget
    threads: int


def checkpoint_of(group: Group) -> str:
    """The checkpoint that a group's weights come from, as its export recorded it."""
    export = Path(group.sparse.manifest["source"]["path"])
    return str(read_manifest(export, "onnx", "python -m dsa_export.onnx")["source"]["path"])


def measure_torch(name: str, task: Task) -> list[Record]:
    """Records of the peer `transformers` or `masked`: one per context, measured in a process of its own."""
    free = host_bytes()
    contexts = [n for n in task.contexts if torch_bytes(task.checkpoint, n) <= free]
    records: list[Record] = []
    if contexts:
        records = measure.in_child(_measure_torch, name, task, contexts, method="spawn")
    peer = MASKED if name == "masked" else name
    reason = f"needs more than the {free / 2**30:.1f} GiB that are free"
    skips = [
        {"kind": "skipped", "peer": peer, "context": n, "reason": reason} for n in task.contexts if n not in contexts
    ]
    return records + skips


def torch_bytes(checkpoint: str, context: int) -> int:
    """What a torch peer needs in fp32: the weights, and the cache twice, since every step may copy it."""
    from dsa_export.model import families
    from dsa_export.model.attention import VARIANTS
    from dsa_export.model.checkpoint import empty_model, load_config

    dense = families.dense_config(load_config(checkpoint))
    layout = VARIANTS[dense.attention].cache_layout(dense, 0)
    per_token = 4 * sum(entry.heads * entry.dim for entry in layout) * dense.num_hidden_layers
    return 4 * empty_model(dense).num_parameters() + 2 * context * per_token + MARGIN_BYTES


def _measure_torch(name: str, task: Task, contexts: Sequence[int]) -> list[Record]:
    import torch
    import transformers

    torch.set_num_threads(task.threads)
    memory = PeakMemory()
    make = MaskedPeer if name == "masked" else TransformersPeer
    records: list[Record] = []
    with torch.no_grad(), progress_bar() as progress:
        peer = make(task)
        bar = progress.add_task(peer.title, total=contexts[-1])
        filled, seconds = 0, 0.0
        for context in contexts:
            if task.caches == "random":
                peer.randomise(context)
            else:
                for start in range(filled, context, CHUNK):
                    chunk = task.text[start : min(start + CHUNK, context)]
                    seconds += measure.timed(lambda chunk=chunk: peer.append(chunk))  # type: ignore[misc]
                    progress.advance(bar, len(chunk))
            filled = context
            ms = measure.alternate({"": _decode(peer, context, task.text)}, task.budget, lambda: None)[""]
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            ttft_s = seconds if task.caches == "prefill" else None
            records.append(record(peer.title, "fp32", context, ms, task.caches, ttft_s, memory.mib(), versions))
    return records


def _decode(peer: Any, context: int, text: np.ndarray) -> Callable[[], Any]:
    def call() -> None:
        peer.crop(context - 1)
        peer.append(text[context - 1 : context])

    return call


class TransformersPeer:
    """The stock model of the family on the checkpoint's weights; what a sparse variant added to them is left out."""

    title = "transformers (sdpa)"

    def __init__(self, task: Task):
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        from dsa_export.config import DSAConfig
        from dsa_export.model import families
        from dsa_export.model.checkpoint import is_added, load_config, quiet_transformers

        config, added_by = load_config(task.checkpoint), "dense"
        if isinstance(config, DSAConfig):
            config, added_by = families.stock_config(config), config.attention
        options = {"dtype": torch.float32, "attn_implementation": "sdpa", "output_loading_info": True}
        with quiet_transformers():
            self.model, info = AutoModelForCausalLM.from_pretrained(task.checkpoint, config=config, **options)
        unexpected = [key for key in info["unexpected_keys"] if not is_added(key, added_by)]
        if info["missing_keys"] or unexpected:
            raise UserError(
                f"{task.checkpoint} does not fit the stock model: {[*info['missing_keys'], *unexpected][0]}"
            )
        self.model.eval()
        self.cache: Cache = DynamicCache()
        self.new_cache = DynamicCache

    def append(self, tokens: np.ndarray) -> None:
        self.model(_row(tokens), cache=self.cache, use_cache=True, logits_to_keep=1)

    def crop(self, tokens: int) -> None:
        if self.cache.get_seq_length() > tokens:
            self.cache.crop(tokens - self.cache.get_seq_length())

    def randomise(self, tokens: int) -> None:
        import torch

        self.cache = self.new_cache()
        self.append(np.zeros(1, np.int64))  # shows what the family keeps of a token
        shapes = [[(1, kept.shape[1], tokens, kept.shape[3]) for kept in (x.keys, x.values)] for x in self.cache.layers]
        self.cache = self.new_cache()
        for layer, (key, value) in enumerate(shapes):
            self.cache.update(torch.randn(key), torch.randn(value), layer)


class MaskedPeer:
    """Our model with the core that this project exists to avoid: in training mode the attention layers compute dense
    scores and mask what the indexer did not select (dsa_export.model.attention.dsa.masked_attention)."""

    title = MASKED

    def __init__(self, task: Task):
        from dsa_export.model import load_model
        from dsa_export.model.attention import DenseAttention
        from dsa_export.model.cache import DSACache

        self.model = load_model(task.checkpoint, index_topk=task.k, **task.selection)
        for module in self.model.modules():
            if isinstance(module, DenseAttention):
                module.train()
        self.cache = DSACache(self.model.model.cache_layouts)

    def append(self, tokens: np.ndarray) -> None:
        self.model(_row(tokens), cache=self.cache, use_cache=True, logits_to_keep=1)

    def crop(self, tokens: int) -> None:
        self.cache.crop(min(tokens - self.cache.columns, 0))

    def randomise(self, tokens: int) -> None:
        import torch

        from dsa_export.model.cache import fill_randomly

        self.cache.reset()
        self.cache.begin(1, tokens, torch.float32, torch.device("cpu"))
        fill_randomly((tensor for tensors in self.cache.layers for tensor in tensors.values()), seed=0)
        self.cache.advance(torch.tensor([tokens]), tokens)


def _row(tokens: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(tokens))[None]


# onnxruntime-genai


def genai_python(given: Path | None) -> str:
    """The interpreter that has onnxruntime-genai. Raises UserError if there is none."""
    if given:
        if not os.access(given, os.X_OK):
            raise UserError(f"--genai-python {given} is no program that can be run")
        return str(given)
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise UserError("onnxruntime-genai is not installed: pip install onnxruntime-genai, or name --genai-python")
    return sys.executable


def genai_model(model: Path) -> tuple[int, str]:
    """Context length and precision of a model of onnxruntime-genai's builder. Raises UserError if it is none."""
    if not (model / "genai_config.json").is_file():
        raise UserError(
            f"{model} holds no genai_config.json: make it with `python -m onnxruntime_genai.models.builder "
            f"-i CHECKPOINT -o {model} -p int4 -e cpu`"
        )
    try:
        limit = int(json.loads((model / "genai_config.json").read_text())["model"]["context_length"])
        return limit, genai_precision(model)
    except (OSError, ValueError, KeyError, TypeError, StopIteration, DecodeError) as error:
        raise UserError(f"{model} is not as onnxruntime-genai's builder writes it: {error}") from None


def measure_genai(model: Path, python: str, task: Task) -> list[Record]:
    """Records of onnxruntime-genai: it always computes its caches from the text. Raises UserError if it fails."""
    limit, precision = genai_model(model)
    contexts = [n for n in task.contexts if n <= limit]
    peer = f"onnxruntime-genai ({model.name})"
    reason = f"beyond its context length of {limit:,}"
    records: list[Record] = [
        {"kind": "skipped", "peer": peer, "context": n, "reason": reason} for n in task.contexts if n > limit
    ]
    if not contexts:
        return records
    order = {
        "model": str(model),
        "threads": task.threads,
        "contexts": contexts,
        "tokens": task.text[: contexts[-1]].tolist(),
        "runs": task.budget.runs,
        "at_most": min(task.budget.at_most, 1e9),
        "chunk": CHUNK,
    }
    with (
        progress_bar() as progress,
        tempfile.TemporaryFile("w+") as complaints,  # a pipe that is not read would fill, and stop the worker
        subprocess.Popen(
            [python, "-I", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True
        ) as worker,
    ):
        bar = progress.add_task(peer, total=contexts[-1])
        assert worker.stdin and worker.stdout
        try:
            worker.stdin.write(json.dumps(order))
            worker.stdin.close()
            for line in worker.stdout:
                facts = json.loads(line)
                if "done" in facts:
                    progress.update(bar, completed=facts["done"])
                    continue
                ms = np.array(facts["ms"])
                found = record(
                    peer,
                    precision,
                    facts["context"],
                    ms,
                    "prefill",
                    facts["ttft_s"],
                    facts["peak_mib"],
                    facts["versions"],
                )
                records.append(found)
        except BrokenPipeError:
            pass  # it has ended: with what exit code is seen below
        except BaseException:
            worker.terminate()
            raise
        worker.wait()
        complaints.seek(0)
        complaint = complaints.read().strip().splitlines()
    if worker.returncode:
        raise UserError(f"{peer} failed: {complaint[-1] if complaint else f'exit code {worker.returncode}'}")
    return records


def genai_precision(model: Path) -> str:
    """int4 or int8 if the graph's matrix products are quantised, else the type of its caches."""
    import onnx

    graph = onnx.load(model / "model.onnx", load_external_data=False).graph
    bits = [a.i for node in graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"]
    if bits:
        return f"int{int(median(bits))}"
    kinds = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    cache = next(value for value in graph.input if value.name.startswith("past_key_values"))
    return kinds[cache.type.tensor_type.elem_type]


def record(
    peer: str,
    precision: str,
    context: int,
    ms: np.ndarray,
    caches: str,
    ttft_s: float | None,
    peak_mib: float | None,
    versions: dict[str, str],
) -> Record:
    timing = measure.Timing.of(ms)
    return {
        "kind": "peer",
        "peer": peer,
        "precision": precision,
        "phase": "decode",
        "batch": 1,
        "context": context,
        "caches": caches,
        "ms_median": timing.median,
        "ms_p10": timing.p10,
        "ms_p90": timing.p90,
        "runs": timing.runs,
        "tokens_per_s": 1e3 / timing.median,
        "ttft_s": ttft_s,
        "peak_mib": peak_mib,
        "peak_mib_is": PEAK_MIB,
        "versions": versions,
    }
