"""Compressed weights: our decoders against coremltools' own `decompress_weights`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mil_models
import numpy as np
import pytest
import torch
from mil_models import mb, types

from resplice.backends.coreml.mil.interpreter import Interpreter
from resplice.backends.coreml.mil.package import MilPackage
from resplice.backends.coreml.mil.tools import coremltools as ct
from resplice.backends.coreml.mil.tools import silent

with silent():
    import coremltools.optimize.coreml as cto

W = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
S = np.where(W > 0, np.float32(0.5), np.float32(-0.5))


def _config(options: Any) -> Any:
    return cto.OptimizationConfig(global_config=options)


def _palettize(nbits: int, **options: Any) -> Callable[[Any], Any]:
    config = cto.OpPalettizerConfig(mode="uniform", nbits=nbits, weight_threshold=0, **options)
    return lambda m: cto.palettize_weights(m, _config(config))


def _quantize(**options: Any) -> Callable[[Any], Any]:
    config = cto.OpLinearQuantizerConfig(weight_threshold=0, **options)
    return lambda m: cto.linear_quantize_weights(m, _config(config))


def _prune(m: Any) -> Any:
    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=0)
    return cto.prune_weights(m, _config(config))


def _joint(m: Any) -> Any:
    config = cto.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=0)
    return cto.palettize_weights(_prune(m), _config(config), joint_compression=True)


def _joint_quantized(m: Any) -> Any:
    config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
    return cto.linear_quantize_weights(_prune(m), _config(config), joint_compression=True)


SCHEMES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "lut1 iOS16": ("iOS16", _palettize(1)),
    "lut6 iOS16": ("iOS16", _palettize(6)),
    "affine iOS16": ("iOS16", _quantize(mode="linear", dtype="uint8")),
    "sparse iOS16": ("iOS16", _prune),
    "lut1": ("iOS18", _palettize(1)),
    "lut4 groups": (
        "iOS18",
        _palettize(4, granularity="per_grouped_channel", group_size=8, channel_axis=1),
    ),
    "int8": ("iOS18", _quantize(mode="linear_symmetric", dtype="int8")),
    "uint4 blocks": (
        "iOS18",
        _quantize(mode="linear", dtype="uint4", granularity="per_block", block_size=32),
    ),
    "sparse": ("iOS18", _prune),
    "sparse lut": ("iOS18", _joint),
    "sparse int8": ("iOS18", _joint_quantized),
}


@pytest.mark.parametrize(
    "scheme, half",
    [(scheme, True) for scheme in SCHEMES]
    + [(scheme, False) for scheme in ("lut6 iOS16", "lut4 groups", "uint4 blocks")],
)
def test_compressed_weights_equal_the_decompressed_ones(scheme: str, half: bool) -> None:
    target, compress = SCHEMES[scheme]
    dense = mil_models.model(
        lambda x: mb.linear(x=x, weight=W, name="y"), (2, 96), target=target, half=half
    )
    with silent():
        small = compress(dense)
        large = cto.decompress_weights(small)
    ops = MilPackage.open(small.package_path).program.functions["main"].operations
    assert any(op.op_type.startswith("constexpr_") for op in ops)
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mil_models.outputs(small, x)[0], mil_models.outputs(large, x)[0])


def test_a_chain_of_table_and_scale_is_decoded() -> None:
    signs = (W > 0).astype(np.uint8)
    scale = np.abs(W).mean(1, keepdims=True)

    def build(x: Any) -> Any:
        table = np.array([-1, 1], np.int8).reshape(1, 1, 2, 1)
        indices = signs.astype(types.nptype_from_builtin(types.string_to_builtin("uint1")))
        weight = mb.constexpr_lut_to_dense(indices=indices, lut=table)
        weight = mb.constexpr_blockwise_shift_scale(data=weight, scale=scale)
        return mb.linear(x=x, weight=weight)

    built = mil_models.model(build, (2, 96), target="iOS26")
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    expected = x @ torch.from_numpy(np.where(W > 0, scale, -scale)).T
    torch.testing.assert_close(mil_models.outputs(built, x)[0], expected)


def test_a_table_of_vectors_runs_along_its_axis() -> None:
    lut = np.arange(8, dtype=np.float32).reshape(1, 1, 4, 2)
    indices = np.array([[0, 3, 1], [2, 2, 0]], np.uint8)

    def build(x: Any) -> Any:
        small = indices.astype(types.nptype_from_builtin(types.string_to_builtin("uint2")))
        return mb.add(x=x, y=mb.constexpr_lut_to_dense(indices=small, lut=lut, vector_axis=0))

    (found,) = mil_models.outputs(mil_models.model(build, (4, 3)), torch.zeros(4, 3))
    expected = lut[0, 0][indices].transpose(0, 2, 1).reshape(4, 3)
    assert torch.equal(found, torch.from_numpy(expected))


def test_equal_weights_of_two_functions_are_held_once(tmp_path: Any) -> None:
    large = np.random.default_rng(1).standard_normal((256, 256)).astype(np.float32)
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name in ("double", "single"):
        factor = 2.0 if name == "double" else 1.0
        built = mil_models.model(
            lambda x, f=factor: mb.mul(x=mb.linear(x=x, weight=large), y=f, name="y"), (1, 256)
        )
        (tmp_path / name).mkdir()
        descriptor.add_function(str(mil_models.saved(built, tmp_path / name)), "main", name)
    descriptor.default_function_name = "double"
    path = tmp_path / "both.mlpackage"
    with silent():
        ct.utils.save_multifunction(descriptor, str(path))
    package = MilPackage.open(path)
    assert package.functions == ("double", "single")
    assert package.default == "double"
    x = torch.randn(1, 256)
    (name,) = (each.name for each in package.inputs("single"))
    twice, once = (Interpreter(package, each).run({name: x})["y"] for each in package.functions)
    torch.testing.assert_close(twice, 2 * once)
    assert len(package.constants._by_content) == 1
