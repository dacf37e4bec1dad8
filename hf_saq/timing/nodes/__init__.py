"""Time the nodes of graphs by the profiler of an engine, and tell which layers they belong to.

`turns.py` lets graphs take turns, `profilers.py` runs one in an engine and reads its profile, and `owners.py` finds
the layers of the nodes that ran.
"""

from .owners import layer_times, owners_of_nodes
from .profilers import PROFILERS, RunningNode
from .turns import NodeTimes, time_nodes

__all__ = ["PROFILERS", "NodeTimes", "RunningNode", "layer_times", "owners_of_nodes", "time_nodes"]
