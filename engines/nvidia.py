"""Builds TensorRT-RTX and TensorRT engines through Polygraphy, and looks into what was built.

One process builds for one product: Polygraphy chooses it at import, and our plugin library must never be loaded where
TensorRT-RTX parses (its parser would take the plugin, which the product does not run, and abort the process).
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from dsa_export.cli import UserError, progress_bar
from engines.artifacts import runtime_version
from engines.profiles import Profile
from plugins.load import PLUGINS, LibraryNotLoaded, load_library


def build_plan(
    onnx_path: Path,
    plan_path: Path,
    profiles: Sequence[Profile],
    *,
    product: str,
    title: str,
    compute_capabilities: Sequence[str] = (),
    plugin_library: Path | None = None,
    serialize_plugins: bool = False,
    timing_cache: Path | None = None,
) -> None:
    """Builds an engine from a graph of engines.nvidia_graph and writes the plan.

    product: "tensorrt-rtx" (needs no GPU) or "tensorrt". compute_capabilities: e.g. "8.9"; none leaves them open
    (TensorRT-RTX only). plugin_library: TensorRT only. timing_cache: a file that is read, if it is there, and written
    (TensorRT only: TensorRT-RTX times nothing while it builds).
    Raises UserError if the product is not installed or refuses the graph, KeyboardInterrupt on Ctrl-C.
    """
    trt = _import(product)
    from polygraphy.backend.trt import CreateConfig, NetworkFromOnnxPath, engine_bytes_from_network
    from polygraphy.backend.trt import Profile as ShapeRanges
    from polygraphy.exception import PolygraphyException

    ranges = []
    for profile in profiles:
        ranges.append(ShapeRanges())
        for name, (lowest, best, highest) in profile.shapes.items():
            ranges[-1].add(name, lowest, best, highest)
    with _collected_errors() as errors, _monitor(trt, title) as monitor:
        try:
            if plugin_library:
                # The parser finds the creators of a loaded library in the global registry.
                load_plugins(trt.get_plugin_registry(), plugin_library)
            builder, network, parser = NetworkFromOnnxPath(str(onnx_path), strongly_typed=True)()
            _allow_decomposed_attention(trt, network)
            config = CreateConfig(
                profiles=ranges,
                progress_monitor=monitor,
                profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
                load_timing_cache=str(timing_cache) if timing_cache and timing_cache.is_file() else None,
            )(builder, network)
            _set_compute_capabilities(trt, config, compute_capabilities)
            if plugin_library and serialize_plugins:
                config.plugins_to_serialize = [str(plugin_library.resolve())]
            plan = engine_bytes_from_network(
                (builder, network, parser), config, save_timing_cache=str(timing_cache) if timing_cache else None
            )
        except PolygraphyException as error:
            # The first error is the cause, but the parser describes the node first, at length.
            reason = next((line for line in errors if line.startswith("In node")), (errors or [str(error)])[0])
            raise UserError(f"{product} {trt.__version__} could not build {onnx_path}: {reason}") from None
    plan_path.write_bytes(memoryview(plan))


def load_plugins(registry: Any, library: Path) -> None:
    """Raises UserError if the library is missing, or does not register its operators."""
    try:
        load_library(registry, library)
    except LibraryNotLoaded as error:
        raise UserError(str(error)) from None


def plugin_layers(layer_information: str) -> dict[int, Counter[str]]:
    """How often each of our plugins is a layer, by profile, by the engine inspector's JSON (or trtexec's).

    A plan has the layers of all its profiles, those of a profile N > 0 under names that end in " [profile N]". The
    function bodies' layers carry the operators' names too; only layers that the product calls plugins count.
    """
    found: dict[int, Counter[str]] = {0: Counter()}
    for layer in json.loads(layer_information)["Layers"]:
        name = layer.get("Name", "") if isinstance(layer, dict) else layer
        profile = re.search(r" \[profile (\d+)\]$", name)
        counts = found.setdefault(int(profile.group(1)) if profile else 0, Counter())
        if _is_plugin(layer):
            text = json.dumps(layer)
            counts.update(plugin for plugin in PLUGINS if plugin in text)
    return found


def check_plugin_layers(layer_information: str, nodes: Mapping[str, int]) -> None:
    """Raises UserError unless every profile listed has a plugin layer for each of the graph's `nodes` by operator."""
    for profile, found in sorted(plugin_layers(layer_information).items()):
        if all(found[plugin] == nodes.get(plugin, 0) for plugin in PLUGINS):
            continue
        counts, wanted = (", ".join(f"{n.get(plugin, 0)} {plugin}" for plugin in PLUGINS) for n in (found, nodes))
        raise UserError(
            f"profile {profile} of the engine holds {counts} plugin layers instead of {wanted}: TensorRT took the "
            "function bodies; check that the plugin library matches this TensorRT version (make plugins)"
        )


def inspect(plan_path: Path) -> str:
    """The engine inspector's JSON of an engine that build_plan() has just built with TensorRT; needs a GPU."""
    trt = _import("tensorrt")
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # finds the plugins that the build loaded
    engine = runtime.deserialize_cuda_engine(plan_path.read_bytes())
    if engine is None:
        raise UserError(f"TensorRT {trt.__version__} cannot load the plan that it built: {plan_path}")
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _import(product: str) -> Any:
    runtime_version(product)
    if product == "tensorrt-rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when Polygraphy is first imported
        import tensorrt_rtx

        return tensorrt_rtx
    os.environ.pop("POLYGRAPHY_USE_TENSORRT_RTX", None)
    import tensorrt

    return tensorrt


def _is_plugin(layer: Any) -> bool:
    return isinstance(layer, dict) and "plugin" in str(layer.get("LayerType", "")).lower()


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Lets the builder take attention apart where the product has no fused kernel: it refuses the graph otherwise."""
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # as the bindings document for downcasts
            layer.attention.decomposable = True


def _set_compute_capabilities(trt: Any, config: Any, capabilities: Sequence[str]) -> None:
    if not capabilities:
        return
    known = {str(name): value for name, value in trt.ComputeCapability.__members__.items()}
    names = [f"SM{capability.replace('.', '')}" for capability in capabilities]
    for capability, name in zip(capabilities, names, strict=True):
        if name not in known:
            choices = ", ".join(f"{key[2:-1]}.{key[-1]}" for key in known if key.startswith("SM"))
            raise UserError(f"compute capability {capability} is unknown to this TensorRT-RTX; it knows {choices}")
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(known[name], index)


@contextmanager
def _collected_errors() -> Iterator[list[str]]:
    """Collects what TensorRT and Polygraphy report as errors instead of printing it."""
    from polygraphy.logger import G_LOGGER

    messages: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: messages.append(  # type: ignore[method-assign]
        " ".join(record.getMessage().removeprefix("[E] ").split())
    )
    G_LOGGER.colors = False  # it would print that it lacks the module for them
    G_LOGGER.use_python_logging_system = True
    logger = logging.getLogger("Polygraphy")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            yield messages
    finally:
        logger.removeHandler(handler)
        G_LOGGER.use_python_logging_system = False


@contextmanager
def _monitor(trt: Any, title: str) -> Iterator[Any]:
    """An IProgressMonitor that shows the build's outer phases in a progress bar and stops the build on Ctrl-C.

    A KeyboardInterrupt must not be raised while C++ frames stand between it and its handler: the signal is noted, the
    next step stops the build, and then it is raised.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self, progress: Progress):
            trt.IProgressMonitor.__init__(self)
            self.progress = progress
            self.tasks: dict[str, TaskID] = {}
            self.depth: dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.depth[phase] = self.depth.get(parent or "", -1) + 1
            if self.depth[phase] < 2:
                name = f"{'  ' * self.depth[phase]}{phase if parent else title}"
                self.tasks[phase] = self.progress.add_task(name, total=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.tasks:
                self.progress.update(self.tasks[phase], completed=step + 1)
            return not self.interrupted

        def phase_finish(self, phase: str) -> None:
            if phase in self.tasks:
                self.progress.update(self.tasks.pop(phase), visible=self.depth[phase] == 0)

        def interrupt(self, *_: object) -> None:
            self.interrupted = True

    with progress_bar() as progress:
        monitor = Monitor(progress)
        before = {number: signal.signal(number, monitor.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield monitor
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if monitor.interrupted:
                raise KeyboardInterrupt
