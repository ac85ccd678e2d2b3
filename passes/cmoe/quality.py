"""How well a carved layer does on calibration tokens, for the report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resplice.compare import sqnr_db
from resplice.passes.cmoe.carving import Carving
from resplice.passes.cmoe.profile import chunks
from resplice.passes.cmoe.routers import expert_mass

MOST_TOKENS = 2048


def measure(carving: Carving, x: Tensor) -> dict[str, Any]:
    """Load, hit rate and loss of a carved layer.

    Args:
        carving: The layer.
        x: Calibration tokens [q, d]; at most 2,048 of them, evenly spread, are used.

    Returns:
        `load`: share of tokens that each expert gets; `hit_rate`: share of chosen experts that
        an oracle ranking by the sum of |h| would choose; `chance`: that of a random choice;
        `loss`: power of the error over that of the dense layer's result; `sqnr_db`: the same in
        dB; `static_loss`: the loss with no routed expert.
    """
    if len(x) == 0:  # another process has the tokens
        return {"loss": 0.0}
    few = x[:: max(1, -(-len(x) // MOST_TOKENS))]
    with torch.no_grad():
        dense, carved = carving.ffn(few), carving(few)
        result: dict[str, Any] = {"loss": _loss(dense, carved)}
        quality = sqnr_db(dense, carved)
        if quality < 1000:
            result["sqnr_db"] = quality
        if carving.router is None:
            return result
        result |= _routing(carving, few)
        kept = carving.shared
        part = carving.ffn.hidden(few, kept) @ carving.ffn.down[:, kept].T
        bias = carving.ffn.down_bias
        result["static_loss"] = _loss(dense, part if bias is None else part + bias)
    return result


def _routing(carving: Carving, x: Tensor) -> dict[str, Any]:
    count, width = len(carving.experts), carving.ffn.size
    mass = torch.cat([expert_mass(carving.ffn, part, carving.experts) for part in chunks(x, width)])
    oracle = mass.topk(carving.active, -1).indices
    chosen = carving.route(x)
    hit = (chosen[:, :, None] == oracle[:, None]).any(-1).double().mean()
    load = torch.bincount(chosen.flatten(), minlength=count).double() / len(x)
    return {
        "load": [round(share, 4) for share in load.tolist()],
        "hit_rate": float(hit),
        "chance": carving.active / count,
    }


def _loss(dense: Tensor, carved: Tensor) -> float:
    power = float(dense.double().square().sum())
    return float((dense - carved).double().square().sum()) / power if power else 0.0
