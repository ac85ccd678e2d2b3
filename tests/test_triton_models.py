"""Whole tiny models, rewritten, compiled for a GPU that is not here, and run kernel by kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import ZOO

import resplice
from resplice.backends.triton.artifact import TritonArtifact
from resplice.cases import fresh_inputs
from resplice.compare import difference
from resplice.ops import find_op
from resplice.pipeline import Pipeline
from resplice.program import Program

VIDEO = {"batch": 1, "frames": 3, "rows": 4, "columns": 4}
WORDS = {"batch": 1, "seq": 5}
TILES = "sta{tile=1,2,2 window=1,1,1}"
CASES: list[Any] = [
    ("wan", TILES, VIDEO, {"tile_attention"}),
    ("llama", "quest{weight-bits=4}", WORDS, {"quant_linear", "hadamard"}),
]
SLOW: list[Any] = [
    ("llama", "cmoe{experts=4 shared=1 active=2 k-act=5}", {"batch": 2, "seq": 8}, {"moe_ffn"}),
    ("llama", "quest{weight-bits=4 act-bits=4}", WORDS, {"quest_codes", "code_linear"}),
    ("hunyuanvideo", TILES, {**VIDEO, "text": 5}, {"tile_attention"}),
    ("wan", f"{TILES},quest{{weight-bits=4}}", VIDEO, {"tile_attention", "quant_linear"}),
]
"""Model, passes, its sizes, and ops that have a kernel there."""


def _captured(name: str, sizes: dict[str, int]) -> Program:
    entry = ZOO[name]
    chosen = {size: value for size, value in sizes.items() if size in entry.sizes}
    sample = resplice.Sample(*entry.inputs(seed=1, **chosen))
    return resplice.capture(entry.model(), sample, check=False)


def _kernels(artifact: Any, function: str = "main") -> dict[str, int]:
    """Nodes with a kernel, by op, as the manifest has them."""
    manifest = TritonArtifact.open(artifact.path).manifest
    launches = manifest["targets"]["sm_90"]["functions"][function]
    nodes = {(launch["op"], launch["node"]) for launch in launches}
    ops = [op for op, _ in nodes]
    return {op: ops.count(op) for op in sorted(set(ops))}


def _agrees(artifact: Any, program: Program, function: str = "main") -> None:
    """On other inputs than those of the check at conversion."""
    given = fresh_inputs(program, seed=7)
    expected, found = program.run_fresh(given), artifact.run(given, function=function)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert difference(value, found[name]).relative <= 1e-4, name


@pytest.mark.parametrize(
    ("name", "spec", "sizes", "ops"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_rewritten_model_runs_on_its_kernels(
    name: str, spec: str, sizes: dict[str, int], ops: set[str], tmp_path: Path
) -> None:
    small = resplice.optimize(_captured(name, sizes), spec, check=False)
    artifact = small.to_triton(tmp_path / "m", arch="sm_90", check=False)
    names = [op.name for node in small.program.graph.nodes if (op := find_op(node.target))]
    assert _kernels(artifact) == {op: names.count(op) for op in sorted(set(names))}
    assert ops <= set(names)
    _agrees(artifact, small.program)


@pytest.mark.slow
def test_two_functions_share_one_folder(tmp_path: Path) -> None:
    """tdtm: the merged model is main, the full one a further function."""
    merged, _ = Pipeline.of("tdtm{steps=3}").run(_captured("wan", VIDEO))
    artifact = resplice.optimize(merged).to_triton(tmp_path / "m", arch="sm_90", check=False)
    assert set(artifact.manifest["functions"]) == {"main", "full"}
    for function, program in merged.all_functions():
        _agrees(artifact, program, function)


def test_rotary_embeddings_with_positions_as_input(tmp_path: Path) -> None:
    from rope_models import WIDTH, language_model

    ids = torch.arange(11).expand(2, -1).contiguous()
    given = {
        "inputs_embeds": torch.randn(2, 11, WIDTH), "position_ids": ids, "use_cache": False,
    }  # fmt: skip
    program = resplice.capture(language_model("llama"), given, check=False)
    rewritten, _ = Pipeline.of("videorope").run(program)
    artifact = resplice.optimize(rewritten).to_triton(tmp_path / "m", arch="sm_90", check=False)
    assert _kernels(artifact) == {"rope3d": 4}
    _agrees(artifact, rewritten)


def test_half_precision_is_held_to_its_own_bar(tmp_path: Path) -> None:
    class Heads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(64, 96).bfloat16()
            self.outer = torch.nn.Linear(96, 8).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x).relu())

    torch.manual_seed(0)
    small = resplice.optimize(
        Heads().eval(), "quest{weight-bits=2}",
        example_inputs=(torch.randn(5, 64, dtype=torch.bfloat16),),
    )  # fmt: skip
    artifact = small.to_triton(tmp_path / "m", arch="sm_90")
    assert artifact.bar == 5e-2
    types = {
        parameter["type"]
        for kernel in artifact.manifest["targets"]["sm_90"]["kernels"].values()
        for parameter in kernel["parameters"]
    }
    assert "*bf16" in types
