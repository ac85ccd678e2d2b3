"""The Python face: `optimize(model, passes=...)` and what it returns."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from resplice import registry, weights
from resplice.artifact import Artifact
from resplice.capture import Sample, capture
from resplice.context import Batch, Context
from resplice.dims import DynamicShapes
from resplice.errors import UsageError
from resplice.pass_base import Pass
from resplice.pipeline import Pipeline
from resplice.program import Program
from resplice.report import Report
from resplice.saving import save
from resplice.show import show

Model = nn.Module | Program | str | Path


def optimize(
    model: Model,
    passes: str | Pass | Iterable[Pass | str] | None = None,
    *,
    example_inputs: object = None,
    dynamic_shapes: DynamicShapes | None = None,
    calibration: Iterable[object] = (),
    check: bool = True,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Optimized:
    """Capture a model, run passes over it, and check the result.

    Args:
        model: A module, a captured `Program`, or text: a `.pt2` file, `module:factory`,
            `hf:FOLDER_OR_GGUF`. A module is never changed.
        passes: Pipeline text such as "quest{weight-bits=4}", passes, or a mix; None only captures.
        example_inputs: Args (tuple), kwargs (dict) or `Sample`; needed for a module.
        dynamic_shapes: Input name -> {axis: "dim name"}.
        calibration: Sample inputs, in the form of `example_inputs`, for passes that profile.
        check: After every pass, run original and rewritten program on the example inputs, fill the
            error ledger, and hold the pass to what it declares.
        limit: Make at most this many rewrites (for debugging).
        progress: Called with (pass name, done, total).

    Returns:
        A module that is called like the original one.

    Raises:
        CaptureError: The model can't be captured.
        SpecError: The pipeline text is wrong.
        CompositionError: The passes may not run in this order on this model.
        NumericsError: A pass did more than it declares.
    """
    pipeline = Pipeline.of(passes)
    program = as_program(model, example_inputs, dynamic_shapes)
    context = Context(
        calibration=[as_batch(program, item) for item in calibration],
        limit=limit,
        progress=progress or (lambda *_: None),
    )
    rewritten, steps = pipeline.run(program, context, check=check)
    return Optimized(rewritten, Report.of(program, rewritten, steps))


def as_program(
    model: Model, example_inputs: object = None, dynamic_shapes: DynamicShapes | None = None
) -> Program:
    """Capture or load whatever `optimize` accepts."""
    if isinstance(model, Program):
        return model
    if isinstance(model, nn.Module):
        if example_inputs is None:
            raise UsageError("a module needs example_inputs", hint="example_inputs=(tensor, ...)")
        return capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    from resplice.sources import load_model  # only needed for text

    return load_model(str(model), example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)


def as_batch(program: Program, item: object) -> Batch:
    """One calibration item as flat named tensors, checked against the signature."""
    sample = Sample.of(item)
    batch = program.call.bind(sample.args, sample.kwargs or {})
    program.check_inputs(batch)
    return batch


class Optimized(nn.Module):
    """A rewritten model, called exactly like the original.

    Weights that no pass replaced share storage with the caller's model, so all parameters are
    frozen; `trainable()` gives this module its own copies to train.

    Attributes:
        program: The rewritten program.
        report: What was done, what it costs and how far it is from the original.
    """

    def __init__(self, program: Program, report: Report) -> None:
        """Wrap a program."""
        super().__init__()
        self.graph_module = program.module
        self.program, self.report = program, report
        self.training = program.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run like the original: same inputs, same output type.

        Raises:
            InputError: The inputs do not fit the captured signature.
        """
        return self.program(*args, **kwargs)

    def trainable(self, *patterns: str) -> Optimized:
        """Own and unfreeze the weights whose names match (all floating-point ones by default).

        Args:
            patterns: Shell-style patterns such as "*.lora_*".

        Raises:
            UsageError: A pattern matches nothing.
        """
        wanted = patterns or ("*",)
        for pattern in wanted:
            if not any(fnmatch.fnmatch(name, pattern) for name, _ in self.program.named_weights()):
                raise UsageError(f"no weight matches {pattern!r}")
        owned: dict[Any, nn.Parameter] = {}
        for name, value in list(self.program.named_weights()):
            chosen = any(fnmatch.fnmatch(name, pattern) for pattern in wanted)
            if chosen and isinstance(value, nn.Parameter) and value.is_floating_point():
                own = owned.setdefault(weights.key(value), nn.Parameter(value.detach().clone()))
                for _, function in self.program.all_functions():
                    if weights.has(function.module, name):
                        weights.put(function.module, name, own)
        return self

    def train(self, mode: bool = True) -> Optimized:
        """Keep the captured mode: dropout and batch norm are in the graph as captured.

        Raises:
            UsageError: The other mode is asked for.
        """
        if mode != self.program.training:
            captured = "train" if self.program.training else "eval"
            raise UsageError(
                f"this program was captured in {captured} mode, which is part of its graph",
                hint="capture model.train() or model.eval() as needed; gradients work in both",
            )
        return self

    def save(self, path: str | Path) -> Path:
        """Write a `.pt2` file that `resplice.load` and the CLI read back."""
        return save(self.program, path)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Lower, `to("onnx", "model.onnx", portable=True)`, or move like any module."""
        if args and args[0] in registry.BACKENDS:
            return self.lower(*args, **kwargs)
        return super().to(*args, **kwargs)

    def lower(
        self, backend: str, path: str | Path, *, check: bool = True, **options: Any
    ) -> Artifact:
        """Lower to a backend and, by default, check the artefact before it appears.

        Args:
            backend: "onnx", "coreml" or "triton".
            path: Where to write.
            check: Run and compare first.
            options: The backend's options, such as `portable=True`.

        Raises:
            LoweringError: The backend can't express the program.
            NumericsError: The artefact's results differ; nothing is written.
            BackendMissing: The backend's packages are not installed.
        """
        found = registry.backend(backend)
        try:
            chosen = found.options(**options)
        except TypeError as error:
            raise UsageError(f"{backend}: {error}") from error
        artifact: Artifact = found.lower(self.program, path, chosen, check=check)
        self.report.add_artifact(backend, artifact)
        return artifact

    def to_onnx(self, path: str | Path, *, check: bool = True, **options: Any) -> Artifact:
        """`lower("onnx", path)`; see `resplice.backends.onnx.OnnxOptions` for the options."""
        return self.lower("onnx", path, check=check, **options)

    def to_coreml(self, path: str | Path, *, check: bool = True, **options: Any) -> Artifact:
        """`lower("coreml", path)`; see `resplice.backends.coreml.CoremlOptions`."""
        return self.lower("coreml", path, check=check, **options)

    def to_triton(self, path: str | Path, *, check: bool = True, **options: Any) -> Artifact:
        """`lower("triton", folder)`; see `resplice.backends.triton.TritonOptions`."""
        return self.lower("triton", path, check=check, **options)

    def __str__(self) -> str:
        """The program as text."""
        return show(self.program)
