"""Drop what a graph can be run without."""

from __future__ import annotations

from typing import Any


def forget_shapes(model: Any) -> None:
    """Drop the shapes of values between nodes, which would be stored as `value_info`; changes no result.

    They are a good part of a small file, and wrong ones, which a rewritten node may leave, stop the runtime of
    browsers. Engines infer them again.
    """
    outputs = (value for node in model.graph for value in node.outputs)
    for value in (*outputs, *model.graph.initializers.values()):  # constants say themselves what they are
        value.metadata_props.clear()
        if not value.is_graph_output():
            value.shape = value.type = None
