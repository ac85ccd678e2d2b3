"""Where a program attends over all tokens of a video, told from the axes of its values.

A site is a plain attention whose queries, keys and values are one and the same sequence: a canvas
(T, H, W) in raster order, with text before or after it. Cross-attention, text encoders, attention
within a frame or across frames, and images are told apart and refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from resplice.axes import Atom, Axis, Segment, axes_of, size_of
from resplice.change import Refused
from resplice.errors import UsageError
from resplice.kernels.tile_grid import Triple
from resplice.origin import module_path
from resplice.passes.sta.masks import is_open
from resplice.pattern import argument
from resplice.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention over a whole video.

    Attributes:
        node: The attention.
        layer: Number of the site, counted in the order of execution from 0.
        canvas: T, H, W in tokens.
        text_length: Text tokens in the sequence.
        text_first: Whether they stand before the video.
        heads: Number of heads.
        mask: The attention's mask, [B or 1, heads or 1, 1, S], or None.
        image_open: Whether the mask provably leaves all image keys open.
        module: Path of the module it was captured from; a hint for people only.
    """

    node: fx.Node
    layer: int
    canvas: Triple
    text_length: int
    text_first: bool
    heads: int
    mask: fx.Node | None
    image_open: bool
    module: str

    @property
    def name(self) -> str:
        """Name of the node, kept by the rewrite."""
        return self.node.name

    def masked_keys(self) -> tuple[int, int] | None:
        """First and last key, exclusively, whose mask must be kept; None if no mask must be."""
        if self.mask is None:
            return None
        tokens = math.prod(self.canvas) + self.text_length
        if not self.image_open:
            return 0, tokens
        start = 0 if self.text_first else tokens - self.text_length
        return (start, start + self.text_length) if self.text_length else None


@dataclass
class Sites:
    """What `find_sites` found.

    Attributes:
        found: The sites in the order of execution.
        refused: Other attentions, each with the reason.
    """

    found: list[AttentionSite] = field(default_factory=list)
    refused: list[tuple[fx.Node, str]] = field(default_factory=list)


def find_sites(program: Program, canvas: Sequence[int] = ()) -> Sites:
    """Find the attentions over all tokens of a video.

    Args:
        program: In normal form (`canonicalize`).
        canvas: T, H, W in tokens where the graph does not tell, else empty.

    Raises:
        UsageError: `canvas` is not three positive sizes.
    """
    if canvas and (len(canvas) != 3 or min(canvas) < 1):
        raise UsageError(f"canvas={','.join(map(str, canvas))} must be three positive sizes: T,H,W")
    axes, result, layer = axes_of(program), Sites(), 0
    target = aten.scaled_dot_product_attention.default
    for node in program.graph.find_nodes(op="call_function", target=target):
        try:
            _refuse_dynamic(program, node, axes)
            place = _place(node, axes, tuple(canvas))
            layer += 1
            result.found.append(_site(program, node, layer - 1, place))
        except Refused as reason:
            result.refused.append((node, str(reason)))
    return result


@dataclass(frozen=True)
class _Place:
    canvas: Triple
    text_length: int
    text_first: bool


def _place(node: fx.Node, axes: dict[fx.Node, list[Axis]], canvas: tuple[int, ...]) -> _Place:
    """The canvas and the text in the tokens of an attention."""
    q, k, v = (n for n in node.args[:3] if isinstance(n, fx.Node))
    shapes = [n.meta["val"].shape for n in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes):
        raise Refused("it has no [batch, heads, tokens, channels] operands")
    lengths = [shape[2] for shape in shapes]
    if len(set(lengths)) > 1:
        raise Refused(f"cross-attention: {lengths[0]} queries, {lengths[1]} keys")
    number = _canvas_segment(axes[q], canvas)
    _same_tokens(axes[q][2], axes[k][2], axes[v][2], number)
    segments = axes[q][2]
    before, after = (
        sum(map(size_of, part)) for part in (segments[:number], segments[number + 1 :])
    )
    if before and after:
        raise Refused(f"it has {before} tokens before and {after} after the video")
    sizes = canvas or tuple(atom.size for atom in segments[number])
    t, h, w = (int(size) for size in sizes)
    return _Place((t, h, w), int(before + after), bool(before))


def _refuse_dynamic(program: Program, node: fx.Node, axes: dict[fx.Node, list[Axis]]) -> None:
    q, k = (n for n in node.args[:2] if isinstance(n, fx.Node))
    length, keys = program.shape(q)[-2], program.shape(k)[-2]
    if isinstance(length, int) and isinstance(keys, int):
        return
    if length != keys:
        raise Refused(f"cross-attention: {length} queries, {keys} keys")
    moving = [f"axis {a.axis} of {a.source}" for a in _atoms(axes[q][-2]) if not _fixed(a.size)]
    where = f" ({', '.join(moving)})" if moving else ""
    raise Refused(
        f"its number of tokens is dynamic: {length}{where}; tiles need a fixed grid, so "
        "capture one program per resolution, with these axes fixed"
    )


def _fixed(size: Any) -> bool:
    return isinstance(size, int)


def _canvas_segment(axes: Sequence[Axis], canvas: tuple[int, ...]) -> int:
    """Which segment of the token axis is the video."""
    segments = axes[2]
    grids = [i for i, segment in enumerate(segments) if _is_grid(segment)]
    if len(grids) > 1:
        raise Refused("its tokens hold more than one video")
    if grids:
        segment = segments[grids[0]]
        sizes = tuple(atom.size for atom in segment)
        if canvas and sizes != canvas:
            raise Refused(f"its canvas is {_by(sizes)}, canvas={_by(canvas)} is given")
        rest = [a for a in _atoms(axes[0]) if any(_same_axis(a, b) for b in segment)]
        if rest:
            raise Refused(f"it attends within parts of the video: {_told(rest)} is in its batch")
        return grids[0]
    if not canvas:
        raise Refused(_no_grid(axes))
    fitting = [i for i, segment in enumerate(segments) if size_of(segment) == math.prod(canvas)]
    if len(fitting) != 1:
        parts = " + ".join(str(size_of(segment)) for segment in segments)
        raise Refused(f"canvas={_by(canvas)} is {math.prod(canvas)} tokens, it has {parts}")
    return fitting[0]


def _is_grid(segment: Segment) -> bool:
    """Three axes of one source in their order there, which is raster order."""
    if len(segment) != 3 or any(atom.origin == "unknown" for atom in segment):
        return False
    places = [atom.axis for atom in segment]
    return len({atom.source for atom in segment}) == 1 and places == sorted(set(places))


def _no_grid(axes: Sequence[Axis]) -> str:
    """Why a token axis is no canvas."""
    atoms = _atoms(axes[2])
    if any(atom.origin == "unknown" for atom in atoms):
        return (
            "the order of its tokens can't be followed to the inputs; "
            "if it is raster, give canvas=T,H,W"
        )
    shared = [a for a in _atoms(axes[0]) if any(a.source == b.source for b in atoms) and a.axis > 0]
    inner = [a for a in _atoms(axes[0]) if a.axis > 0]
    if shared or inner:
        return (
            f"factorised attention: its tokens are {_told(atoms)}, "
            f"while {_told(shared or inner)} is in its batch"
        )
    return (
        f"its tokens are {_told(atoms)}, not the three axes of a video"
        " (give canvas=T,H,W if they are)"
    )


def _told(atoms: Sequence[Atom]) -> str:
    return " and ".join(f"axis {a.axis} of {a.source} ({a.size})" for a in atoms) or "one token"


def _same_tokens(q: Axis, k: Axis, v: Axis, number: int) -> None:
    """Refuse keys and values of other tokens."""
    shapes = [[size_of(segment) for segment in axis] for axis in (q, k, v)]
    if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        raise Refused("cross-attention: its keys are other tokens than its queries")
    if q[number] != k[number]:
        raise Refused("cross-attention: its keys are other tokens than its queries")
    plain = len(v[number]) == 1 and q[number][0].origin == "constant"
    if q[number] != v[number] and not plain:  # positions say more of q and k than is known of v
        raise Refused("cross-attention: its values are other tokens than its queries")


def _atoms(axis: Axis) -> list[Atom]:
    return [atom for segment in axis for atom in segment]


def _same_axis(a: Atom, b: Atom) -> bool:
    return (a.source, a.axis) == (b.source, b.axis)


def _by(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))


def _site(program: Program, node: fx.Node, layer: int, place: _Place) -> AttentionSite:
    q, k, mask = node.args[0], node.args[1], argument(node, "attn_mask")
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    heads, key_heads, tokens = (
        q.meta["val"].shape[1],
        k.meta["val"].shape[1],
        q.meta["val"].shape[2],
    )
    if argument(node, "is_causal") or argument(node, "dropout_p"):
        raise Refused("it is causal or drops weights")
    if not isinstance(heads, int) or heads != key_heads:
        raise Refused(f"it has {heads} query heads and {key_heads} key heads")
    image_open = True
    if mask is not None:
        shape = mask.meta["val"].shape
        if len(shape) != 4 or shape[2] != 1 or shape[3] != tokens:
            raise Refused(f"its mask is {list(shape)}: one per query can't be kept")
        start = place.text_length if place.text_first else 0
        image_open = is_open(program, mask, start, start + math.prod(place.canvas))
    return AttentionSite(
        node, layer, place.canvas, place.text_length, place.text_first, heads, mask, image_open,
        module_path(node),
    )  # fmt: skip
