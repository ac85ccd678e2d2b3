"""Constructs that coremltools is known to translate wrongly or not at all, one small function each.

A construct names its inputs by its parameters, which `tensors` draws. Constructs of a family share
one module, so that one conversion covers them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    group_norm,
    interpolate,
    layer_norm,
    one_hot,
    rms_norm,
    scaled_dot_product_attention,
)

Construct = Callable[..., Tensor]
INFINITY = float("inf")
_WEIGHT = torch.linspace(0.5, 2.0, 4)
_BIAS = torch.linspace(-1.0, 1.0, 4)


class Family(nn.Module):
    """Several constructs on shared inputs; the outputs carry the constructs' names."""

    def __init__(self, constructs: Mapping[str, Construct]) -> None:
        super().__init__()
        self.constructs = dict(constructs)

    @property
    def names(self) -> list[str]:
        """Names of the inputs, in the order in which `forward` takes them."""
        found = [name for f in self.constructs.values() for name in inspect.signature(f).parameters]
        return sorted(set(found))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            label: construct(*(inputs[name] for name in inspect.signature(construct).parameters))
            for label, construct in self.constructs.items()
        }


def tensors(seed: int) -> dict[str, Tensor]:
    """All inputs that constructs may ask for; another seed draws others of the same kind."""
    torch.manual_seed(seed)
    closed = torch.rand(2, 1, 5, 6) > 0.4
    closed[0, :, 1] = False
    added = torch.randn(2, 1, 5, 6).masked_fill(~closed, -INFINITY)
    return {
        "x": torch.randn(2, 3, 4), "y": torch.randn(2, 3, 4), "row": torch.randn(4),
        "positive": torch.rand(2, 3, 4) + 0.5, "tiny": torch.rand(2, 3) * 1e-10 + 1e-12,
        "square": torch.randn(4, 4), "endless": torch.full((4, 4), -INFINITY),
        "special": torch.tensor([1.0, -INFINITY, INFINITY, float("nan"), 0.0, -3e38]),
        "a": torch.rand(2, 3, 4) > 0.5, "b": torch.rand(2, 3, 4) > 0.5,
        "half": torch.tensor([0.0, 0.5, -0.25, 1.0, -3.0, 0.0]),
        "i": torch.randint(-9, 10, (2, 3, 4)), "j": torch.randint(1, 5, (2, 3, 4)),
        "q": torch.randn(2, 4, 5, 8), "k": torch.randn(2, 4, 6, 8), "v": torch.randn(2, 4, 6, 8),
        "kg": torch.randn(2, 2, 6, 8), "vg": torch.randn(2, 2, 6, 8), "mask": closed,
        "added": added, "flat": torch.randn(6), "five": torch.randn(2, 4, 2, 3, 2),
        "six": torch.randn(2, 3, 2, 2), "twin": torch.randn(2, 3, 2, 2),
        "index": torch.tensor([-1, 0, 2, -2]), "back": torch.tensor([-1, -3, 1]),
        "places": torch.randint(0, 3, (2, 3, 4)), "rows": torch.randperm(3)[:2],
        "table": torch.randn(3, 4), "update": torch.randn(2, 4), "image": torch.randn(1, 2, 4, 5),
        "volume": torch.randn(1, 2, 2, 3, 4), "left": torch.randn(2, 3, 4),
        "right": torch.randn(2, 4, 3), "bias": torch.randn(2, 3, 3), "scalar": torch.tensor(0.75),
        "count": torch.tensor(3), "angles": torch.linspace(1000.0, 1003.0, 4),
    }  # fmt: skip


def inputs_of(family: Family, seed: int) -> dict[str, Tensor]:
    """The inputs that a family asks for."""
    drawn = tensors(seed)
    return {name: drawn[name] for name in family.names}


def _signed(j: Tensor, b: Tensor) -> Tensor:
    """Divisors of both signs, never zero."""
    return torch.where(b, j, -j)


def _written(x: Tensor, row: Tensor) -> Tensor:
    new = x.clone()
    new[:, 1] = row
    return new


def _strided(x: Tensor, row: Tensor) -> Tensor:
    new = x.clone()
    new[..., 1::2] = row[:2]
    return new


def _put(table: Tensor, back: Tensor, row: Tensor) -> Tensor:
    new = table.clone()
    new[back] = row
    return new


def _deep(six: Tensor) -> Tensor:
    """[2,3,2,2] -> [2,3,2,2,2,2]."""
    return torch.stack([torch.stack([six, six * 2], -1), torch.stack([six + 1, six * 3], -1)], -1)


def _reduced(how: str, include: bool) -> Construct:
    return lambda x, places, y: x.scatter_reduce(1, places, y, how, include_self=include)


FAMILIES: dict[str, dict[str, Construct]] = {
    "arithmetic": {
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
        "gelu_erf": lambda x: nn.functional.gelu(x),
        "add_alpha": lambda x, y: torch.add(x, y, alpha=0.5),
        "add_to_number_alpha": lambda x: torch.add(3.0, x, alpha=2.0),
        "sub_from_number_alpha": lambda x: torch.sub(3.0, x, alpha=2.0),
        "sub_alpha": lambda x, y: torch.sub(x, y, alpha=2.0),
        "add_number_alpha": lambda x: torch.add(x, 3.0, alpha=2.0),
        "rsub_alpha": lambda x, y: torch.rsub(x, y, alpha=3.0),
        "rsub_number": lambda x: torch.rsub(x, 2.0, alpha=0.5),
        "sub_integers_alpha": lambda i, j: torch.sub(i, j, alpha=3),
        "from_number": lambda x: 1.0 - x,
        "reciprocal": lambda tiny: torch.reciprocal(tiny * 1e10),
        "one_over": lambda positive: 1 / (positive * 1e-3),
        "reciprocal_integers": lambda j: torch.reciprocal(j),
        "rotary": lambda angles, row: torch.cos(angles[:, None] / 1e4 ** (row.abs() / 8)),
        "rsqrt": lambda tiny: torch.rsqrt(tiny),
        "rsqrt_integers": lambda j: torch.rsqrt(j),
        "lerp": lambda x, y: torch.lerp(x, y, 0.3),
        "lerp_tensor": lambda x, y, positive: torch.lerp(x, y, positive),
        "addcmul": lambda x, y, positive: torch.addcmul(x, y, positive, value=0.5),
        "addcdiv": lambda x, y, positive: torch.addcdiv(x, y, positive, value=-2.0),
        "pow_number": lambda x: 2.0**x,
        "pow_negative_base": lambda i: (-2.0) ** i,
        "pow_square": lambda x: x**2,
        "pow_cube": lambda x: x**3,
        "pow_half": lambda positive: positive**0.5,
        "pow_inverse": lambda positive: positive**-1.5,
        "pow_tensor": lambda positive, y: positive**y,
        "pow_integers": lambda i: i**2,
        "log2": lambda positive: torch.log2(positive),
        "log10": lambda positive: torch.log10(positive),
        "log1p": lambda positive: torch.log1p(positive),
        "expm1": lambda x: torch.expm1(x),
        "exp2": lambda x: torch.exp2(x),
        "logsumexp": lambda x: torch.logsumexp(x, -1),
        "logaddexp": lambda x, y: torch.logaddexp(x, y),
        "sinc": lambda x: torch.sinc(x),
        "atan2": lambda x, y: torch.atan2(x, y),
        "softplus": lambda x: nn.functional.softplus(x, beta=2.0),
        "silu_mish": lambda x: nn.functional.silu(x) + nn.functional.mish(x),
        "elu_alpha": lambda x: nn.functional.elu(x, alpha=0.5),
        "leaky_relu": lambda x: nn.functional.leaky_relu(x, 0.2),
        "hardswish": lambda x: nn.functional.hardswish(x * 3),
        "relu6": lambda x: nn.functional.relu6(x * 5),
        "frac": lambda x: torch.frac(x * 3),
    },
    "rounding": {
        "div_integers": lambda i, j: i / j,
        "div_integer_by_number": lambda i: i / 4,
        "number_by_integers": lambda j: 3 / j,
        "div_floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
        "div_trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
        "floor_divide_integers": lambda i, j, b: i // _signed(j, b),
        "floor_divide_number": lambda i: i // 4,
        "trunc_divide_integers": lambda i, j, b: torch.div(i, _signed(j, b), rounding_mode="trunc"),
        "remainder": lambda x, positive: torch.remainder(x, positive),
        "remainder_negative": lambda x, positive: torch.remainder(x, -positive),
        "remainder_integers": lambda i, j, b: i % _signed(j, b),
        "remainder_number": lambda i: i % 4,
        "remainder_float_number": lambda x: x % 0.75,
        "fmod": lambda x, positive: torch.fmod(x, positive),
        "fmod_number": lambda x: torch.fmod(x, 0.75),
        "fmod_integers": lambda i, j, b: torch.fmod(i, _signed(j, b)),
        "trunc": lambda x: torch.trunc(x * 3),
        "round": lambda x: torch.round(x * 2) + torch.round(torch.floor(x) + 0.5),
        "ceil": lambda x: torch.ceil(x),
        "clamp_integers": lambda i: i.clamp(-2, 3),
        "clamp_low": lambda i: i.clamp(min=0),
        "clamp_floats": lambda x: x.clamp(-0.5, 0.25),
        "clamp_tensor": lambda x, y, positive: torch.clamp(x, min=y, max=y + positive),
        "sqrt_integers": lambda j: torch.sqrt(j),
        "mean_as_float": lambda i: i.float().mean(-1),
        "sum_integers": lambda i: i.sum(-1),
        "sum_booleans": lambda a: a.sum(-1),
        "sum_dtype": lambda i: i.sum((0, 2), dtype=torch.float32),
        "mean_dtype": lambda a: a.mean(-1, dtype=torch.float32),
        "to_int": lambda x: (x * 3).to(torch.int32),
        "to_long_back": lambda x: (x * 3).long().float(),
        "mixed_add": lambda i, x: i + x,
        "mixed_mul": lambda a, x: a * x,
        "mixed_number": lambda i: i * 0.5 + 1,
        "mixed_compare": lambda i, x: (i > x).float(),
        "abs_neg_sign": lambda i: (-i).abs() + torch.sign(i),
        "bool_times_bool": lambda a, b: (a * b).float(),
        "bool_plus_bool": lambda a, b: (a.int() + b).float(),
    },
    "logic": {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
        "not": lambda a: ~a,
        "logical_not": lambda x: torch.logical_not(x > 0),
        "logical_and": lambda a, half: torch.logical_and(a[0, 0, :1], half),
        "logical_not_floats": lambda half: torch.logical_not(half),
        "to_bool": lambda half: half.bool(),
        "bool_equal": lambda a, b: a == b,
        "bool_unequal": lambda a, b: a != b,
        "bool_equal_number": lambda a: a == True,  # noqa: E712
        "triu": lambda endless: torch.triu(endless, 1),
        "tril": lambda endless: torch.tril(endless, -1),
        "triu_mask": lambda a: torch.triu(a, 1),
        "tril_values": lambda x: torch.tril(x),
        "where_numbers": lambda a: torch.where(a, 1.0, -2.0),
        "where_number": lambda a, x: torch.where(a, x, 0.5),
        "where_number_first": lambda a, x: torch.where(a, -1.5, x),
        "where_mixed": lambda a, i, x: torch.where(a, i, x),
        "where_masks": lambda a, b: torch.where(a, b, ~b),
        "where_small": lambda a, row: torch.where(a, row, row[:1]),
        "masked_fill": lambda x, a: x.masked_fill(a, -INFINITY),
        "masked_fill_integers": lambda i, a: i.masked_fill(a, 7),
        "masked_fill_tensor": lambda x, a, scalar: x.masked_fill(a, scalar),
        "masked_fill_mask": lambda a, b: a.masked_fill(b, True),
        "any": lambda a: a.any(-1),
        "any_all": lambda a: a.any()[None] | a.all()[None],
        "any_floats": lambda half: half.any(0, keepdim=True),
        "all": lambda a: a.all(1, keepdim=True),
        "isfinite": lambda special: torch.isfinite(special),
        "isnan": lambda special: torch.isnan(special),
        "isinf": lambda special: torch.isinf(special),
        "nan_to_num": lambda special: torch.nan_to_num(special, nan=1.0, posinf=2.0, neginf=-2.0),
        "isin": lambda i: torch.isin(i, torch.tensor([1, 3, -2])),
        "maximum_mixed": lambda i, x: torch.maximum(i.float(), x),
        "cat_masks": lambda a, b: torch.cat([a, b], -1),
        "stack_masks": lambda a, b: torch.stack([a, b]),
        "expand_mask": lambda a: a[:, :1].expand(2, 5, 4),
        "cumsum_mask": lambda a: a.cumsum(-1),
        "flip_mask": lambda a: a.flip(-1),
        "gather_mask": lambda a, places: a.gather(1, places),
        "pad_mask": lambda a: nn.functional.pad(a, (1, 1), value=True),
        "index_mask": lambda a, index: a[:, :, index],
    },
    "creation": {
        "new_ones": lambda x: x + x.new_ones(3, 4),
        "new_full": lambda x: x.new_full((2, 2), 7.5),
        "new_zeros": lambda x: x.new_zeros(2, 2, dtype=torch.int32) + 1,
        "zeros_like": lambda i, x: x + torch.zeros_like(i),
        "ones_like_dtype": lambda a, x: x * torch.ones_like(a, dtype=torch.float32),
        "full_like": lambda i: torch.full_like(i, 3),
        "full_mask": lambda a: torch.full((2, 3, 4), True) ^ a,
        "full_infinite": lambda x: torch.full((3, 4), -INFINITY) + x,
        "arange": lambda row: torch.arange(4) + row,
        "arange_steps": lambda row: torch.arange(1, 9, 2) * row,
        "arange_floats": lambda row: torch.arange(0.5, 2.5, 0.5) * row,
        "linspace": lambda row: torch.linspace(-1, 1, 4) * row,
        "eye": lambda square: square + torch.eye(4),
        "one_hot": lambda places: one_hot(places, 3),
        "outer": lambda row, flat: torch.outer(row, flat),
        "meshgrid": lambda row, flat: torch.stack(torch.meshgrid(row, flat, indexing="ij")),
        "no_op_slice": lambda x: x[:, :3] * 2,
        "alias": lambda x: torch.ops.aten.alias(x),
        "clone_twice": lambda x: x.clone().contiguous() + x.detach(),
        "scalar_tensor": lambda x: x * torch.tensor(2.5),
        "scalar_inputs": lambda x, scalar, count: x * scalar + count,
        "scalar_out": lambda x: x.sum(),
        "embedding": lambda places, table: nn.functional.embedding(places, table, padding_idx=0),
    },
    "attention": {
        "scale": lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=0.7),
        "causal": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
        "mask": lambda q, k, v, mask: scaled_dot_product_attention(q, k, v, mask),
        "added": lambda q, k, v, added: scaled_dot_product_attention(q, k, v, added),
        "grouped": lambda q, kg, vg: scaled_dot_product_attention(q, kg, vg, enable_gqa=True),
        "grouped_all": lambda q, kg, vg: scaled_dot_product_attention(
            q, kg, vg, is_causal=True, scale=0.5, enable_gqa=True
        ),
        "rank_three": lambda q, k, v: scaled_dot_product_attention(q[0], k[0], v[0]),
        "rank_three_mask": lambda q, k, v, mask: scaled_dot_product_attention(
            q[0], k[0], v[0], mask[0]
        ),
        "rank_three_flat_mask": lambda q, k, v, mask: scaled_dot_product_attention(
            q[0], k[0], v[0], mask[0, 0]
        ),
        "rank_five": lambda q, k, v: scaled_dot_product_attention(
            q[None], k[None], v[None], scale=0.3
        ),
        "rank_two": lambda q, k, v: scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]),
        "shared_keys": lambda q, k, v: scaled_dot_product_attention(q, k[:1], v[:1]),
        "lowest": lambda q, k, v, mask: scaled_dot_product_attention(
            q, k, v, torch.zeros(2, 1, 5, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
        ),
        "narrow_values": lambda q, k, v: scaled_dot_product_attention(q, k, v[..., :3]),
    },
    "layers": {
        "group_norm": lambda x: group_norm(x, 3, eps=1e-3),
        "group_norm_five": lambda five: group_norm(five, 2, _WEIGHT, _BIAS),
        "instance_norm": lambda image: nn.functional.instance_norm(image),
        "layer_norm": lambda x: layer_norm(x, (4,), _WEIGHT, _BIAS),
        "layer_norm_plain": lambda x: layer_norm(x, (3, 4), eps=1e-2),
        "layer_norm_no_bias": lambda x: layer_norm(x, (4,), _WEIGHT),
        "layer_norm_only_bias": lambda x: layer_norm(x, (4,), None, _BIAS),
        "layer_norm_computed": lambda x, row: layer_norm(x, (4,), row * 2, row + 1),
        "layer_norm_half_computed": lambda x, row: layer_norm(x, (4,), _WEIGHT, row + 1),
        "rms_norm": lambda x: rms_norm(x * 1e-3, (4,), _WEIGHT, eps=1e-5),
        "rms_norm_default": lambda x: rms_norm(x * 1e-3, (4,)),
        "rms_norm_two": lambda x: rms_norm(x, (3, 4), eps=0.1),
        "var": lambda x: x.var(-1),
        "var_population": lambda x: torch.var(x, (1, 2), correction=0),
        "var_correction": lambda x: torch.var(x, 1, correction=2, keepdim=True),
        "std": lambda x: x.std(),
        "std_population": lambda x: x.std(-1, unbiased=False),
        "var_mean": lambda x: torch.var_mean(x, -1)[0] + torch.var_mean(x, -1)[1],
        "normalize": lambda x: nn.functional.normalize(x, dim=-1),
        "norm": lambda x: x.norm(dim=-1) + torch.linalg.vector_norm(x, 1, -1),
        "cosine_similarity": lambda x, y: nn.functional.cosine_similarity(x, y, dim=-1),
        "addmm": lambda bias, left, right: torch.addmm(
            bias[0], left[0], right[0], beta=0.5, alpha=2.0
        ),
        "addmm_plain": lambda bias, left, right: torch.addmm(bias[0, 0], left[0], right[0]),
        "addmm_no_beta": lambda bias, left, right: torch.addmm(bias[0], left[0], right[0], beta=0),
        "baddbmm": lambda bias, left, right: torch.baddbmm(
            bias, left, right, beta=3.0, alpha=0.25
        ),
        "addmm_integers": lambda j, i: torch.addmm(
            j[0, :, :3], i[0, :, :3], j[1, :, :3], beta=2, alpha=3
        ),
        "addbmm": lambda bias, left, right: torch.addbmm(bias[0], left, right, alpha=0.5),
        "addmv": lambda left, row: torch.addmv(left[0, :, 0], left[0], row, alpha=2.0),
        "softmax_dtype": lambda i: torch.softmax(i, -1, dtype=torch.float32),
        "log_softmax": lambda x: torch.log_softmax(x * 20, 1),
        "dot": lambda row: torch.dot(row, row * 2),
        "mv": lambda square, row: square @ row,
        "bilinear": lambda x, y: torch.einsum("bij,bkj->bik", x, y),
        "einsum_three": lambda x, y, row: torch.einsum("bij,bkj,j->bik", x, y, row),
        "glu": lambda x: nn.functional.glu(x, -1),
        "prelu": lambda x: nn.functional.prelu(x, torch.tensor([0.3])),
    },
    "resizing": {
        "bicubic": lambda image: interpolate(image, scale_factor=2, mode="bicubic"),
        "bicubic_corners": lambda image: interpolate(
            image, size=(7, 3), mode="bicubic", align_corners=True
        ),
        "bicubic_antialias": lambda image: interpolate(
            image, size=(2, 3), mode="bicubic", antialias=True
        ),
        "bilinear": lambda image: interpolate(image, scale_factor=2, mode="bilinear"),
        "bilinear_corners": lambda image: interpolate(
            image, size=(7, 9), mode="bilinear", align_corners=True
        ),
        "bilinear_antialias": lambda image: interpolate(
            image, size=(2, 3), mode="bilinear", antialias=True
        ),
        "nearest": lambda image: interpolate(image, size=(6, 7)),
        "nearest_exact": lambda image: interpolate(image, scale_factor=3, mode="nearest-exact"),
        "trilinear": lambda volume: interpolate(volume, scale_factor=2, mode="trilinear"),
        "trilinear_corners": lambda volume: interpolate(
            volume, size=(3, 4, 3), mode="trilinear", align_corners=True
        ),
        "nearest_volume": lambda volume: interpolate(volume, scale_factor=2),
        "linear": lambda x: interpolate(x, scale_factor=3, mode="linear"),
        "area": lambda image: interpolate(image, size=(2, 5), mode="area"),
        "adaptive": lambda image: nn.functional.adaptive_avg_pool2d(image, (2, 2)),
        "adaptive_one": lambda image: nn.functional.adaptive_avg_pool2d(image, 1),
        "avg_pool": lambda image: nn.functional.avg_pool2d(
            image, 3, stride=1, padding=1, count_include_pad=False
        ),
        "avg_pool_ceil": lambda image: nn.functional.avg_pool2d(image, 2, ceil_mode=True),
        "max_pool": lambda image: nn.functional.max_pool2d(image, 3, stride=2, padding=1),
        "pixel_shuffle": lambda five: nn.functional.pixel_shuffle(five[:, :, 0], 2),
        "pixel_unshuffle": lambda image: nn.functional.pixel_unshuffle(image[..., :4], 2),
        "pad_reflect": lambda image: nn.functional.pad(image, (1, 2, 1, 0), mode="reflect"),
        "pad_replicate": lambda image: nn.functional.pad(image, (1, 2, 1, 0), mode="replicate"),
        "pad_volume": lambda volume: nn.functional.pad(volume, (1, 0, 0, 1, 1, 1), value=2.0),
        "pad_integers": lambda i: nn.functional.pad(i, (1, 1), value=5),
        "grid_sample": lambda image, six: nn.functional.grid_sample(
            image, six[:1].tanh(), align_corners=False
        ),
        "conv_groups": lambda image: nn.functional.conv2d(
            image, torch.linspace(-1, 1, 18).reshape(2, 1, 3, 3), padding="same", groups=2
        ),
        "conv_transpose": lambda image: nn.functional.conv_transpose2d(
            image, torch.linspace(-1, 1, 48).reshape(2, 3, 2, 4), stride=2, padding=1,
        ),
        "conv_computed": lambda image, x: nn.functional.conv2d(image, x[:, :2, None, :3] * 2),
        "unfold": lambda image: nn.functional.unfold(image, 2),
    },
    "indexing": {
        "negative": lambda table, index: table[index],
        "negative_sum": lambda table, count: table[count.reshape(1) - 5],
        "negative_constant": lambda table: table[torch.tensor([-1, 0, -2])],
        "negative_last": lambda x, index: x[..., index],
        "negative_pair": lambda x, back: x[:, back, back],
        "negative_grid": lambda x, back, index: x[:, back[:, None], index[None]],
        "int32": lambda table, index: table[index.int()],
        "put": _put,
        "put_accumulate": lambda table, back, row: table.index_put(
            (back * 0 - 1,), row.expand(3, 4), accumulate=True
        ),
        "put_mask": lambda x, a, scalar: x.index_put((a,), scalar),
        "index_add": lambda x, rows, y: x.index_add(1, rows, y[:, :2]),
        "index_add_alpha": lambda table, rows, update: table.index_add(
            0, rows, update, alpha=-0.5
        ),
        "index_add_twice": lambda table, rows, update: table.index_add(0, rows * 0 + 1, update),
        "index_copy": lambda table, rows, update: table.index_copy(0, rows, update),
        "index_copy_one": lambda x, count, y: x.index_copy(1, count.reshape(1) - 2, y[:, :1]),
        "index_copy_last": lambda x, count, y: x.index_copy(-1, count.reshape(1), y[..., :1]),
        "index_fill": lambda x, rows: x.index_fill(-2, rows, 2.5),
        "index_fill_integers": lambda i, rows: i.index_fill(1, rows, 9),
        "index_select": lambda x, rows: x.index_select(1, rows),
        "index_fill_negative": lambda table: table.index_fill(0, torch.tensor([-1]), 4.0),
        "gather": lambda x, places: x.gather(1, places),
        "take_along": lambda x, places: torch.take_along_dim(x, places, 1),
        "scatter": lambda x, places, y: x.scatter(1, places[:, :1], y[:, :1]),
        "scatter_number": lambda x, places: x.scatter(1, places[:, :1], 3.5),
        "scatter_add": lambda x, places, y: x.scatter_add(1, places, y),
        "scatter_multiply": lambda x, places, y: x.scatter(1, places, y, reduce="multiply"),
        "sum": _reduced("sum", True), "sum_apart": _reduced("sum", False),
        "prod": _reduced("prod", True), "prod_apart": _reduced("prod", False),
        "amax": _reduced("amax", True), "amax_apart": _reduced("amax", False),
        "amin": _reduced("amin", True), "amin_apart": _reduced("amin", False),
        "mean": _reduced("mean", True), "mean_apart": _reduced("mean", False),
        "amax_integers": lambda i, places, j: i.scatter_reduce(1, places, j, "amax"),
        "amax_integers_apart": lambda i, places, j: i.scatter_reduce(
            1, places, j, "amax", include_self=False
        ),
        "written": _written, "strided": _strided,
        "slice_scatter": lambda x, y: x.slice_scatter(y[:, :, 1:3], 2, 1, 3),
        "slice_scatter_negative": lambda x, y: x.slice_scatter(y[..., :2], -1, -3, -1),
        "slice_scatter_uneven": lambda x, y: x.slice_scatter(y[:, :2], 1, 0, 3, 2),
        "slice_scatter_inside": lambda flat, row: flat.slice_scatter(row[:2], 0, 1, 5, 2),
        "select_scatter": lambda x, row: x.select_scatter(row.expand(2, 4), 1, -1),
        "select_scatter_last": lambda x, table: x.select_scatter(table[:2, :3], -1, 2),
    },
    "sorting": {
        "topk": lambda x: torch.topk(x, 2)[0],
        "topk_index": lambda x: torch.topk(x, 2, dim=1, largest=False)[1],
        "sort": lambda x: torch.sort(x, -1)[0],
        "sort_down": lambda x: torch.sort(x, 1, descending=True)[1],
        "sort_integers": lambda i: torch.sort(i.float(), -1)[0],
        "argsort": lambda x: torch.argsort(x, -1),
        "argmax": lambda x: x.argmax(-1),
        "argmin": lambda x: x.argmin(1, keepdim=True),
        "max": lambda x: x.max(-1)[0],
        "max_index": lambda x: x.max(1)[1],
        "max_all": lambda x: x.max(),
        "aminmax": lambda x: torch.aminmax(x, dim=-1)[0],
        "amax": lambda x: x.amax((0, 2)),
        "cumsum": lambda x: x.cumsum(1),
        "cumsum_integers": lambda i: i.cumsum(-1),
        "cumprod": lambda x: x.cumprod(-1),
        "prod": lambda x: x.prod(-1),
        "prod_all": lambda positive: positive.prod(),
        "diff": lambda x: x.diff(dim=-1),
        "diff_integers": lambda i: i.diff(dim=1),
        "diff_after": lambda i: i.diff(dim=-1, prepend=i[..., :1] - 1),
        "diff_between": lambda x: x.diff(dim=1, prepend=x[:, :1] * 2, append=x[:, :2]),
        "diff_booleans": lambda x: (x > 0).diff(dim=-1),
        "count_nonzero": lambda i: torch.count_nonzero(i, 1),
        "unbind": lambda x: x.unbind(1)[1] * x.unbind(-1)[0][:, :1],
    },
    "shapes": {
        "stack_mixed": lambda x, i: torch.stack([x, i]),
        "cat_mixed": lambda i, x, a: torch.cat([i, x, a], 1),
        "cat_empty": lambda flat: torch.cat([torch.zeros(0), flat]),
        "repeat_interleave": lambda x: x.repeat_interleave(3, 1),
        "repeat_interleave_flat": lambda x: x.repeat_interleave(2),
        "repeat": lambda x: x.repeat(2, 1, 3),
        "repeat_longer": lambda row: row.repeat(2, 3),
        "tile": lambda table: table.tile(2),
        "roll": lambda x: x.roll((1, -1), (0, 2)),
        "flip": lambda x: x.flip(0, -1),
        "chunk": lambda x: x.chunk(3, -1)[0] * 2,
        "split": lambda x: x.split([1, 3], -1)[1],
        "tensor_split": lambda x: torch.tensor_split(x, 3, -1)[2],
        "unflatten": lambda x: x.unflatten(-1, (2, -1)),
        "squeeze": lambda x: x[:, :1].squeeze(1).squeeze(0),
        "movedim": lambda x: x.movedim(0, -1),
        "swapaxes": lambda x: x.swapaxes(0, 2).mT,
        "trace": lambda square: square.trace(),
        "negative_slice": lambda x: x[..., -3:-1] + x[..., ::2],
        "narrow": lambda x: x.narrow(1, 1, 2),
        "ravel": lambda x: x.ravel(),
        "rot90": lambda table: torch.rot90(table),
        "hstack": lambda x, y: torch.hstack([x, y]),
        "cartesian": lambda row, flat: torch.cartesian_prod(row, flat),
        "cross": lambda x: torch.linalg.cross(x[..., :3], x[..., 1:]),
    },
    "deep": {
        "softmax": lambda six: torch.softmax(_deep(six), 2).flatten(2),
        "log_softmax": lambda six: torch.log_softmax(_deep(six), -1).flatten(2),
        "permute": lambda six: _deep(six).permute(4, 2, 0, 5, 3, 1).flatten(3).tanh(),
        "transpose": lambda six: _deep(six).transpose(1, 4).exp().flatten(0, 2),
        "elementwise": lambda six, twin: (_deep(six).sin() * _deep(twin) + 1).flatten(1, 3),
        "broadcast": lambda six, row: (_deep(six) * row[:2, None]).flatten(2),
        "broadcast_wide": lambda six: (
            _deep(six) + six[:, :, None, :, None, :] * six[:1, :, :, None, :1, None]
        ).flatten(2),
        "compare": lambda six, twin: (_deep(six) > _deep(twin)).flatten(2),
        "where": lambda six: torch.where(_deep(six) > 0, _deep(six), -1.0).flatten(2),
        "sum": lambda six: _deep(six).sum(3).flatten(2),
        "sum_scattered": lambda six: _deep(six).sum((0, 2, 5)),
        "mean_keep": lambda six: _deep(six).mean((1, 3), keepdim=True).flatten(2),
        "amax": lambda six: _deep(six).amax((0, 4)),
        "cat": lambda six, twin: torch.cat([_deep(six), _deep(twin)], 3).flatten(2),
        "stack": lambda five: torch.stack([five, five + 1], 2).flatten(3),
        "matmul": lambda six, twin: (_deep(six) @ _deep(twin)).flatten(2),
        "matmul_shared": lambda six, row: (_deep(six) @ row.reshape(2, 2)).flatten(2),
        "matmul_broadcast": lambda six, twin: (_deep(six) @ twin[0, 0]).flatten(2),
        "linear": lambda six, row: nn.functional.linear(_deep(six), row.reshape(2, 2)).flatten(2),
        "einsum": lambda six: torch.einsum("abcdef->cbadfe", _deep(six)).reshape(6, -1),
        "expand": lambda six: six[:, None, :, None].expand(2, 3, 3, 2, 2, 2).flatten(2) * 2,
        "repeat": lambda six: _deep(six).repeat(1, 2, 1, 1, 3, 1).flatten(2),
        "select": lambda six: _deep(six)[:, 1, :, 0],
        "slice": lambda six: _deep(six)[:, 1:, :, :, ::2].flatten(2),
        "flip": lambda six: _deep(six).flip(1, 4).flatten(2),
        "cumsum": lambda six: _deep(six).cumsum(1).flatten(2),
        "argmax": lambda six: _deep(six).argmax(1),
        "any": lambda six: (_deep(six) > 1).any(2),
        "chunk": lambda six: _deep(six).chunk(2, 3)[1].flatten(2),
        "unbind": lambda six: _deep(six).unbind(1)[2],
        "layer_norm": lambda six: layer_norm(_deep(six), (2,), eps=0.1).flatten(2),
        "rms_norm": lambda six: rms_norm(_deep(six), (2, 2), eps=0.1).flatten(2),
        "clamp": lambda six: _deep(six).clamp(-1, 1).flatten(2),
        "to_mask": lambda six: _deep(six).bool().float().flatten(2),
        "masked_fill": lambda six: _deep(six).masked_fill(_deep(six) > 1, 0.5).flatten(2),
        "gelu": lambda six: nn.functional.gelu(_deep(six), approximate="tanh").flatten(2),
        "pad": lambda six: nn.functional.pad(_deep(six), (1, 0)).flatten(2),
        "roll": lambda six: _deep(six).roll(1, 1).flatten(2),
        "var": lambda six: _deep(six).var((2, 4)),
        "window": lambda volume: (
            volume[..., :2, :].reshape(1, 2, 1, 2, 1, 2, 2, 2).permute(0, 2, 4, 6, 3, 5, 7, 1)
            .reshape(2, -1)
        ),
    },
}  # fmt: skip
