"""One attention on merged frames: from the input of its projections to the output projection."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from resplice.axes import Axis
from resplice.change import Refused
from resplice.passes.tdtm.frames import (
    Frames,
    carried,
    frames_in,
    is_projection,
    same,
    shape_of,
    split_source,
)
from resplice.passes.tdtm.rebuild import Rebuild, is_computed, is_spread
from resplice.passes.tdtm.sites import AttentionSite
from resplice.passes.tdtm.tables import merged_mask
from resplice.pattern import arg, argument

aten = torch.ops.aten


@dataclass
class Merged:
    """An attention built a second time on merged frames, not yet in use.

    Attributes:
        replacements: Node -> what takes its place, in the order of execution.
        old: Nodes that are replaced or then unused, in the order of execution.
        new: Nodes that were made.
    """

    replacements: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    old: list[fx.Node] = field(default_factory=list)
    new: list[fx.Node] = field(default_factory=list)


def merge_attention(
    rebuild: Rebuild, site: AttentionSite, axes: dict[fx.Node, list[Axis]]
) -> Merged:
    """Build an attention on merged frames beside the original.

    Raises:
        Refused: Something between the projections can't be followed; what was made is unused.
    """
    node = site.node
    rest = {key: value for key, value in node.kwargs.items() if key != "attn_mask"}
    new = rebuild.beside(node)(node.target, *_operands(rebuild, site), **rest)
    rebuild.known(node, site.queries, new)
    result = Merged()
    forward, others = _forward(rebuild, site, axes)
    for n, frames in forward.items():
        outside = [u for u in n.users if u not in forward and u not in others]
        if any(_is_outside(u, forward, others) for u in outside):
            copy = rebuild.copies[n, *frames.key()]
            result.replacements.append((n, rebuild.unmerged(copy, frames, n)))
    result.replacements += others.items()
    if not result.replacements:
        raise Refused("its result is not used")
    result.old = sorted(n for n in rebuild.old if n not in dict(result.replacements))
    result.new = rebuild.made
    return result


def _is_outside(user: fx.Node, forward: dict[fx.Node, Frames], others: dict[fx.Node, Any]) -> bool:
    """Whether a user needs all frames: neither a size, nor a split whose pieces are all known."""
    if user.target is aten.sym_size.int:
        return False
    pieces = [u for u in user.users if split_source(u) is not None and u.args[0] is user]
    return not pieces or any(u not in forward and u not in others for u in pieces)


def _operands(rebuild: Rebuild, site: AttentionSite) -> list[Any]:
    """Queries, keys, values, mask and what follows, with merged frames."""
    node = site.node
    if not is_computed(arg(node, 0), site.queries):
        raise Refused("its queries come out of no projection that can be followed")
    q, k, v = (n for n in node.args[:3] if isinstance(n, fx.Node))
    found: list[Any] = [rebuild.value(q, site.queries)]
    for operand in (k, v):
        if site.keys is None:
            found.append(operand)
        elif site.kind == "cross":
            found.append(_text(rebuild, operand, site.keys))
        else:
            found.append(rebuild.value(operand, site.keys))
    mask = argument(node, "attn_mask")
    return [*found, _mask(rebuild, site, mask), *node.args[4:]]


def _text(rebuild: Rebuild, node: fx.Node, frames: Frames) -> fx.Node:
    """Keys or values of another sequence with the frames in its batch: the same text for each."""
    if not _repeats(node, frames):
        raise Refused("its keys differ from frame to frame")
    return rebuild.value(node, frames)


def _repeats(node: fx.Node, frames: Frames) -> bool:
    """Whether a value is the same for all frames, projections included."""
    if is_spread(node, frames):
        return True
    try:
        operands = carried(node, frames)
    except Refused:
        return False
    return bool(operands) and all(_repeats(n, own) for n, own in operands)


def _mask(rebuild: Rebuild, site: AttentionSite, mask: fx.Node | None) -> fx.Node | None:
    if mask is None:
        return None
    for frames in _mask_frames(site, shape_of(mask)):
        rank = mask.meta["val"].dim()
        if rank >= -frames.axis and not same(shape_of(mask)[frames.axis], 1):
            mask = merged_mask(rebuild, mask, frames)
    return mask


def _mask_frames(site: AttentionSite, shape: Any) -> list[Frames]:
    """A mask is [..., queries, keys]."""
    if site.queries.axis != -2:
        return [site.queries]
    keys = [] if site.keys is None else [replace(site.keys, axis=-1)]
    return [site.queries, *keys]


def _forward(
    rebuild: Rebuild, site: AttentionSite, axes: dict[fx.Node, list[Axis]]
) -> tuple[dict[fx.Node, Frames], dict[fx.Node, fx.Node]]:
    """What follows the attention, up to its output projection, rebuilt.

    Returns:
        Rebuilt nodes that carry frames, and those that are parts without any (such as text).
    """
    forward, others, ends = {site.node: site.queries}, dict[fx.Node, fx.Node](), set[fx.Node]()
    node = site.node.next
    while node.op != "output":
        source = _source(node, forward, ends)
        if source is not None and isinstance(node.meta.get("val"), torch.Tensor):
            frames = _frames_of(node, site, axes)
            if frames is None:
                _leave(rebuild, node, source, forward[source], others)
            elif _follows(node, frames, forward, ends):
                try:
                    rebuild.value(node, frames)
                except Refused:
                    ends.add(source)
                else:
                    forward[node] = frames
                    if is_projection(node):
                        ends.add(node)
        node = node.next
    return forward, others


def _source(node: fx.Node, forward: dict[fx.Node, Frames], ends: set[fx.Node]) -> fx.Node | None:
    """The rebuilt operand of a node, if it has one that is not an end."""
    piece = split_source(node)
    operands = [piece] if piece is not None else node.all_input_nodes
    return next((n for n in operands if n in forward and n not in ends), None)


def _frames_of(
    node: fx.Node, site: AttentionSite, axes: dict[fx.Node, list[Axis]]
) -> Frames | None:
    found = axes.get(node, [])
    for i, axis in enumerate(found):
        frames = frames_in(axis, site.mark, site.frames, i - len(found))
        if frames is not None:
            return frames
    return None


def _follows(
    node: fx.Node, frames: Frames, forward: dict[fx.Node, Frames], ends: set[fx.Node]
) -> bool:
    """Whether all that brings frames into a node is rebuilt, with the frames in the same place."""
    try:
        operands = carried(node, frames)
    except Refused:
        return False
    return bool(operands) and all(
        n in forward and n not in ends and forward[n].key() == own.key() for n, own in operands
    )


def _leave(
    rebuild: Rebuild, node: fx.Node, source: fx.Node, frames: Frames, others: dict[fx.Node, Any]
) -> None:
    """A part of a rebuilt value without frames, such as its text, is cut out of the copy."""
    try:
        others[node] = rebuild.other_part(node, source, frames)
    except Refused:
        return
