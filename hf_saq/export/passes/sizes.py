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


def forget_names(model: Any) -> None:
    """Drop the names of nodes and shorten those of values between them; changes no result.

    Constants keep theirs, which say what layer they belong to, as do inputs and outputs of the graph.
    """
    for node in model.graph:
        node.name = None
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = None
    values = [value for node in model.graph for value in node.outputs if not value.is_graph_output()]
    for number, value in enumerate(values):
        value.name = str(number)
