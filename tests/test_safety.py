"""Loading `.pt2` files: programs come back, and nothing a file holds is run on the way."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resplice import capture, load, save
from resplice.errors import CaptureError
from resplice.safety import check_archive

FLAG = "RESPLICE_TEST_PAYLOAD_RAN"


class Payload:
    """Unpickling one sets an environment variable: harmless, and seen."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _set_flag, ()


def _set_flag() -> dict[str, int]:
    os.environ[FLAG] = "1"
    return {}


@pytest.fixture(autouse=True)
def _nothing_ran() -> Any:
    """No test but those that allow pickles may set the flag."""
    os.environ.pop(FLAG, None)
    yield
    os.environ.pop(FLAG, None)


class Model(nn.Module):
    """Sizes, weights, constants and a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        """Sums of pairs of rows."""
        low = self.layer(x) + self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return low.reshape(-1, 8)[: x.shape[0] // 2].sum(-1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program saved by us."""
    torch.manual_seed(0)
    program = capture(
        Model().eval(), (torch.randn(6, 4),), dynamic_shapes={"x": {0: "2*pairs=2:64"}}
    )
    return save(program, tmp_path_factory.mktemp("saved") / "ours.pt2")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program saved by torch, with guards."""
    torch.manual_seed(0)
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    exported = torch.export.export(Model().eval(), (torch.randn(6, 4),), dynamic_shapes=shapes)
    assert exported._guards_code, "the check of guards needs some"
    path = tmp_path_factory.mktemp("foreign") / "theirs.pt2"
    torch.export.save(exported, path)
    return path


Edit = Callable[[dict[str, bytes]], None]


def tampered(source: Path, folder: Path, edit: Edit) -> Path:
    """A copy of an archive with its files edited; keys are paths inside its top folder."""
    with zipfile.ZipFile(source) as archive:
        top = archive.namelist()[0].partition("/")[0]
        files = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    edit(files)
    target = folder / "tampered.pt2"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(f"{top}/{name}", data)
    return target


def edited_json(name: str, edit: Callable[[Any], None]) -> Edit:
    """Edit one JSON file of an archive."""

    def apply(files: dict[str, bytes]) -> None:
        content = json.loads(files[name])
        edit(content)
        files[name] = json.dumps(content).encode()

    return apply


def edited_graph(edit: Callable[[Any], None]) -> Edit:
    """Edit the stored program."""
    return edited_json("models/model.json", edit)


def added(name: str, data: bytes) -> Edit:
    """Add or replace one file."""
    return lambda files: files.__setitem__(name, data)


def pickled() -> bytes:
    """A pickle that would run something."""
    return pickle.dumps(Payload())


def torch_pickled() -> bytes:
    """The same, in torch's own format."""
    buffer = io.BytesIO()
    torch.save((Payload(),), buffer)
    return buffer.getvalue()


def refused(source: Path, folder: Path, edit: Edit, message: str) -> CaptureError:
    """Loading a tampered copy is refused and runs nothing."""
    path = tampered(source, folder, edit)
    with pytest.raises(CaptureError, match=message) as caught:
        load(path)
    assert FLAG not in os.environ
    return caught.value


# ---- what loads --------------------------------------------------------------------------


def test_a_saved_program_loads(saved: Path) -> None:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(10, 4)
    assert torch.equal(load(saved)(x), model(x))


def test_a_program_saved_by_torch_loads(foreign: Path) -> None:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(6, 4)
    assert torch.equal(load(foreign)(x)[0], model(x))


def test_copying_an_archive_changes_nothing(saved: Path, tmp_path: Path) -> None:
    x = torch.randn(6, 4)
    copy = tampered(saved, tmp_path, lambda files: None)
    assert torch.equal(load(copy)(x), load(saved)(x))


def test_further_text_files_are_harmless(saved: Path, tmp_path: Path) -> None:
    check_archive(tampered(saved, tmp_path, added("extra/notes.py", b"import os")))


def test_a_program_without_sample_inputs_passes_the_check(foreign: Path, tmp_path: Path) -> None:
    check_archive(tampered(foreign, tmp_path, added("data/sample_inputs/model.pt", b"")))


# ---- what does not -----------------------------------------------------------------------


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    for content in (b"", b"not a zip", pickled()):
        path.write_bytes(content)
        with pytest.raises(CaptureError, match=r"is not a \.pt2 archive"):
            load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="there is no file"):
        load(tmp_path / "none.pt2")


def test_a_pickled_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.save({"weights": Payload()}, path)
    with pytest.raises(CaptureError, match="could run code when loaded"):
        load(path)
    assert FLAG not in os.environ


@pytest.mark.parametrize("payload", [pickled, torch_pickled], ids=["pickle", "torch"])
def test_pickled_sample_inputs_are_refused(
    saved: Path, tmp_path: Path, payload: Callable[[], bytes]
) -> None:
    error = refused(
        saved, tmp_path, added("data/sample_inputs/model.pt", payload()),
        "its sample inputs hold more than tensors",
    )  # fmt: skip
    assert error.where.endswith("/data/sample_inputs/model.pt")
    assert "--allow-pickle" in error.hint


def test_the_payload_would_have_run_without_the_check(saved: Path, tmp_path: Path) -> None:
    """Otherwise the tests above prove nothing."""
    path = tampered(saved, tmp_path, added("data/sample_inputs/model.pt", torch_pickled()))
    with pytest.raises(Exception):  # noqa: B017  # whatever torch makes of an empty sample
        _ = load(path, allow_pickle=True).samples["x"].shape
    assert os.environ.get(FLAG) == "1"


@pytest.mark.parametrize(
    "name",
    [
        "data/weights/model.pt",
        "data/constants/model.pt",
        "data/constants/custom_obj_0",
        "data/constants/opaque_obj_0",
        "data/aotinductor/model/model.so",
        "data/executorch/model.pte",
        "data/payload.pkl",
        "code/model.py",
        "serialized_exported_program.json",
        "serialized_state_dict.pt",
        "data.pkl",
    ],
)
def test_files_that_torch_would_unpickle_or_run_are_refused(
    saved: Path, tmp_path: Path, name: str
) -> None:
    error = refused(
        saved, tmp_path, added(name, torch_pickled()), "it holds pickled objects or code"
    )
    assert error.where.endswith(name)


def test_a_legacy_weight_file_would_have_been_unpickled(saved: Path, tmp_path: Path) -> None:
    path = tampered(saved, tmp_path, added("data/weights/model.pt", torch_pickled()))
    with pytest.raises(Exception):  # noqa: B017  # torch fails later
        load(path, allow_pickle=True)
    assert os.environ.get(FLAG) == "1"


@pytest.mark.parametrize("kind", ["weights", "constants"])
def test_pickled_weights_are_refused(saved: Path, tmp_path: Path, kind: str) -> None:
    entry = {"path_name": "weight_0" if kind == "weights" else "tensor_0", "use_pickle": True}
    edit = edited_json(
        f"data/{kind}/model_{kind}_config.json", lambda c: c["config"].update({"evil": entry})
    )
    refused(saved, tmp_path, edit, "evil is pickled")


@pytest.mark.parametrize("path_name", ["opaque_obj_0", "custom_obj_0", "../weight_0", "model.pt"])
def test_constants_that_are_no_tensors_are_refused(
    saved: Path, tmp_path: Path, path_name: str
) -> None:
    """torch unpickles these whatever `use_pickle` says."""
    entry = {"path_name": path_name, "use_pickle": False}
    edit = edited_json(
        "data/constants/model_constants_config.json", lambda c: c["config"].update({"evil": entry})
    )
    refused(saved, tmp_path, edit, "evil is no plain tensor")


def first_call(graph: Any) -> Any:
    """The first node of a stored graph."""
    return graph["graph_module"]["graph"]["nodes"][0]


@pytest.mark.parametrize(
    "target",
    [
        "torch.load", "torch.hub.load", "torch.os.system", "os.system", "builtins.eval",
        "torch.ops.load_library", "torch.ops.import_module", "torch.ops.__loader__.load",
        "_operator.call", "_operator.attrgetter", "_operator.methodcaller", "_operator.setitem",
        "torch.ops.aten.add.Tensor\n", "torch._C._load", "torch.utils.cpp_extension.load", "",
    ],
)  # fmt: skip
def test_targets_that_are_no_operators_are_refused(
    saved: Path, tmp_path: Path, target: str
) -> None:
    edit = edited_graph(lambda graph: first_call(graph).update(target=target))
    refused(saved, tmp_path, edit, re.escape(f"{target!r} is not an operator"))


def test_a_function_as_an_argument_is_refused(saved: Path, tmp_path: Path) -> None:
    argument = {"name": "f", "arg": {"as_operator": "torch.os.system"}, "kind": 1}
    edit = edited_graph(lambda graph: first_call(graph)["inputs"].append(argument))
    refused(saved, tmp_path, edit, r"'torch\.os\.system' is not an operator")


EVIL = f"__import__('os').environ.__setitem__('{FLAG}', '1')"


@pytest.mark.parametrize(
    "expression",
    [
        EVIL,
        f"Integer(3) if {EVIL} else 0",
        "().__class__.__base__.__subclasses__()",
        "Symbol.__init__",
        "Integer(3).evalf",
        "Integer(3).Symbol",
        "'s0'.floor",
        "eval('1')",
        "exec",
        "open('/etc/hostname')",
        "lambda: 0",
        "[x for x in (1,)]",
        "Symbol('s0');1",
        'Symbol("s0")',
        "\uff33ymbol('s0')",
        "getattr(Integer, 'x')",
        "S('1')",
        "0x10 @ 3",
    ],
)
def test_expressions_that_are_no_sizes_are_refused(
    saved: Path, tmp_path: Path, expression: str
) -> None:
    def edit(graph: Any) -> None:
        sizes = graph["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        (symbolic,) = [size for size in sizes if "as_expr" in size]
        symbolic["as_expr"]["expr_str"] = expression

    refused(saved, tmp_path, edited_graph(edit), "is not a size expression")


@pytest.mark.parametrize(
    "guard",
    [
        EVIL,
        f"L['x'].size()[0] >= 2 or {EVIL}",
        "L['x'].__class__",
        "L['x'].add_(1)",
        "L['x'].size(**{})",
        "print(1)",
        "(lambda: 1)()",
        "[L for L in (1,)]",
        "L['x'].size()[0] >= 2, 'm') or torch._assert(1",
        "L['x'].size()[0] >= 2\n",
        "L['x'].size()[0] >= 2 # comment",
        "L['a\\x22b'].size()[0] >= 2",
        "f'{L}'",
        "args[0].size()",
        "",
    ],
)
def test_guards_that_are_no_comparisons_are_refused(
    foreign: Path, tmp_path: Path, guard: str
) -> None:
    edit = edited_graph(lambda graph: graph["guards_code"].append(guard))
    refused(foreign, tmp_path, edit, "is not a guard on sizes")


@pytest.mark.parametrize(
    "context",
    [
        '[{"__enum__": true, "fqn": "antigravity:X", "name": "Y"}]',
        '{"default_factory_module": "antigravity", "default_factory_name": "x"}',
        '[{"\\u005f_enum__": true, "fqn": "antigravity:X"}]',
    ],
)
@pytest.mark.parametrize("spec", ["in_spec", "out_spec"])
def test_structures_that_import_modules_are_refused(
    foreign: Path, tmp_path: Path, context: str, spec: str
) -> None:
    leaf = {"type": None, "context": None, "children_spec": []}
    whole = {"type": "builtins.dict", "context": context, "children_spec": [leaf]}

    def edit(graph: Any) -> None:
        signature = graph["graph_module"]["module_call_graph"][0]["signature"]
        signature[spec] = json.dumps([1, whole])

    refused(foreign, tmp_path, edited_graph(edit), "a structure names a module to import")


@pytest.mark.parametrize("same", ["models/model.json", "MODELS/Model.JSON"])
def test_a_file_that_is_there_twice_is_refused(saved: Path, tmp_path: Path, same: str) -> None:
    """Two readers may disagree on which of the two counts."""
    path = tampered(saved, tmp_path, lambda files: None)
    with zipfile.ZipFile(path) as archive:
        top = archive.namelist()[0].partition("/")[0]
        original = archive.read(f"{top}/models/model.json")
    with zipfile.ZipFile(path, "a") as archive, pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        archive.writestr(f"{top}/{same}", original)
    with pytest.raises(CaptureError, match="it is there twice"):
        load(path)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff", b"3", b'{"config": 3}'])
@pytest.mark.parametrize("name", ["models/model.json", "data/weights/model_weights_config.json"])
def test_broken_files_are_refused_in_words(
    saved: Path, tmp_path: Path, name: str, text: bytes
) -> None:
    refused(saved, tmp_path, added(name, text), "tampered.pt2")


def test_what_is_not_a_program_is_refused_in_words(saved: Path, tmp_path: Path) -> None:
    for missing in ("models/model.json", "archive_version", "data/sample_inputs/model.pt"):
        refused(saved, tmp_path, lambda files, m=missing: files.pop(m), "tampered.pt2")  # type: ignore[misc]  # a lambda


def test_allow_pickle_skips_the_check(saved: Path, tmp_path: Path) -> None:
    path = tampered(saved, tmp_path, added("code/model.py", b"pass"))
    with pytest.raises(CaptureError, match="it holds pickled objects or code"):
        load(path)
    x = torch.randn(6, 4)
    assert torch.equal(load(path, allow_pickle=True)(x), load(saved)(x))
