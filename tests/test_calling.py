"""The calling convention: the caller's arguments in, the caller's output type out."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from resplice.calling import CallSpec, Leaf, describe, describe_call, rebuild
from resplice.capture import Sample, capture
from resplice.errors import CaptureError, InputError, UsageError
from resplice.program import Program

A, B, C = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)


class Pair(NamedTuple):
    """A named tuple of tensors."""

    low: Any
    high: Any


@dataclass
class Record:
    """A dataclass of tensors."""

    value: Any
    extra: Any = None


@dataclass(frozen=True)
class Frozen:
    """A frozen dataclass."""

    value: Any


def spec_of(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any = "*"
) -> CallSpec:
    """The calling convention of a sample call."""
    parameters, leaves, _ = describe_call(forward, args, kwargs)
    return CallSpec(parameters, leaves, outputs)


def forward(x: Any, mask: Any = None, *, flag: bool = True, past: Any = None) -> Any:
    """A signature with everything."""


SIMPLE = spec_of(forward, (A,), {"mask": B, "flag": False})


def same(left: Any, right: Any) -> bool:
    """Whether two structures have equal types and the same tensors."""
    if isinstance(left, Tensor):
        return left is right
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, tuple | list | deque):
        return len(left) == len(right) and all(map(same, left, right))
    if hasattr(left, "__dataclass_fields__"):
        return same(vars(left), vars(right))
    return bool(left == right)


# ---- inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((A, B), {"flag": False}),
        ((A,), {"mask": B, "flag": False}),
        ((), {"mask": B, "x": A, "flag": False}),
        ((A, B), {}),
        ((A, B), {"flag": False, "past": None}),
    ],
    ids=["positional", "mixed", "keywords", "constant left out", "None added"],
)
def test_a_call_may_be_spelled_in_any_way(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    bound = SIMPLE.bind(args, kwargs)
    assert list(bound) == ["x", "mask"]
    assert bound["x"] is A
    assert bound["mask"] is B


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((A,), {}, "input mask is missing"),
        ((), {"mask": B}, "input x is missing"),
        ((A, None), {}, "input mask is missing"),
        ((A, 3), {}, "input mask is a int, not a tensor"),
        ((A, [B]), {}, "input mask is missing"),
        ((A, B), {"flag": True}, "flag=True, but it was captured as False"),
        ((A, B), {"past": C}, "the captured call had no input past"),
        ((A, B), {"zzz": 1}, "the captured call had no input zzz"),
        ((A, B), {"mask": B}, "input mask is given twice"),
        ((A, B), {"mask": None}, "input mask is given twice"),
        ((A, B, C), {}, "3 positional inputs, at most 2 are known"),
        ((A, {"k": B}), {}, "input mask is missing"),
    ],
)
def test_other_calls_are_refused(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        SIMPLE.bind(args, kwargs)


def test_what_was_none_must_stay_none() -> None:
    spec = spec_of(forward, (A,), {"mask": None})
    assert list(spec.bind((A,), {})) == ["x"]
    assert list(spec.bind((A, None), {})) == ["x"]
    with pytest.raises(InputError, match="mask=a tensor, but it was captured as None"):
        spec.bind((A, B), {})


@pytest.mark.parametrize("value", [1, 1.5, "mean", True, torch.float16, torch.device("cpu")])
def test_constants_must_not_change(value: Any) -> None:
    spec = spec_of(lambda x, how: None, (A, value), {})
    spec.bind((A, value), {})
    for other in (2, "sum", torch.float32, A):
        with pytest.raises(InputError, match="but it was captured as"):
            spec.bind((A, other), {})


def test_nested_inputs_are_named_by_path() -> None:
    past = ({"key": A, "value": B}, [C, None, 2])
    parameters, leaves, tensors = describe_call(forward, (A,), {"past": past})
    assert parameters == ("x", "mask")
    assert list(tensors) == ["x", "past_0_key", "past_0_value", "past_1_0"]
    assert [leaf.path for leaf in leaves] == [
        "x", "past[0]['key']", "past[0]['value']", "past[1][0]", "past[1][1]", "past[1][2]",
    ]  # fmt: skip
    spec = CallSpec(parameters, leaves, "*")
    assert spec.tensor_names == ("x", "past_0_key", "past_0_value", "past_1_0")
    bound = spec.bind((A,), {"past": past})
    assert [bound[name] is value for name, value in tensors.items()] == [True] * 4


@pytest.mark.parametrize(
    ("past", "message"),
    [
        (({"key": A}, [C, None, 2]), r"input past\[0\]\['value'\] is missing"),
        (({"key": A, "value": B}, [C, None, 3]), r"past\[1\]\[2\]=3, but it was captured as 2"),
        (({"key": A, "value": B}, [C, A, 2]), r"past\[1\]\[1\]=a tensor, but"),
        (({"key": A, "value": B}, [C, None, 2, B]), r"had no input past\[1\]\[3\]"),
        (({"key": A, "value": B, "z": C}, [C, None, 2]), r"had no input past\[0\]\['z'\]"),
        (None, r"input past\[0\]\['key'\] is missing"),
    ],
)
def test_nested_inputs_must_keep_their_structure(past: Any, message: str) -> None:
    spec = spec_of(forward, (A,), {"past": ({"key": A, "value": B}, [C, None, 2])})
    with pytest.raises(InputError, match=message):
        spec.bind((A,), {"past": past})


def test_names_of_inputs_are_unique() -> None:
    _, _, tensors = describe_call(lambda **kw: None, (), {"a": [A], "a_0": B, "a__0": C})
    assert list(tensors) == ["a_0", "a_0_1", "a__0"]
    assert [value is given for value, given in zip(tensors.values(), (A, B, C), strict=True)]


def test_variable_arguments_are_numbered() -> None:
    parameters, _, tensors = describe_call(lambda x, *rest, k=None: None, (A, B, C), {})
    assert parameters == ("x", "rest_0", "rest_1")
    assert list(tensors) == ["x", "rest_0", "rest_1"]


def test_added_inputs_are_given_by_keyword() -> None:
    spec = CallSpec(SIMPLE.parameters, SIMPLE.leaves, "*", extra=("grid",))
    assert spec.tensor_names == ("x", "mask", "grid")
    assert spec.bind((A, B), {"grid": C})["grid"] is C
    with pytest.raises(InputError, match="input grid is missing"):
        spec.bind((A, B), {})
    with pytest.raises(InputError, match="grid is a float, not a tensor"):
        spec.bind((A, B), {"grid": 1.0})


# ---- outputs -----------------------------------------------------------------------------

STRUCTURES: list[Any] = [
    A,
    (A,),
    (A, B),
    [A, [B], (C,)],
    {"a": A, "b": {"c": B}},
    OrderedDict(b=A, a=B),
    {0: A, 2: B},
    (A, None, B),
    {"a": A, "note": "text", "count": 3, "ratio": 0.5, "on": True, "none": None},
    (),
    [],
    {},
    Pair(A, B),
    Pair(A, None),
    Record(A),
    Record((A, B), {"c": C}),
    Frozen([A]),
    deque([A, B]),
    torch.Size([2, 3]),
    torch.max(A, 0),
    [Pair(Record(A), (B, None)), {"x": Frozen(C)}],
]


@pytest.mark.parametrize("value", STRUCTURES, ids=lambda value: type(value).__name__)
def test_output_structures_are_rebuilt(value: Any) -> None:
    structure, tensors = describe(value)
    assert same(rebuild(json.loads(json.dumps(structure)), iter(tensors)), value)


def test_default_dicts_keep_their_items() -> None:
    value = defaultdict(list, a=A)
    structure, tensors = describe(value)
    assert dict(rebuild(structure, iter(tensors))) == {"a": A}


def test_model_outputs_keep_their_class_and_missing_fields() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.CausalLMOutputWithPast(logits=A, hidden_states=(B, C))
    structure, tensors = describe(value)
    assert [tensor is known for tensor, known in zip(tensors, (A, B, C), strict=True)] == [True] * 3
    back = rebuild(json.loads(json.dumps(structure)), iter(tensors))
    assert type(back) is outputs.CausalLMOutputWithPast
    assert back.logits is A
    assert back.loss is None
    assert back.hidden_states[1] is C
    assert list(back.keys()) == list(value.keys())


def test_other_objects_are_refused() -> None:
    class Opaque:
        pass

    with pytest.raises(InputError, match="the model returned a Opaque, which holds tensors"):
        describe((A, Opaque()))
    with pytest.raises(InputError, match="set"):
        describe({A})


class Trap:
    """Making one has an effect."""

    made = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        Trap.made += 1


@pytest.mark.parametrize("names", [None, ["a"]])
@pytest.mark.parametrize("kind", [f"{__name__}:Trap", "subprocess:Popen", "builtins:eval"])
def test_a_structure_from_a_file_makes_containers_only(kind: str, names: list[str] | None) -> None:
    structure = {"type": kind, "names": names, "items": [{"constant": "true"}]}
    assert rebuild(structure, iter(())) == {(names or ["0"])[0]: "true"}
    assert Trap.made == 0


@pytest.mark.parametrize("kind", ["no_such_module:Output", f"{__name__}:NoSuchClass", "json:loads"])
def test_a_class_that_is_not_imported_comes_back_as_a_dict(kind: str) -> None:
    named = {"type": kind, "names": ["a", "b"], "items": ["*", {"constant": None}]}
    assert rebuild(named, iter([A])) == {"a": A, "b": None}
    bare = {"type": kind, "names": None, "items": ["*"]}
    assert rebuild(bare, iter([A])) == {"0": A}


def test_a_class_with_other_fields_by_now_comes_back_as_a_dict() -> None:
    structure = {"type": f"{__name__}:Record", "names": ["value", "gone"], "items": ["*", "*"]}
    assert rebuild(structure, iter([A, B])) == {"value": A, "gone": B}


# ---- saved and run -----------------------------------------------------------------------


def test_a_spec_reads_back_from_json() -> None:
    outputs, _ = describe({"out": Pair(A, None), "list": [B]})
    leaves = (
        *SIMPLE.leaves,
        Leaf("n", constant=3),
        Leaf("s", constant="x"),
        Leaf("f", constant=0.5),
    )
    spec = CallSpec(SIMPLE.parameters, leaves, outputs, extra=("grid",))
    back = CallSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert back == spec


def test_constants_json_can_not_hold_still_must_not_change() -> None:
    spec = spec_of(lambda x, dtype: None, (A, torch.float16), {})
    back = CallSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert list(back.bind((A, torch.float16), {})) == ["x"]
    with pytest.raises(InputError, match=r"dtype=torch\.float32, but it was captured as"):
        back.bind((A, torch.float32), {})


class Structured(nn.Module):
    """Nested inputs, constants and a named tuple out."""

    def forward(
        self, x: Tensor, past: list[dict[str, Tensor]], scale: float = 1.0, mask: Any = None
    ) -> Any:
        """Uses everything."""
        low = x * scale + past[0]["key"]
        return Pair(low if mask is None else low * mask, {"none": None, "high": [past[1]["key"]]})


def structured() -> Program:
    """The program of that module."""
    return capture(Structured(), Sample((A, [{"key": B}, {"key": C}]), {"scale": 2.0}))


def test_a_program_is_called_like_its_module() -> None:
    args: tuple[Any, ...] = (B, [{"key": C}, {"key": A}])
    program = structured()
    expected, found = Structured()(*args, scale=2.0), program(*args, scale=2.0)
    assert isinstance(found, Pair)
    assert torch.equal(found.low, expected.low)
    assert found.high["none"] is None
    assert torch.equal(found.high["high"][0], A)
    assert torch.equal(program(x=args[0], past=args[1]).low, expected.low)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((A, [{"key": B}]), {}, r"input past\[1\]\['key'\] is missing"),
        ((A, [{"key": B}, {"key": C}], 3.0), {}, r"scale=3\.0, but it was captured as 2\.0"),
        ((A, [{"key": B}, {"key": C}]), {"mask": A}, r"the captured call had no input mask"),
        ((A.double(), [{"key": B}, {"key": C}]), {}, "input x has dtype f64"),
        ((A[:1], [{"key": B}, {"key": C}]), {}, "input x has size 1 on axis 0, expected 2"),
        ((A[0], [{"key": B}, {"key": C}]), {}, "input x has 1 axes, expected 2"),
    ],
)
def test_a_program_refuses_other_calls(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        structured()(*args, **kwargs)


def test_objects_that_may_hide_tensors_are_refused_at_capture() -> None:
    class Box:
        pass

    with pytest.raises(CaptureError, match="input past is a Box, which may hide tensors"):
        capture(Structured(), (A, Box()))


@pytest.mark.parametrize("sample", [3, "x", None, {1, 2}])
def test_samples_of_another_form_are_refused(sample: object) -> None:
    with pytest.raises(UsageError, match="sample inputs are a "):
        capture(Structured(), sample)


def test_the_forms_of_a_sample() -> None:
    assert Sample.of(A).args == (A,)
    assert Sample.of((A, B)) == Sample((A, B), {})
    assert Sample.of([A, B]).args == (A, B)
    assert Sample.of({"x": A}) == Sample((), {"x": A})
    whole = Sample((A,), {"k": B})
    assert Sample.of(whole) is whole
