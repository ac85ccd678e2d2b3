"""Streaming calibration data through a program that is being rewritten.

A pass that needs the activations at its sites, as the *already rewritten* earlier part of the graph
makes them, walks the sites in order:

    stream = Stream(program, context.calibration)
    for site in sites:
        batches = stream.inputs_of(site)      # values of the site's inputs, one tuple per batch
        ... rewrite the site ...

Only values that later nodes still need are kept: one layer's worth, not the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from resplice.context import Batch
from resplice.errors import PassError
from resplice.program import Program
from resplice.walk import run_node


class Stream:
    """Executes a program on several batches, up to one node after the other.

    Nodes that have been executed must not be changed any more; what comes after may be, and may use
    what has been executed: a value that was dropped since nothing needed it is computed again.
    """

    def __init__(self, program: Program, batches: Sequence[Batch]) -> None:
        """Start before the first node."""
        self.program = program
        self._batches = batches
        self._values: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self._done: set[fx.Node] = set()

    def inputs_of(self, site: fx.Node) -> list[tuple[Any, ...]]:
        """Values of the site's input nodes (in `all_input_nodes` order), one tuple per batch.

        Raises:
            PassError: The site has been executed already; visit sites in graph order.
        """
        if site in self._done:
            raise PassError(
                "stream", f"{site.name} is behind the stream; visit sites in graph order"
            )
        self._release()  # nodes may have been replaced since the last call
        for node in self.program.graph.nodes:
            if node is site:
                break
            if node not in self._done:
                self._execute(node)
                self._release()
        self._recall(site)
        return [tuple(values[n] for n in site.all_input_nodes) for values in self._values]

    @property
    def live(self) -> int:
        """Number of values held per batch."""
        return len(self._values[0]) if self._values else 0

    def _recall(self, node: fx.Node) -> None:
        """Compute again what a node reads and nobody needed when it was dropped."""
        for source in node.all_input_nodes if self._values else ():
            if source not in self._values[0]:
                self._execute(source)

    def _execute(self, node: fx.Node) -> None:
        self._recall(node)
        with torch.no_grad():
            for values, batch in zip(self._values, self._batches, strict=True):
                values[node] = run_node(self.program, node, values, batch)
        self._done.add(node)

    def _release(self) -> None:
        """Drop what no later node needs: replaced nodes, and values whose users have all run."""
        for values in self._values:
            for node in list(values):
                if node._erased or all(user in self._done for user in node.users):
                    del values[node]
