"""The builder that op lowerings receive: our Builder plus any ONNX operator as a graph node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.onnx.ops import _dtype_mappings, _symbolic_impl

from resplice.backends.onnx.options import OnnxOptions
from resplice.build import Builder
from resplice.program import Program

_ONNX_DTYPES = {kind: int(code) for code, kind in _dtype_mappings.ONNX_DTYPE_TO_TORCH_DTYPE.items()}


class OnnxBuilder(Builder):
    """Inserts ATen nodes, constants, and ONNX operators.

    Attributes:
        options: The export's options.
        error: Relative error that operators inserted so far may add (for the declared bar).
        path: Which of several operators or precisions was chosen, for the artefact's notes.
    """

    def __init__(self, program: Program, before: fx.Node, options: OnnxOptions) -> None:
        """Build right before a node."""
        super().__init__(program, before)
        self.options, self.error, self.path = options, 0.0, ""

    def onnx(
        self,
        operator: str,
        inputs: Sequence[fx.Node | None],
        attributes: Mapping[str, Any],
        *,
        sizes: Sequence[Any],
        dtype: torch.dtype,
        version: int = 1,
    ) -> fx.Node:
        """Insert an ONNX operator with one result.

        Args:
            operator: `com.microsoft::MatMulNBits`, or `Name` for the standard domain.
            inputs: Input nodes; None where an optional one is left out.
            attributes: Attributes of the operator.
            sizes: The result's sizes: ints, or nodes from `size`.
            dtype: The result's dtype.
            version: Version of the operator's domain.
        """
        domain, _, name = operator.rpartition("::")
        encoded = _symbolic_impl.EncodedAttrs.from_dict(dict(attributes))
        return self(
            torch.ops.onnx_symbolic._symbolic.default,
            list(inputs),
            name,
            _ONNX_DTYPES[dtype],
            shape=list(sizes),
            attr_keys=encoded.attr_keys,
            attr_types=encoded.attr_types,
            attr_pos=[list(pair) for pair in encoded.attr_pos],
            attr_ints=encoded.attr_ints,
            attr_floats=encoded.attr_floats,
            attr_strs=encoded.attr_strs,
            metadata_props_keys=[],
            metadata_props_values=[],
            domain=domain,
            version=version,
        )
