"""Every op of the dialect, by its own samples: meaning, shapes, refusals, gradients, cost, ONNX."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import resplice.kernels  # noqa: F401  # registers the ops
from resplice.capture import capture
from resplice.compare import difference
from resplice.cost import Cost, node_cost, program_cost
from resplice.errors import CaptureError, OpError
from resplice.kernels.code_linear import code_linear
from resplice.kernels.hadamard import hadamard, hadamard_matrix, largest_block
from resplice.kernels.moe_ffn import moe_ffn
from resplice.kernels.quant_linear import dequantize, group_count, quant_linear
from resplice.ops import NAMESPACE, Op, OpSample, all_ops, find_op
from resplice.pipeline import Pipeline
from resplice.program import Program

OPS = all_ops()
CASES = [(op, sample) for op in OPS.values() if op.samples for sample in op.samples()]
GOOD = [case for case in CASES if not case[1].refused]
BAD = [case for case in CASES if case[1].refused]
TRAINED = [case for case in GOOD if case[1].grad]
ROW_BY_ROW = [case for case in GOOD if case[0].name in ("hadamard", "quant_linear")]


def each(cases: list[tuple[Op, OpSample]]) -> Any:
    """Parametrise over samples."""
    names = [f"{op.name}: {sample.label}" for op, sample in cases]
    return pytest.mark.parametrize(("op", "sample"), cases, ids=names)


def widened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same call in float64."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


class Calls(nn.Module):
    """Calls one op with every sample's constants as buffers; takes the first arguments."""

    def __init__(self, op: Op, samples: list[OpSample]) -> None:
        super().__init__()
        self.op, self.calls = op, [sample.args[1:] for sample in samples]
        for i, rest in enumerate(self.calls):
            for j, value in enumerate(rest):
                if isinstance(value, Tensor):
                    self.register_buffer(f"constant_{i}_{j}", value)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The results of every sample."""
        found = [results(self.op, x, *self.rest(i)) for i, x in enumerate(inputs)]
        return tuple(result for several in found for result in several)

    def rest(self, i: int) -> Iterator[Any]:
        """Arguments after the first, tensors from buffers."""
        for j, value in enumerate(self.calls[i]):
            yield getattr(self, f"constant_{i}_{j}") if isinstance(value, Tensor) else value


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    """One result or several."""
    return (found,) if isinstance(found, Tensor) else tuple(found)


def results(op: Op, *args: Any) -> tuple[Tensor, ...]:
    """What an op returns."""
    return as_tuple(op(*args))


def program_of(op: Op, *samples: OpSample) -> Program:
    """Capture calls of an op."""
    return capture(Calls(op, list(samples)), tuple(sample.args[0] for sample in samples))


# ---- meaning -----------------------------------------------------------------------------


def test_every_op_has_good_and_refused_samples() -> None:
    assert OPS
    for op in OPS.values():
        assert op.samples is not None, op.name
        refused = [bool(sample.refused) for sample in op.samples()]
        assert any(refused), op.name
        assert not all(refused), op.name
        assert op.cost_rule is not None, op.name


@each(GOOD)
def test_the_registered_op_is_its_reference(op: Op, sample: OpSample) -> None:
    """Without a fast path it is the reference itself; with one, see the next test."""
    pairs = zip(as_tuple(op.reference(*sample.args)), results(op, *sample.args), strict=True)
    for expected, found in pairs:
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if op.fast is None:
            assert torch.equal(found, expected)


@each(GOOD)
def test_the_op_is_near_its_reference_in_float64(op: Op, sample: OpSample) -> None:
    """A sum of n products errs by at most n eps |a||b|, and |a||b| <= sqrt(n) max|result|, say."""
    size = sample.args[0].shape[-1]
    wide = as_tuple(op.reference(*widened(sample.args)))
    for exact, found in zip(wide, results(op, *sample.args), strict=True):
        if not found.is_floating_point():
            assert torch.equal(found, exact)
            continue
        measured = difference(exact, found)
        assert measured.finite
        assert measured.relative <= size**1.5 * torch.finfo(found.dtype).eps


@each(GOOD)
def test_arguments_are_left_as_they_were(op: Op, sample: OpSample) -> None:
    copies = [a.clone() if isinstance(a, Tensor) else a for a in sample.args]
    op(*sample.args)
    for copy, value in zip(copies, sample.args, strict=True):
        assert torch.equal(copy, value) if isinstance(value, Tensor) else copy == value


@each(GOOD)
def test_inputs_that_are_not_contiguous_give_the_same(op: Op, sample: OpSample) -> None:
    x, *rest = sample.args
    strided = x.unsqueeze(-1).repeat_interleave(2, -1)[..., 0]
    assert not strided.is_contiguous() or strided.numel() <= 1
    for a, b in zip(results(op, strided, *rest), results(op, x, *rest), strict=True):
        assert torch.equal(a, b)


@each(ROW_BY_ROW)
def test_leading_axes_do_not_matter(op: Op, sample: OpSample) -> None:
    x, *rest = sample.args
    whole = op(x, *rest)
    flat = op(x.reshape(-1, x.shape[-1]), *rest)
    assert torch.equal(whole.reshape(flat.shape), flat)
    if x.numel():
        row = op(x.reshape(-1, x.shape[-1])[0], *rest)
        assert row.shape == flat.shape[1:]
        assert difference(flat[0], row).relative <= x.shape[-1] * torch.finfo(row.dtype).eps


@each(BAD)
def test_calls_outside_the_domain_are_refused(op: Op, sample: OpSample) -> None:
    with pytest.raises(OpError) as caught:
        op(*sample.args)
    assert sample.refused in str(caught.value)
    assert str(caught.value).startswith(f"{op.name}: {caught.value.argument} ")
    assert caught.value.exit_code == 2


@each(BAD)
def test_calls_outside_the_domain_are_refused_on_shapes_alone(op: Op, sample: OpSample) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(OpError) as caught:
        op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in sample.args))
    assert sample.refused in str(caught.value)


@each(BAD)
def test_calls_outside_the_domain_are_refused_at_capture(op: Op, sample: OpSample) -> None:
    with pytest.raises((CaptureError, OpError)) as caught:
        program_of(op, sample)
    assert sample.refused in str(caught.value)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_an_input_without_axes_is_refused(op: Op) -> None:
    sample = next(sample for o, sample in GOOD if o is op)
    with pytest.raises(OpError, match="has no axes"):
        op(torch.tensor(1.0), *sample.args[1:])


# ---- shapes and capture ------------------------------------------------------------------


@each(GOOD)
def test_fake_results_have_the_layout_of_real_ones(op: Op, sample: OpSample) -> None:
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in sample.args]
        fakes = results(op, *args)
    for fake, real in zip(fakes, results(op, *sample.args), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@each(GOOD)
def test_the_op_survives_capture(op: Op, sample: OpSample) -> None:
    program = program_of(op, sample)
    assert [n for n in program.graph.nodes if find_op(n.target) is op]
    for a, b in zip(program(sample.args[0]), results(op, *sample.args), strict=True):
        assert torch.equal(a, b)


DYNAMIC = [case for case in ROW_BY_ROW if all(size > 1 for size in case[1].args[0].shape)]


@each(DYNAMIC)
def test_sizes_stay_symbolic_through_the_op(op: Op, sample: OpSample) -> None:
    x, *rest = sample.args
    shapes = {"inputs_0": {axis: f"n{axis}" for axis in range(x.dim() - 1)}}
    program = capture(Calls(op, [sample]), (x,), dynamic_shapes=shapes)
    (port,) = program.outputs
    assert port.shape[:-1] == tuple(f"n{axis}" for axis in range(x.dim() - 1))
    assert port.shape[-1] == op(*sample.args).shape[-1]
    other = torch.randn([*(size + 3 for size in x.shape[:-1]), x.shape[-1]], dtype=x.dtype)
    assert torch.equal(program(other)[0], op(other, *rest))


@each(GOOD)
def test_torch_accepts_the_registration(op: Op, sample: OpSample) -> None:
    args = sample.args
    if sample.grad:
        args = (args[0].clone().requires_grad_(), *args[1:])
    torch.library.opcheck(op.overload, args)


def test_other_targets_are_no_ops_of_ours() -> None:
    assert find_op(torch.ops.aten.add.Tensor) is None
    assert find_op(len) is None
    assert find_op(quant_linear.overload) is quant_linear
    assert quant_linear.overload.namespace == NAMESPACE


# ---- gradients ---------------------------------------------------------------------------


def trained(op: Op, args: tuple[Any, ...]) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The op as a function of what it is differentiated by: x and a bias."""
    wide = widened(args)
    places = [0] if op is not quant_linear or args[3] is None else [0, 3]

    def function(*chosen: Tensor) -> Tensor:
        full = list(wide)
        for place, value in zip(places, chosen, strict=True):
            full[place] = value
        result: Tensor = op(*full)
        return result

    return function, tuple(wide[place].clone().requires_grad_() for place in places)


@each(TRAINED)
def test_gradients_are_those_of_the_op(op: Op, sample: OpSample) -> None:
    function, inputs = trained(op, sample.args)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@each(TRAINED)
def test_gradients_are_those_of_the_reference(op: Op, sample: OpSample) -> None:
    function, inputs = trained(op, sample.args)
    weights = torch.randn_like(function(*inputs))
    found = torch.autograd.grad((function(*inputs) * weights).sum(), inputs)
    expected = torch.autograd.grad(
        (op.reference(*_with(op, sample, inputs)) * weights).sum(), inputs
    )
    for a, b in zip(expected, found, strict=True):
        assert difference(a, b).relative <= 1e3 * torch.finfo(torch.float64).eps


def _with(op: Op, sample: OpSample, inputs: tuple[Tensor, ...]) -> list[Any]:
    full = list(widened(sample.args))
    for place, value in zip([0] if len(inputs) == 1 else [0, 3], inputs, strict=True):
        full[place] = value
    return full


def test_a_bias_gets_its_gradient_from_a_single_row() -> None:
    sample = next(s for _, s in TRAINED if s.label == "4 bits, groups of 32, bias")
    args = list(widened(sample.args))
    args[0], args[3] = args[0][0], args[3].clone().requires_grad_()
    weights = torch.randn(args[3].shape, dtype=torch.float64)
    (found,) = torch.autograd.grad((quant_linear(*args) * weights).sum(), args[3])
    assert torch.equal(found, weights)


# ---- cost --------------------------------------------------------------------------------


@each(GOOD)
def test_cost_grows_with_the_input(op: Op, sample: OpSample) -> None:
    x, *rest = sample.args
    assert op.cost_rule is not None
    doubled = [torch.cat((rest[0], rest[0])), *rest[1:]] if op is code_linear else rest
    once, twice = op.cost_rule(x, *rest), op.cost_rule(torch.cat((x, x)), *doubled)
    assert twice.flops == 2 * once.flops
    assert twice.written == 2 * once.written
    more = twice.read - once.read
    # moe_ffn: more tokens, more experts; code_linear: a step for every token
    assert more == x.nbytes or (op in (moe_ffn, code_linear) and more > x.nbytes)
    assert once.written == sum(result.nbytes for result in results(op, *sample.args))
    assert once.read >= x.nbytes
    assert min(once.flops, once.read, once.written) >= 0


@each(GOOD)
def test_cost_of_a_node_is_the_cost_of_its_call(op: Op, sample: OpSample) -> None:
    assert op.cost_rule is not None
    expected = op.cost_rule(*sample.args)
    program = program_of(op, sample)
    (call,) = (n for n in program.graph.nodes if find_op(n.target) is op)
    assert node_cost(call) == expected
    assert program_cost(program) == expected


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_cost_of_a_packed_layer(bits: int) -> None:
    """Codes are read as they lie: bits / 8 bytes a weight, and one step a row."""
    x, out = torch.empty(5, 64, device="meta"), 10
    codes = torch.empty(out, 8 * bits, dtype=torch.uint8, device="meta")
    step = torch.empty(out, 1, device="meta")
    assert quant_linear.cost_rule is not None
    assert quant_linear.cost_rule(x, codes, step, None, bits, 0) == Cost(
        flops=2 * 5 * 64 * 10, read=4 * 5 * 64 + out * 8 * bits + 4 * out, written=4 * 5 * out
    )


# ---- what the two ops mean, computed another way ------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 8, 128])
def test_hadamard_is_orthonormal_and_its_own_inverse(block: int) -> None:
    matrix = hadamard_matrix(block)
    eps = torch.finfo(torch.float64).eps
    assert (
        float((matrix @ matrix - torch.eye(block, dtype=torch.float64)).abs().max()) <= block * eps
    )
    assert torch.equal(matrix, matrix.t())
    signs = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    assert torch.equal(matrix.sign(), torch.tensor(signs, dtype=torch.float64))


@pytest.mark.parametrize(
    ("size", "block"),
    [(1, 1), (3, 1), (12, 4), (48, 16), (64, 64), (128, 128), (384, 128), (4096, 128)],
)
def test_the_largest_block(size: int, block: int) -> None:
    assert largest_block(size) == block


def test_blocks_are_transformed_on_their_own() -> None:
    x = torch.randn(2, 96, dtype=torch.float64)
    found = hadamard(x, 32)
    for i in range(3):
        part = slice(32 * i, 32 * i + 32)
        expected = x[:, part] @ hadamard_matrix(32)
        assert difference(expected, found[:, part]).relative <= 32 * torch.finfo(x.dtype).eps


def test_codes_mean_levels_by_hand() -> None:
    """Two bits: levels -1.5, -0.5, 0.5, 1.5 times the step of their group."""
    codes = torch.tensor([[0b11100100, 0b00000001]], dtype=torch.uint8)  # 0 1 2 3 | 1
    step = torch.tensor([[2.0, 10.0, 100.0]])
    found = dequantize(codes, step, 2, 2, 5)
    assert found.tolist() == [[-3.0, -1.0, 5.0, 15.0, -50.0]]
    assert dequantize(codes, step[:, :1], 2, 0, 5).tolist() == [[-3.0, -1.0, 1.0, 3.0, -1.0]]
    assert (group_count(5, 2), group_count(4, 2), group_count(5, 0)) == (3, 2, 1)
    x = torch.tensor([[1.0, 0.0, 2.0, 0.0, 1.0]])
    bias = torch.tensor([7.0])
    assert quant_linear(x, codes, step, bias, 2, 2).tolist() == [[-3.0 + 10.0 - 50.0 + 7.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x, codes, step, *_ = next(s for _, s in GOOD if s.label == "4 bits, per channel").args
    assert quant_linear(x.to(dtype), codes, step, None, 4, 0).dtype == dtype
    assert hadamard(x.to(dtype), 64).dtype == dtype


# ---- ONNX --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"accuracy_level": 0}, {"portable": True}], ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_onnxruntime_agrees(op: Op, options: dict[str, Any], tmp_path: Path) -> None:
    """All samples in one model; the bar is the artefact's own."""
    onnx = pytest.importorskip("resplice.backends.onnx")
    samples = [sample for o, sample in GOOD if o is op]
    program = program_of(op, *samples)
    artifact = onnx.OnnxBackend().lower(program, tmp_path / "ops.onnx", onnx.OnnxOptions(**options))
    assert artifact.bar <= onnx.backend.EXACT_BAR, "no error is allowed for without int8"
    inputs = {f"inputs_{i}": sample.args[0] for i, sample in enumerate(samples)}
    found = artifact.run(inputs)
    cases = [(sample, result) for sample in samples for result in results(op, *sample.args)]
    names = ["output"] if len(cases) == 1 else [f"output_{i}" for i in range(len(cases))]
    for name, (sample, expected) in zip(names, cases, strict=True):
        measured = difference(expected, found[name])
        assert measured.finite, sample.label
        assert measured.relative <= artifact.bar, sample.label


def test_onnxruntime_agrees_at_other_sizes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("resplice.backends.onnx")
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)).eval()
    program = capture(model, (torch.randn(4, 64),), dynamic_shapes={"input": {0: "rows"}})
    program, _ = Pipeline.of("quest{head=true}").run(program)
    artifact = onnx.OnnxBackend().lower(
        program, tmp_path / "m.onnx", onnx.OnnxOptions(accuracy_level=0)
    )
    x = torch.randn(9, 64)
    (found,) = artifact.run({"input": x}).values()
    assert difference(program(x), found).relative <= artifact.bar
