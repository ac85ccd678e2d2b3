"""MODEL as text: `module:factory`, a saved `.pt2`, or `hf:FOLDER_OR_GGUF`.

A factory is called without arguments and returns `(model, args, kwargs)` or
`(model, args, kwargs, dynamic_shapes)`. Hugging Face models are read from local files only.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resplice.capture import Sample, capture
from resplice.dims import DynamicShapes
from resplice.errors import CaptureError, RespliceError, UsageError
from resplice.program import Program
from resplice.registry import require
from resplice.saving import load

_FORMS = "a .pt2 file, module:factory, or hf:FOLDER_OR_GGUF"


def load_model(
    text: str,
    *,
    example_inputs: object = None,
    dynamic_shapes: DynamicShapes | None = None,
    allow_pickle: bool = False,
) -> Program:
    """Load or capture the model that a text names.

    Args:
        text: See the module's docstring.
        example_inputs: Instead of the factory's or the default ones.
        dynamic_shapes: Instead of the factory's or the default ones.
        allow_pickle: For `.pt2` files that need unpickling; only for files you trust.

    Raises:
        UsageError: The text has none of the known forms, or the factory returns something else.
        CaptureError: The model can't be read or captured.
    """
    if text.endswith(".pt2"):
        return load(text, allow_pickle=allow_pickle)
    if text.startswith("hf:"):
        model, sample, shapes = hugging_face(Path(text.removeprefix("hf:")))
    elif ":" in text:
        model, sample, shapes = _from_factory(text)
    else:
        raise UsageError(f"{text!r} names no model", hint=f"give {_FORMS}")
    chosen = sample if example_inputs is None else Sample.of(example_inputs)
    return capture(model, chosen, dynamic_shapes=dynamic_shapes or shapes)


def _from_factory(text: str) -> tuple[nn.Module, Sample, DynamicShapes]:
    module, _, name = text.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # appended, so nothing installed is shadowed
    try:
        factory = importlib.import_module(module)
        for part in name.split("."):
            factory = getattr(factory, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{text!r} can't be imported: {error}", hint=f"give {_FORMS}") from error
    try:
        result = factory()  # type: ignore[operator]  # checked by calling it
    except RespliceError:
        raise
    except Exception as error:
        raise CaptureError(f"{text} raised {type(error).__name__}: {error}") from error
    if (
        not isinstance(result, tuple)
        or len(result) not in (3, 4)
        or not isinstance(result[0], nn.Module)
    ):
        raise UsageError(
            f"{text} returned {type(result).__name__}, not a model with inputs",
            hint="return (model, args, kwargs) or (model, args, kwargs, dynamic_shapes)",
        )
    shapes: Mapping[str, Any] = result[3] if len(result) == 4 else {}
    return result[0], Sample(tuple(result[1]), dict(result[2])), shapes


def hugging_face(path: Path) -> tuple[nn.Module, Sample, DynamicShapes]:
    """A transformers model from a folder (`config.json`, safetensors) or a GGUF file, in fp32.

    Raises:
        CaptureError: The path is missing or holds no model transformers knows.
        BackendMissing: transformers (or, for GGUF, gguf and accelerate) is not installed.
    """
    if not path.exists():
        raise CaptureError(f"there is no {path}", hint="hf: reads local files only")
    transformers = require("transformers")
    try:
        if path.suffix == ".gguf":
            model = _from_gguf(transformers, path)
        else:
            model = _from_folder(transformers, path)
    except (OSError, ValueError, KeyError) as error:
        raise CaptureError(f"transformers can't read {path}: {error}") from error
    return model.eval(), *_inputs(model)


def _from_gguf(transformers: Any, path: Path) -> nn.Module:
    require("gguf")
    require("accelerate")
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    )
    quantized.config.__dict__.pop("quantization_config", None)  # the weights are floats by now
    quantized.is_quantized = False
    return quantized  # type: ignore[no-any-return]  # transformers is untyped here


def _from_folder(transformers: Any, path: Path) -> nn.Module:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or [""])[0]
    cls = getattr(transformers, name, None) or transformers.AutoModel
    return cls.from_pretrained(  # type: ignore[no-any-return]  # transformers is untyped here
        path, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )


def _inputs(model: nn.Module) -> tuple[Sample, DynamicShapes]:
    """Default sample inputs by the model's main input: token ids or pixels."""
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    if getattr(model, "main_input_name", "") == "pixel_values":
        vision = getattr(config, "vision_config", config)
        shape = (2, vision.num_channels, vision.image_size, vision.image_size)
        pixels = torch.randn(shape, generator=generator)
        return Sample((), {"pixel_values": pixels}), {"pixel_values": {0: "batch"}}
    if "input_ids" not in parameters or getattr(config, "is_encoder_decoder", False):
        raise CaptureError(
            f"no default inputs are known for {type(model).__name__}",
            hint="write a factory that returns (model, args, kwargs, dynamic_shapes)",
        )
    longest = getattr(config, "max_position_embeddings", None) or 2048
    tokens = torch.randint(0, config.vocab_size, (2, min(16, longest)), generator=generator)
    kwargs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if "use_cache" in parameters:
        kwargs["use_cache"] = False
    shapes = {0: "batch", 1: f"seq=2:{longest}"}
    return Sample((), kwargs), {"input_ids": shapes, "attention_mask": shapes}
