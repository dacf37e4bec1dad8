"""Run a graph in an engine under the engine's own profiler."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...export.extras import compiled_by_openvino, needed

Nanoseconds = dict[str, float]
"""Name of a node -> what one call of it took."""


@dataclass(frozen=True)
class RunningNode:
    """Describes a node that an engine runs.

    Attributes:
        name: That in profiles.
        op_type: What the engine calls it.
        inputs, outputs: Names of values. What is called as in the export is that value; `outputs` has all those that
            the node computes, also the ones that nobody else reads.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Profiler(Protocol):
    """Holds a graph that is loaded and profiled; made of its content, a path that files of the engine may begin with,
    and a number of threads. `nodes` are in their order."""

    nodes: list[RunningNode]

    def run(self, images: np.ndarray) -> None: ...

    def finish(self) -> list[Nanoseconds]:
        """Return the times of every call, and end."""


class _OnnxRuntime:
    """Writes the graph that the engine makes of an export to a file, names its nodes, and runs it as it stands: names
    in the profile are then those of nodes that can be looked at."""

    EVENT = "_kernel_time"
    """What the profiler writes behind the name of a node."""

    def __init__(self, content: bytes, path: Path, threads: int):
        onnx: Any = needed("onnx")
        optimized = path.with_suffix(".onnx")
        self._session(content, threads, "ORT_ENABLE_ALL", optimized_model_filepath=str(optimized))
        model = onnx.load(optimized)
        for number, node in enumerate(model.graph.node):
            node.name = f"node{number}"
        self.nodes = [RunningNode(n.name, n.op_type, tuple(n.input), tuple(n.output)) for n in model.graph.node]
        self.session = self._session(
            model.SerializeToString(), threads, "ORT_DISABLE_ALL", enable_profiling=True, profile_file_prefix=str(path)
        )
        self.input = self.session.get_inputs()[0].name

    def _session(self, content: bytes, threads: int, level: str, **fields: Any) -> Any:
        runtime: Any = needed("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
        # Threads that wait for more work would take time from the graph whose turn is next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for name, value in fields.items():
            setattr(options, name, value)
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(self, images: np.ndarray) -> None:
        self.session.run(None, {self.input: images})

    def finish(self) -> list[Nanoseconds]:
        """Read the file of the profile, in which a call is written after its nodes."""
        runs: list[Nanoseconds] = []
        nodes: Nanoseconds = {}
        for event in json.loads(Path(self.session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith(self.EVENT):
                nodes[event["name"].removesuffix(self.EVENT)] = 1000.0 * event["dur"]
            elif event.get("name") == "model_run":
                runs.append(nodes)
                nodes = {}
        return runs


class _OpenVino:
    """Reads what each node took after every call, and which nodes of the export it was made of."""

    def __init__(self, content: bytes, path: Path, threads: int):  # noqa: ARG002 (it writes no files)
        compiled = compiled_by_openvino(content, INFERENCE_NUM_THREADS=threads, PERF_COUNT=True)
        self.request = compiled.create_infer_request()
        self.nodes = [self._node(operator) for operator in compiled.get_runtime_model().get_ordered_ops()]
        self.runs: list[Nanoseconds] = []

    def _node(self, operator: Any) -> RunningNode:
        """Take its output under its own name, and those of the nodes that were fused, which are those of their
        values: the export's nodes have no names."""
        name, info = operator.get_friendly_name(), operator.get_rt_info()
        made_of, kind = (info[key].astype(str) if key in info else "" for key in ("originalLayersNames", "layerType"))
        values = dict.fromkeys(part.split("/")[0] for part in made_of.split(",") if part)
        inputs = [f"out of {v.get_node().get_friendly_name()}" for v in operator.input_values()]
        return RunningNode(name, kind, tuple(inputs), (f"out of {name}", *values))

    def run(self, images: np.ndarray) -> None:
        self.request.infer(images)
        times = {node.name: 0.0 for node in self.nodes}
        for found in self.request.get_profiling_info():
            if found.node_name in times:
                times[found.node_name] += 1000.0 * found.real_time.total_seconds() * 1e6
        self.runs.append(times)

    def finish(self) -> list[Nanoseconds]:
        return self.runs


PROFILERS: dict[str, Callable[[bytes, Path, int], Profiler]] = {"onnxruntime": _OnnxRuntime, "openvino": _OpenVino}
"""Library -> what profiles a graph in it."""
