"""STDiT3, the video transformer of Open-Sora v1.2, in plain PyTorch: a subject for passes.

Written from the published architecture: blocks over the tokens of a frame and blocks over frames
take turns, each with cross-attention to the caption and modulation by the time. Sizes go from tiny
to that of the checkpoint (`XL`). Nothing here belongs to the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

attend = nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are tiny.

    Attributes:
        width: Channels C, a multiple of 4 and of `heads`; width / heads is even.
        heads: Attention heads.
        depth: Spatial blocks, and as many temporal ones.
        caption: Width of the caption's embeddings.
        words: Rows of the learned null caption.
        channels: Latent channels; the model returns twice as many (the velocity first).
        ratio: MLP width over C.
        square: Side in pixels at which the position table has unit scale.
    """

    width: int = 24
    heads: int = 2
    depth: int = 1
    caption: int = 16
    words: int = 6
    channels: int = 4
    ratio: int = 4
    square: int = 512


XL = Config(width=1152, heads=16, depth=28, caption=4096, words=300)
"""Open-Sora v1.2, 28 pairs of blocks."""


def waves(positions: Tensor, frequencies: Tensor, *, sine_first: bool) -> Tensor:
    """Sines and cosines of every product of position and frequency.

    Args:
        positions: Any shape [...].
        frequencies: [F].
        sine_first: [sin, cos] rather than [cos, sin] on the last axis.

    Returns:
        [..., 2F].
    """
    angles = positions[..., None] * frequencies
    parts = (angles.sin(), angles.cos())
    return torch.cat(parts if sine_first else parts[::-1], -1)


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs, positions 0, 1, ... along axis -2 of [...,N,d]."""
    size = x.shape[-1]
    exponents = torch.arange(0, size, 2, dtype=x.dtype, device=x.device) / size
    angles = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)[:, None] * 10000**-exponents
    cos, sin = angles.cos(), angles.sin()
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


class SelfAttention(nn.Module):
    """Attention among the rows of [R,N,C], with normed and, over frames, rotated q and k."""

    def __init__(self, width: int, heads: int, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[R,N,C] -> [R,N,C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of [B,N,C] to the caption [B,L,C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """`mask`: words that count, bool [B,1,1,L]; [B,N,C] -> [B,N,C]."""
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(y).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int, result: int) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, result)
        )


class Block(nn.Module):
    """Self-attention within frames or across them, cross-attention, MLP."""

    def __init__(self, config: Config, temporal: bool) -> None:
        super().__init__()
        width = config.width
        self.temporal = temporal
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(width, config.heads, rotary=temporal)
        self.cross_attn = CrossAttention(width, config.heads)
        self.mlp = Mlp(width, config.ratio * width, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def modulation(self, t: Tensor, t0: Tensor | None, x_mask: Tensor | None) -> list[Tensor]:
        """Shift, scale and gate of attention and MLP, [B,1,1,C], or [B,T,1,C] with a mask.

        Args:
            t: [B,6,C]; `t0` the same at time 0, used for frames that `x_mask` [B,T] has false.
            t0: See `t`.
            x_mask: See `t`.
        """
        parts = (self.scale_shift_table + t)[:, :, None, None].unbind(1)
        if x_mask is None or t0 is None:
            return list(parts)
        still = (self.scale_shift_table + t0)[:, :, None, None].unbind(1)
        return [
            torch.where(x_mask[:, :, None, None], a, b) for a, b in zip(parts, still, strict=True)
        ]

    def forward(
        self, x: Tensor, y: Tensor, mask: Tensor | None, modulation: list[Tensor]
    ) -> Tensor:
        """`x` [B,T,S,C] -> the same."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        x = x + self.cross_attn(x.flatten(1, 2), y, mask).view_as(x)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)

    def attention(self, h: Tensor) -> Tensor:
        """Self-attention of [B,T,S,C] along S, or along T in a temporal block."""
        if self.temporal:
            return self.attention_over(h.transpose(1, 2)).transpose(1, 2)
        return self.attention_over(h)

    def attention_over(self, h: Tensor) -> Tensor:
        """Self-attention along axis 2 of [B,R,N,C]."""
        return self.attn(h.flatten(0, 1)).view_as(h)


class STDiT3(nn.Module):
    """The whole model; patches are (1, 2, 2)."""

    def __init__(self, config: Config = Config()) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.x_embedder = nn.Conv3d(config.channels, width, (1, 2, 2), (1, 2, 2))
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.fps_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = Mlp(config.caption, width, width)
        self.y_embedding = nn.Buffer(torch.randn(config.words, config.caption) / width**0.5)
        self.spatial_blocks = nn.ModuleList(Block(config, False) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(Block(config, True) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.linear = nn.Linear(width, 4 * 2 * config.channels)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None,
        fps: Tensor,
        height: Tensor,
        width: Tensor,
        x_mask: Tensor | None = None,
    ) -> Tensor:
        """One evaluation.

        Args:
            x: Latents [B,channels,T,Hl,Wl].
            timestep: [B], 0 to 1000.
            y: Caption [B,1,L,caption].
            mask: Words that count, [B,L] or [B/2,L] (repeated), or None for all.
            fps: [1].
            height: [1], in pixels.
            width: [1], in pixels.
            x_mask: bool [B,T]: frames to generate; the others are given.

        Returns:
            [B,2*channels,T,Hl,Wl], at least float32.
        """
        rows, columns = x.shape[-2:]
        h = self.x_embedder(nn.functional.pad(x, (0, columns % 2, 0, rows % 2)))
        size = h.shape[-2:]
        h = h.flatten(3).permute(0, 2, 3, 1) + self.positions(size, height * width, x.dtype)
        time = self.time(timestep, fps)
        still = None if x_mask is None else self.time(torch.zeros_like(timestep), fps)
        t, t0 = (
            None if v is None else self.t_block(v).unflatten(1, (6, -1)) for v in (time, still)
        )
        words = self.y_embedder(y.squeeze(1))
        open_ = None if mask is None else self.word_mask(mask, x.shape[0])
        for pair in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            for block in pair:
                h = block(h, words, open_, block.modulation(t, t0, x_mask))
        result = self.final(h, time, still, x_mask).unflatten(2, size)
        return self.unpatch(result)[..., :rows, :columns]

    def time(self, timestep: Tensor, fps: Tensor) -> Tensor:
        """The time vector [B,C]."""
        kind = self.t_block[1].weight.dtype
        steps = torch.arange(128, dtype=kind, device=timestep.device)
        frequencies = torch.exp(-math.log(10000) * steps / 128)
        t, f = (waves(v.to(kind), frequencies, sine_first=False) for v in (timestep, fps))
        return self.t_embedder(t) + self.fps_embedder(f)

    def positions(self, size: tuple[int, ...], area: Tensor, kind: torch.dtype) -> Tensor:
        """The table of a frame's tokens, [S,C]: column first, scaled to the frame's area."""
        rows, columns = size
        base, scale = round(math.sqrt(rows * columns)), area.to(kind).sqrt() / self.config.square
        quarter = self.config.width // 4
        steps = torch.arange(quarter, dtype=kind, device=area.device)
        frequencies = 10000 ** (-2 * steps / (self.config.width // 2))
        u, v = (
            torch.arange(n, dtype=kind, device=area.device) / scale * base / n
            for n in (columns, rows)
        )
        across = waves(u, frequencies, sine_first=True).expand(rows, -1, -1)
        down = waves(v, frequencies, sine_first=True)[:, None].expand(-1, columns, -1)
        return torch.cat((across, down), -1).flatten(0, 1)

    def word_mask(self, mask: Tensor, batch: int) -> Tensor:
        """[b,L] as bool [B,1,1,L]; under guidance the prompt's mask also stands for the null's."""
        repeated = mask if mask.shape[0] == batch else mask.repeat(batch // mask.shape[0], 1)
        return repeated.bool()[:, None, None]

    def final(self, h: Tensor, time: Tensor, still: Tensor | None, x_mask: Tensor | None) -> Tensor:
        """Modulated norm and projection: [B,T,S,C] -> [B,T,S,4*2*channels]."""
        shift, scale = (self.scale_shift_table + time[:, None])[:, :, None, None].unbind(1)
        if still is not None and x_mask is not None:
            others = (self.scale_shift_table + still[:, None])[:, :, None, None].unbind(1)
            chosen = x_mask[:, :, None, None]
            shift, scale = (
                torch.where(chosen, a, b) for a, b in zip((shift, scale), others, strict=True)
            )
        return self.linear(self.norm(h) * (1 + scale) + shift)

    def unpatch(self, x: Tensor) -> Tensor:
        """[B,T,H,W,(1,2,2,c)] -> [B,c,T,2H,2W], half precision widened."""
        batch, frames, rows, columns, _ = x.shape
        x = x.unflatten(-1, (2, 2, -1)).permute(0, 6, 1, 2, 4, 3, 5)
        x = x.reshape(batch, -1, frames, 2 * rows, 2 * columns)
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def inputs(
    config: Config = Config(), batch: int = 2, frames: int = 4, rows: int = 8, columns: int = 8,
    words: int | None = None, dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:  # fmt: skip
    """Random inputs; `rows` and `columns` in latent pixels, eight times as many in the image."""
    count = config.words if words is None else words
    return {
        "x": torch.randn(batch, config.channels, frames, rows, columns, dtype=dtype),
        "timestep": torch.rand(batch, dtype=dtype) * 1000,
        "y": torch.randn(batch, 1, count, config.caption, dtype=dtype),
        "mask": (torch.arange(count) < torch.tensor([[count], [count - 2]])[:batch]).long(),
        "fps": torch.full((1,), 24.0, dtype=dtype),
        "height": torch.full((1,), 8.0 * rows, dtype=dtype),
        "width": torch.full((1,), 8.0 * columns, dtype=dtype),
    }


def tiny(frames: int = 4) -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    """A factory for the command line: a seeded tiny model and its inputs."""
    torch.manual_seed(0)
    return STDiT3().eval(), (), inputs(frames=frames)
