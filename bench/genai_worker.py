"""Times decoding of an onnxruntime-genai model; run by bench.peers in an interpreter that has that package.

Reads one JSON object from standard input: model (folder), threads, contexts (ascending), tokens (as many as the longest
context), runs, at_most (seconds per context), chunk (tokens per prefill call). Writes JSON lines: {"done": tokens} as
the prompt is processed, and per context {"context", "ttft_s", "ms": [...], "peak_mib", "versions"}; peak_mib is what
the model added to the process, as bench.runs.PEAK_MIB says of our engines.

A context n is timed as bench times its own engines: one token after n - 1 others, again and again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from dsa_export.memory import PeakMemory
from engines.huge_pages import huge_pages  # neither needs another package

WARM_UP = 2
MIN_RUNS = 3


def main() -> None:
    if "--help" in sys.argv:
        print("run by `python bench/compare.py --genai DIR`, which says on standard input what to time")
        return
    try:
        import onnxruntime
        import onnxruntime_genai as og
    except ModuleNotFoundError as error:
        sys.exit(f"{sys.executable} lacks onnxruntime-genai ({error}): pip install onnxruntime-genai")
    task = json.load(sys.stdin)
    memory = PeakMemory()
    config = og.Config(task["model"])
    threads = {"intra_op_num_threads": task["threads"]}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    with huge_pages():  # as our engines
        model = og.Model(config)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=task["contexts"][-1], do_sample=False)
    generator = og.Generator(model, parameters)
    tokens, done, prefill_s = task["tokens"], 0, 0.0
    for context in task["contexts"]:
        while done < context - 1:
            stop = min(done + task["chunk"], context - 1)
            prefill_s += timed(generator, tokens[done:stop])
            done = stop
            report({"done": done})
        ms: list[float] = []
        for run in range(WARM_UP + task["runs"]):
            seconds = timed(generator, tokens[context - 1 : context])
            generator.rewind_to(context - 1)
            if run >= WARM_UP:
                ms.append(seconds * 1e3)
            if len(ms) >= MIN_RUNS and sum(ms) > task["at_most"] * 1e3:
                break
        versions = {"onnxruntime-genai": og.__version__, "onnxruntime": onnxruntime.__version__}
        report(
            {
                "context": context,
                "ttft_s": prefill_s + ms[0] / 1e3,
                "ms": ms,
                "peak_mib": memory.mib(),
                "versions": versions,
            }
        )


def timed(generator, tokens: list[int]) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    generator.append_tokens(tokens)
    return time.perf_counter() - start


def report(facts: dict[str, object]) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
