"""Which attentions of a program have the frames of a video in their tokens or in their batch.

The token axis is found to factor as (T, S), from where its axes come from (`resplice.axes`): three
axes T, H, W of one input, all of them tokens (`joint`), the first a token axis and the others in
the batch (`temporal`), or the other way round (`spatial`); `cross` where keys are other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from resplice.axes import Atom, Axis, Segment, axes_of, size_of
from resplice.change import Refused
from resplice.origin import module_path
from resplice.passes.tdtm.frames import Frames, frames_in, same, shape_of
from resplice.pattern import argument
from resplice.program import Program

aten = torch.ops.aten
Kind = Literal["spatial", "temporal", "joint", "cross"]
Mark = tuple[str, int]


@dataclass(frozen=True)
class AttentionSite:
    """One attention over, within or from the frames of a video.

    Attributes:
        node: The attention.
        kind: What it attends to; see the top of this file.
        layer: Number among those of its kind, in the order of execution, from 0.
        queries: Where the frames are in the queries (and in the result).
        keys: Where they are in the keys and values, None if they are not.
        mark: Source and axis of the frames' atom.
        module: Path of the module it was captured from; a hint for people only.
    """

    node: fx.Node
    kind: Kind
    layer: int
    queries: Frames
    keys: Frames | None
    mark: Mark
    module: str

    @property
    def frames(self) -> int:
        """T."""
        return self.queries.count


@dataclass
class Sites:
    """What `find_sites` found.

    Attributes:
        found: The sites in the order of execution.
        refused: Other attentions, each with the reason.
        axes: The axes of every value.
    """

    found: list[AttentionSite] = field(default_factory=list)
    refused: list[tuple[fx.Node, str]] = field(default_factory=list)
    axes: dict[fx.Node, list[Axis]] = field(default_factory=dict)


def find_sites(program: Program) -> Sites:
    """Find the attentions that can be told to belong to a video.

    Args:
        program: In normal form (`canonicalize`).
    """
    result = Sites(axes=axes_of(program))
    counts: dict[str, int] = {}
    target = aten.scaled_dot_product_attention.default
    for node in program.graph.find_nodes(op="call_function", target=target):
        try:
            kind, queries, keys, mark = _located(node, result.axes)
        except Refused as reason:
            result.refused.append((node, str(reason)))
            continue
        layer = counts.get(kind, 0)
        counts[kind] = layer + 1
        result.found.append(
            AttentionSite(node, kind, layer, queries, keys, mark, module_path(node))
        )
    return result


def _located(
    node: fx.Node, axes: dict[fx.Node, list[Axis]]
) -> tuple[Kind, Frames, Frames | None, Mark]:
    q, k, v = (n for n in node.args[:3] if isinstance(n, fx.Node))
    if argument(node, "is_causal") or argument(node, "dropout_p"):
        raise Refused("it is causal or drops weights")
    mark, size, rest = _time(axes[q])
    places = [
        found
        for i, axis in enumerate(axes[q])
        if (found := frames_in(axis, mark, size, i - len(axes[q]))) is not None
    ]
    if len(places) != 1 or places[0].axis == -1:
        raise Refused("its frames are spread over several axes")
    queries = places[0]
    own = _same_tokens(axes[q], axes[k], axes[v], mark)
    kind: Kind = "cross" if not own else "spatial" if queries.axis != -2 else (
        "joint" if rest else "temporal"
    )  # fmt: skip
    return kind, queries, _key_frames(queries, own, q, k), mark


def _key_frames(queries: Frames, own: bool, q: fx.Node, k: fx.Node) -> Frames | None:
    """Keys share the batch axes with the queries, and the tokens in self-attention."""
    if queries.axis == -2:
        return queries if own else None
    size = shape_of(k)[queries.axis]
    if same(size, 1):
        return None
    if not same(size, shape_of(q)[queries.axis]):
        raise Refused(f"it has {shape_of(q)[queries.axis]} query groups and {size} key groups")
    return queries


def _same_tokens(q: Sequence[Axis], k: Sequence[Axis], v: Sequence[Axis], mark: Mark) -> bool:
    """Whether keys are the tokens that ask: the same video among as many other tokens.

    Positions may say more of queries and keys than is known of the values.
    """
    tokens = q[-2]
    if not _lengths(tokens) == _lengths(k[-2]) == _lengths(v[-2]):
        return False
    video = next((i for i, segment in enumerate(tokens) if _holds(segment, mark)), None)
    if video is None:  # the frames are in the batch
        return q[-2] == k[-2] == v[-2]
    return tokens[video] == k[-2][video] and (
        tokens[video] == v[-2][video] or len(v[-2][video]) == 1
    )


def _holds(segment: Segment, mark: Mark) -> bool:
    return any((atom.source, atom.axis) == mark for atom in segment)


def _lengths(axis: Axis) -> list[Any]:
    return [size_of(segment) for segment in axis]


def _time(axes: Sequence[Axis]) -> tuple[Mark, int, bool]:
    """The frames' atom, T, and whether other axes of the video are tokens too.

    Raises:
        Refused: There is no such atom, or there are several videos.
    """
    tokens, batch = _atoms(axes[-2]), [a for axis in axes[:-2] for a in _atoms(axis)]
    if not tokens:
        raise Refused("it asks with one token")
    sources = {a.source for a in tokens if a.origin != "unknown"}
    videos = {source: _axes_of(source, tokens) for source in sources}
    if not any(len(ordered) == 3 for ordered in videos.values()):
        videos = {source: _axes_of(source, [*batch, *tokens]) for source in sources}
    found = {s: ordered for s, ordered in videos.items() if len(ordered) == 3}
    if len(found) != 1:
        raise Refused(_no_video(tokens, batch, len(found)))
    ((source, ordered),) = found.items()
    within = [a for a in tokens if a.source == source]
    if [a.axis for a in within] != sorted(a.axis for a in within):
        raise Refused(f"its tokens are not in the order of {source}'s axes")
    first = ordered[0]
    if not isinstance(first.size, int):
        raise Refused(
            f"its number of frames is dynamic (axis {first.axis} of {source}); merging needs a "
            "fixed one, so capture one program per length"
        )
    rest = len(within) > 1
    if any(a.axis == first.axis for a in within) and rest != (len(within) == 3):
        raise Refused(f"its tokens are {_told(within)}: neither a frame nor all frames")
    return (source, first.axis), first.size, rest


def _axes_of(source: str, atoms: Sequence[Atom]) -> list[Atom]:
    """The axes of a source among some atoms, the batch axis left out, in their order there."""
    grid = {a.axis: a for a in atoms if a.source == source and (a.axis > 0 or a.origin != "input")}
    return [grid[axis] for axis in sorted(grid)]


def _no_video(tokens: Sequence[Atom], batch: Sequence[Atom], videos: int) -> str:
    if videos:
        return "its tokens hold more than one video"
    if any(a.origin == "unknown" for a in tokens):
        return "the order of its tokens can't be followed to the inputs"
    others = [a for a in batch if a.axis > 0]
    beside = f", with {_told(others)} in its batch" if others else ""
    return f"it has no time axis: its tokens are {_told(tokens)}{beside}"


def _told(atoms: Sequence[Atom]) -> str:
    return " and ".join(f"axis {a.axis} of {a.source} ({a.size})" for a in atoms)


def _atoms(axis: Axis) -> list[Atom]:
    return [atom for segment in axis for atom in segment]
