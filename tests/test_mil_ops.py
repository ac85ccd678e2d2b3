"""MIL ops against torch and numpy, one model a family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mil_models
import numpy as np
import pytest
import torch
from mil_models import mb
from torch.nn import functional as F

from resplice.compare import difference
from resplice.errors import InputError

Case = tuple[Callable[[Any], Any], Callable[[torch.Tensor], Any]]
SHAPE = (2, 4, 4, 6)
W = np.random.default_rng(0).standard_normal((6, 4, 3, 3)).astype(np.float32)
M = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
V = np.array([0.5, 2.0, -1.0, 0.25], np.float32)
T = {"w": torch.from_numpy(W), "m": torch.from_numpy(M), "v": torch.from_numpy(V)}
COLUMN = T["v"].reshape(1, 4, 1, 1)
INDICES = np.array([[0, 3], [-1, 1]], np.int32)

ELEMENTWISE: dict[str, Case] = {
    "add": (lambda x: mb.add(x=x, y=V.reshape(4, 1, 1)), lambda x: x + COLUMN),
    "real_div": (lambda x: mb.real_div(x=x, y=3.0), lambda x: x / 3),
    "floor_div": (lambda x: mb.floor_div(x=x, y=0.7), lambda x: torch.floor(x / 0.7)),
    "mod": (lambda x: mb.mod(x=x, y=0.7), lambda x: x - torch.floor(x / 0.7) * 0.7),
    "inverse": (lambda x: mb.inverse(x=x), lambda x: 1 / (x + 1e-4)),
    "inverse_eps": (lambda x: mb.inverse(x=x, epsilon=0.5), lambda x: 1 / (x + 0.5)),
    "log": (lambda x: mb.log(x=mb.abs(x=x), epsilon=0.1), lambda x: torch.log(x.abs() + 0.1)),
    "rsqrt": (lambda x: mb.rsqrt(x=mb.abs(x=x)), lambda x: 1 / torch.sqrt(x.abs() + 1e-12)),
    "round": (lambda x: mb.round(x=x), lambda x: torch.from_numpy(np.round(x.numpy()))),
    "cast": (lambda x: mb.cast(x=mb.mul(x=x, y=3.0), dtype="int32"), lambda x: (x * 3).int()),
    "select": (
        lambda x: mb.select(cond=mb.greater(x=x, y=0.0), a=x, b=mb.mul(x=x, y=2.0)),
        lambda x: x.where(x > 0, 2 * x),
    ),
    "clip": (lambda x: mb.clip(x=x, alpha=-0.5, beta=0.25), lambda x: x.clamp(-0.5, 0.25)),
    "threshold": (lambda x: mb.threshold(x=x, alpha=0.1), lambda x: x.clamp(min=0.1)),
}
ACTIVATIONS: dict[str, Case] = {
    "gelu": (lambda x: mb.gelu(x=x), F.gelu),
    "gelu_tanh": (
        lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "gelu_sigmoid": (
        lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        lambda x: x / (1 + torch.exp(-1.702 * x)),
    ),
    "prelu": (lambda x: mb.prelu(x=x, alpha=V), lambda x: F.prelu(x, T["v"])),
    "elu": (lambda x: mb.elu(x=x, alpha=0.7), lambda x: F.elu(x, 0.7)),
    "softplus_parametric": (
        lambda x: mb.softplus_parametric(x=x, alpha=V, beta=V),
        lambda x: COLUMN * torch.log1p(torch.exp(COLUMN * x)),
    ),
    "softsign": (lambda x: mb.softsign(x=x), lambda x: x / (1 + x.abs())),
    "sigmoid_hard": (
        lambda x: mb.sigmoid_hard(x=x, alpha=0.3, beta=0.4),
        lambda x: (0.3 * x + 0.4).clamp(0, 1),
    ),
    "clamped_relu": (
        lambda x: mb.clamped_relu(x=x, alpha=0.1, beta=0.6),
        lambda x: torch.where(x > 0, x, 0.1 * x).clamp(max=0.6),
    ),
    "thresholded_relu": (
        lambda x: mb.thresholded_relu(x=x, alpha=0.4),
        lambda x: F.threshold(x, 0.4, 0),
    ),
    "softmax": (lambda x: mb.softmax(x=x, axis=1), lambda x: torch.softmax(x, 1)),
}
REDUCTIONS: dict[str, Case] = {
    "sum": (lambda x: mb.reduce_sum(x=x, axes=[1, -1]), lambda x: x.sum((1, 3))),
    "mean": (
        lambda x: mb.reduce_mean(x=x, axes=[2], keep_dims=True),
        lambda x: x.mean(2, keepdim=True),
    ),
    "max": (lambda x: mb.reduce_max(x=x, axes=[0]), lambda x: x.amax(0)),
    "prod": (lambda x: mb.reduce_prod(x=x, axes=[2, 3]), lambda x: x.flatten(2).prod(-1)),
    "l2": (lambda x: mb.reduce_l2_norm(x=x, axes=[3]), lambda x: x.norm(dim=3)),
    "l1": (lambda x: mb.reduce_l1_norm(x=x, axes=[3]), lambda x: x.norm(p=1, dim=3)),
    "log_sum_exp": (
        lambda x: mb.reduce_log_sum_exp(x=x, axes=[1]),
        lambda x: torch.logsumexp(x, 1),
    ),
    "sum_square": (lambda x: mb.reduce_sum_square(x=x, axes=[1]), lambda x: (x * x).sum(1)),
    "argmax": (lambda x: mb.reduce_argmax(x=x, axis=2), lambda x: x.argmax(2).int()),
    "argmin": (
        lambda x: mb.reduce_argmin(x=x, axis=1, keep_dims=True),
        lambda x: x.argmin(1, keepdim=True).int(),
    ),
    "cumsum": (
        lambda x: mb.cumsum(x=x, axis=1, exclusive=True, reverse=True),
        lambda x: x.flip(1).cumsum(1).flip(1) - x,
    ),
}
SHAPES: dict[str, Case] = {
    "reshape": (
        lambda x: mb.reshape(x=x, shape=[0, -1, 8, 0]),
        lambda x: x.reshape(2, 2, 8, 6),
    ),
    "expand": (lambda x: mb.expand_dims(x=x, axes=[-1]), lambda x: x.unsqueeze(-1)),
    "flatten": (lambda x: mb.flatten2d(x=x, axis=-2), lambda x: x.reshape(8, 24)),
    "transpose": (
        lambda x: mb.transpose(x=x, perm=[0, 3, 1, 2]),
        lambda x: x.permute(0, 3, 1, 2),
    ),
    "slice": (
        lambda x: mb.slice_by_index(
            x=x, begin=[0, 3, 0, 1], end=[0, 0, 0, -1], stride=[1, -2, 1, 2],
            begin_mask=[False, False, True, False], end_mask=[False, False, True, False],
            squeeze_mask=[True, False, False, False],
        ),
        lambda x: torch.from_numpy(x.numpy()[0, 3:0:-2, :, 1:-1:2].copy()),
    ),
    "slice_size": (
        lambda x: mb.slice_by_size(x=x, begin=[0, 1, 0, 2], size=[-1, 2, -1, 3]),
        lambda x: x[:, 1:3, :, 2:5],
    ),
    "slice_update": (
        lambda x: mb.slice_update(
            x=x, update=np.ones((2, 4, 4, 2), np.float32), begin=[0, 0, 0, 5], end=[2, 4, 4, 1],
            stride=[1, 1, 1, -2],
        ),
        lambda x: x.index_fill(3, torch.tensor([5, 3]), 1.0),
    ),
    "concat": (
        lambda x: mb.concat(values=[x, mb.mul(x=x, y=2.0)], axis=1, interleave=True),
        lambda x: torch.stack((x, 2 * x), 2).reshape(2, 8, 4, 6),
    ),
    "split": (
        lambda x: list(mb.split(x=x, split_sizes=[1, 3], axis=1)),
        lambda x: list(x.split([1, 3], 1)),
    ),
    "tile": (lambda x: mb.tile(x=x, reps=[1, 2, 1, 1]), lambda x: x.repeat(1, 2, 1, 1)),
    "reflect": (
        lambda x: mb.pad(x=x, pad=[1, 2, 3, 1], mode="reflect"),
        lambda x: F.pad(x, (3, 1, 1, 2), mode="reflect"),
    ),
    "replicate": (
        lambda x: mb.pad(x=x, pad=[1, 2, 3, 1], mode="replicate"),
        lambda x: F.pad(x, (3, 1, 1, 2), mode="replicate"),
    ),
    "constant": (
        lambda x: mb.pad(x=x, pad=[0, 0, 1, 0, 0, 0, 2, 2], constant_val=0.5),
        lambda x: F.pad(x, (2, 2, 0, 0, 1, 0), value=0.5),
    ),
    "windows": (
        lambda x: mb.sliding_windows(x=x, axis=2, size=2, stride=2),
        lambda x: x.unfold(2, 2, 2).permute(0, 1, 2, 4, 3),
    ),
    "shuffle": (
        lambda x: mb.pixel_shuffle(x=x, upscale_factor=2),
        lambda x: F.pixel_shuffle(x, 2),
    ),
    "band": (
        lambda x: mb.band_part(x=x, lower=1, upper=-1),
        lambda x: x.triu(-1),
    ),
    "reverse": (lambda x: mb.reverse(x=x, axes=[1, 3]), lambda x: x.flip(1, 3)),
    "one_hot": (
        lambda x: mb.one_hot(
            indices=mb.reduce_argmax(x=x, axis=1), one_hot_vector_size=3, axis=0, on_value=2.0,
            off_value=-1.0,
        ),
        lambda x: torch.stack([torch.where(x.argmax(1) == at, 2.0, -1.0) for at in range(3)]),
    ),
    "reverse_sequence": (
        lambda x: mb.reverse_sequence(x=x, lengths=[2, 3], seq_axis=1, batch_axis=0),
        lambda x: torch.stack((x[0, [1, 0, 2, 3]], x[1, [2, 1, 0, 3]])),
    ),
}  # fmt: skip
INDEXING: dict[str, Case] = {
    "gather": (
        lambda x: mb.gather(x=x, indices=INDICES, axis=1),
        lambda x: x[:, torch.tensor([[0, 3], [3, 1]])],
    ),
    "gather_batch": (
        lambda x: mb.gather(x=x, indices=INDICES, axis=2, batch_dims=1),
        lambda x: torch.stack((x[0][:, [0, 3]], x[1][:, [3, 1]])),
    ),
    "gather_nd": (
        lambda x: mb.gather_nd(x=x, indices=INDICES, batch_dims=0),
        lambda x: torch.stack((x[0, 3], x[1, 1])),
    ),
    "along": (
        lambda x: mb.gather_along_axis(x=x, indices=np.full((2, 1, 4, 6), -2, np.int32), axis=1),
        lambda x: x[:, 2:3],
    ),
    "scatter_add": (
        lambda x: mb.scatter(
            data=x, indices=np.array([1, 1]), updates=np.ones((2, 4, 4, 6), np.float32), axis=0
        ),
        lambda x: torch.stack((x[0], x[1] + 2)),
    ),
    "scatter_max": (
        lambda x: mb.scatter(
            data=x, indices=np.array([3]), updates=np.zeros((2, 1, 4, 6), np.float32), axis=1,
            mode="max",
        ),
        lambda x: torch.cat((x[:, :3], x[:, 3:].clamp(min=0)), 1),
    ),
    "scatter_div": (
        lambda x: mb.scatter_along_axis(
            data=x, indices=np.zeros((2, 1, 4, 6), np.int32),
            updates=np.full((2, 1, 4, 6), 4, np.float32), axis=1, mode="div",
        ),
        lambda x: torch.cat((x[:, :1] / 4, x[:, 1:]), 1),
    ),
    "scatter_nd": (
        lambda x: mb.scatter_nd(
            data=x, indices=np.array([[1, 2]]), updates=np.ones((1, 4, 6), np.float32),
            mode="update",
        ),
        lambda x: x.index_put((torch.tensor(1), torch.tensor(2)), torch.ones(4, 6)),
    ),
    "topk": (
        lambda x: list(mb.topk(x=x, k=2, axis=1, ascending=True)),
        lambda x: [x.topk(2, 1, largest=False)[0], x.topk(2, 1, largest=False)[1].int()],
    ),
    "argsort": (
        lambda x: mb.argsort(x=x, axis=-1, ascending=True),
        lambda x: x.argsort(-1).int(),
    ),
    "non_zero": (
        lambda x: mb.non_zero(x=mb.relu(x=x)),
        lambda x: torch.nonzero(x.relu()).int(),
    ),
}  # fmt: skip
SPATIAL: dict[str, Case] = {
    "conv": (
        lambda x: mb.conv(x=x, weight=W, pad_type="custom", pad=[1, 0, 2, 1], strides=[1, 2]),
        lambda x: F.conv2d(F.pad(x, (2, 1, 1, 0)), T["w"], stride=(1, 2)),
    ),
    "conv_same": (
        lambda x: mb.conv(x=x, weight=W, pad_type="same", strides=[2, 2]),
        lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), T["w"], stride=2),
    ),
    "conv_transpose": (
        lambda x: mb.conv_transpose(
            x=x, weight=W[:4, :2], strides=[2, 2], pad_type="custom", pad=[1, 1, 0, 1]
        ),
        lambda x: F.conv_transpose2d(x, T["w"][:4, :2], stride=2)[..., 1:-1, :-1],
    ),
    "max_pool": (
        lambda x: mb.max_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom",
                              pad=[1, 1, 1, 1], ceil_mode=True),
        lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    ),
    "avg_pool": (
        lambda x: mb.avg_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom",
                              pad=[1, 1, 1, 1], exclude_padding_from_average=True),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    ),
    "l2_pool": (
        lambda x: mb.l2_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid"),
        lambda x: F.lp_pool2d(x, 2.0, 2),
    ),
    "bilinear": (
        lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3,
                                       align_corners=False),
        lambda x: F.interpolate(x, scale_factor=(2, 3), mode="bilinear", align_corners=False),
    ),
    "aligned": (
        lambda x: mb.resize(x=x, shape=[7, 5], resized_dims=np.uint32(2),
                            sampling_mode="STRICT_ALIGN_CORNERS"),
        lambda x: F.interpolate(x, (7, 5), mode="bilinear", align_corners=True),
    ),
    "nearest": (
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=2),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    ),
}  # fmt: skip
NORMS: dict[str, Case] = {
    "batch_norm": (
        lambda x: mb.batch_norm(x=x, mean=V, variance=V**2, gamma=V, beta=V, epsilon=0.1),
        lambda x: F.batch_norm(x, T["v"], T["v"] ** 2, T["v"], T["v"], eps=0.1),
    ),
    "instance_norm": (
        lambda x: mb.instance_norm(x=x, gamma=V, beta=V, epsilon=1e-3),
        lambda x: F.instance_norm(x, weight=T["v"], bias=T["v"], eps=1e-3),
    ),
    "layer_norm": (
        lambda x: mb.layer_norm(x=x, axes=[1], gamma=V, beta=V, epsilon=1e-3),
        lambda x: F.layer_norm(x.movedim(1, -1), [4], T["v"], T["v"], 1e-3).movedim(-1, 1),
    ),
    "l2_norm": (
        lambda x: mb.l2_norm(x=x, epsilon=0.1),
        lambda x: x / (x.flatten(1).norm(dim=1) ** 2 + 0.1).sqrt().reshape(2, 1, 1, 1),
    ),
    "lrn": (
        lambda x: mb.local_response_norm(x=x, size=3, alpha=0.5, beta=0.6, k=1.5),
        lambda x: F.local_response_norm(x, 3, 0.5, 0.6, 1.5),
    ),
    "linear": (lambda x: mb.linear(x=x, weight=M), lambda x: x @ T["m"].T),
    "matmul": (
        lambda x: mb.matmul(x=x, y=x, transpose_y=True),
        lambda x: x @ x.transpose(-1, -2),
    ),
    "einsum": (
        lambda x: mb.einsum(values=(x, mb.transpose(x=x, perm=[0, 3, 2, 1])),
                            equation="nchw,nwhu->nchu"),
        lambda x: torch.einsum("nchw,nwhu->nchu", x, x.permute(0, 3, 2, 1)),
    ),
    "sdpa": (
        lambda x: mb.scaled_dot_product_attention(
            query=x, key=x, value=x, attn_mask=np.tri(4, dtype=bool)
        ),
        lambda x: torch.softmax(
            (x @ x.mT / math.sqrt(6)).masked_fill(~torch.ones(4, 4).tril().bool(), -torch.inf), -1
        ) @ x,
    ),
}  # fmt: skip
FAMILIES = {
    "elementwise": ("iOS18", ELEMENTWISE),
    "activations": ("iOS18", ACTIVATIONS),
    "reductions": ("iOS18", REDUCTIONS),
    "shapes": ("iOS18", SHAPES),
    "indexing": ("iOS16", INDEXING),  # the last opset with negative indices
    "spatial": ("iOS18", SPATIAL),
    "norms": ("iOS18", NORMS),
}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_agrees_with_torch(family: str) -> None:
    target, cases = FAMILIES[family]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    built = mil_models.model(
        lambda x: tuple(out for build, _ in cases.values() for out in _listed(build(x))),
        SHAPE,
        target=target,
    )
    found = iter(mil_models.outputs(built, x))
    wrong = {}
    for name, (_, reference) in cases.items():
        for wanted in _listed(reference(x)):
            result = next(found)
            assert result.dtype == wanted.dtype, name
            measured = difference(wanted, result)
            if not measured.within(2e-5):
                wrong[name] = str(measured)
    assert wrong == {}


@pytest.mark.parametrize("index", [-1, 4])
def test_indices_that_are_undefined_on_a_device_are_refused(index: int) -> None:
    built = mil_models.model(
        lambda i: mb.gather(x=np.ones((4, 2), np.float32), indices=i), (1,), dtype=torch.int32
    )
    with pytest.raises(InputError, match=f"index {index} is out of range for an axis of 4"):
        mil_models.outputs(built, torch.tensor([index], dtype=torch.int32))


def test_integers_keep_their_arithmetic() -> None:
    built = mil_models.model(
        lambda x: (
            mb.floor_div(x=x, y=2), mb.mod(x=x, y=3), mb.mul(x=x, y=x), mb.maximum(x=x, y=0)
        ),
        (5,), dtype=torch.int32,
    )  # fmt: skip
    x = torch.tensor([-5, -2, 0, 3, 7], dtype=torch.int32)
    halves, rests, squares, positive = mil_models.outputs(built, x)
    assert halves.tolist() == [-3, -1, 0, 1, 3]
    assert rests.tolist() == [1, 1, 0, 0, 1]
    assert squares.tolist() == [25, 4, 0, 9, 49]
    assert positive.tolist() == [0, 0, 0, 3, 7]
    assert {t.dtype for t in (halves, rests, squares, positive)} == {torch.int32}


def test_quantize_rounds_clips_and_returns() -> None:
    def build(x: Any) -> Any:
        scale, zero = np.array([0.1, 0.5], np.float32), np.array([3, -4], np.int8)
        q = mb.quantize(input=x, scale=scale, zero_point=zero, axis=0, output_dtype="int8")
        return mb.dequantize(input=q, scale=scale, zero_point=zero, axis=0)

    x = torch.tensor([[0.24, 100.0], [0.74, -100.0]])
    (result,) = mil_models.outputs(mil_models.model(build, (2, 2)), x)
    expected = torch.tensor([[0.2, (127 - 3) * 0.1], [0.5, (-128 + 4) * 0.5]])
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_lstm_agrees_with_torch(direction: str) -> None:
    torch.manual_seed(0)
    both = direction == "bidirectional"
    layer = torch.nn.LSTM(3, 4, bidirectional=both)
    weights = {name: value.detach() for name, value in layer.named_parameters()}

    def order(value: torch.Tensor) -> np.ndarray:
        i, f, z, o = value.chunk(4)
        return torch.cat((i, f, o, z)).numpy()

    def given(suffix: str, back: str) -> dict[str, np.ndarray]:
        bias = weights[f"bias_ih_l0{suffix}"] + weights[f"bias_hh_l0{suffix}"]
        return {
            f"weight_ih{back}": order(weights[f"weight_ih_l0{suffix}"]),
            f"weight_hh{back}": order(weights[f"weight_hh_l0{suffix}"]),
            f"bias{back}": order(bias),
        }

    parameters = given("", "") | (given("_reverse", "_back") if both else {})
    zeros = np.zeros((2, 8 if both else 4), np.float32)
    built = mil_models.model(
        lambda x: tuple(
            mb.lstm(x=x, initial_h=zeros, initial_c=zeros, direction=direction,
                    output_sequence=True, **parameters)
        ),
        (5, 2, 3), passes=True,
    )  # fmt: skip
    x = torch.randn(5, 2, 3)
    sequence, last, memory = mil_models.outputs(built, x)
    with torch.no_grad():
        expected, (h, c) = layer(x.flip(0) if direction == "reverse" else x)
    torch.testing.assert_close(sequence, expected)
    torch.testing.assert_close(last, torch.cat(list(h), -1))
    torch.testing.assert_close(memory, torch.cat(list(c), -1))


def test_random_ops_have_the_declared_shape_and_repeat() -> None:
    built = mil_models.model(
        lambda x: (
            mb.random_uniform(shape=[3, 500], low=2.0, high=4.0, seed=5),
            mb.random_normal(shape=[1500], mean=1.0, stddev=0.1, seed=5),
            mb.random_bernoulli(shape=[1500], prob=0.25, seed=5),
            mb.random_categorical(x=x, size=100, seed=5),
        ),
        (2, 3),
    )
    x = torch.tensor([[0.0, 50.0, 0.0], [0.0, 0.0, 50.0]])
    first, second = mil_models.outputs(built, x), mil_models.outputs(built, x)
    uniform, normal, coins, classes = first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert uniform.shape == (3, 500)
    assert 2 <= uniform.min() < uniform.max() <= 4
    assert abs(normal.mean() - 1) < 0.02
    assert abs(coins.mean() - 0.25) < 0.05
    assert [set(row.tolist()) for row in classes] == [{1}, {2}]


def test_non_maximum_suppression_keeps_the_best_of_overlapping_boxes() -> None:
    boxes = torch.tensor([[[5.0, 5, 4, 4], [5.5, 5, 4, 4], [20, 20, 4, 4]]])
    scores = torch.tensor([[[0.5], [0.9], [0.1]]])
    built = mil_models.model(
        lambda b, s: tuple(
            mb.non_maximum_suppression(
                boxes=b, scores=s, iou_threshold=0.5, score_threshold=0.05, max_boxes=3
            )
        ),
        (1, 3, 4), (1, 3, 1), target="iOS15",
    )  # fmt: skip
    kept, best, places, count = mil_models.outputs(built, boxes, scores)
    assert places.tolist() == [[1, 2, -1]]
    assert count.tolist() == [2]
    assert torch.equal(kept[0, :2], boxes[0, 1:])
    assert torch.equal(best[0, :2], scores[0, 1:])
