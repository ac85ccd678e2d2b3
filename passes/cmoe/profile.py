"""Which neurons a token marks: the K with the largest activation (ATopK), as counts.

Source: CMoE, arXiv 2502.04416, section on activation profiling. `profile="code"` follows the
published code (tokens and rows of length one), `profile="paper"` the text (plain activations).

Markers are kept as indices [q, K], never as a q x f matrix, and every statistic is an integer sum
over tokens. Sums over all processes of a `torch.distributed` group therefore give the very same
carve as one process with all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resplice.errors import OpError
from resplice.passes.cmoe.ffn import Ffn

PROFILES = ("code", "paper")
_VALUES_AT_ONCE = 1 << 23


def all_reduced(value: Tensor) -> Tensor:
    """The sum over all processes of the default group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.contiguous()
        dist.all_reduce(value)
    return value


def chunks(x: Tensor, width: int) -> list[Tensor]:
    """Tokens in parts whose activations of that width stay below 32 MiB in float32."""
    return list(x.split(max(1, _VALUES_AT_ONCE // width))) if len(x) else []


def mark(h: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest |h| of each token: [q, f] -> int64 [q, k]."""
    return h.abs().topk(k, -1).indices


@dataclass(frozen=True)
class Markers:
    """What calibration tokens say about an FFN's neurons.

    Attributes:
        indices: int32 [q, K], neurons marked by each token of this process.
        counts: int64 [f], how often each neuron was marked, over all processes.
        tokens: q over all processes.
    """

    indices: Tensor
    counts: Tensor
    tokens: int

    @property
    def rates(self) -> Tensor:
        """Share of tokens that mark each neuron, float64 [f]."""
        return self.counts.double() / max(1, self.tokens)

    def together(self, weights: Tensor) -> Tensor:
        """Sum over tokens of A[t, i] * weights[t, j].

        Args:
            weights: int64 [q, R].

        Returns:
            int64 [f, R], over all processes.
        """
        total = weights.new_zeros(len(self.counts), weights.shape[1])
        for k in range(self.indices.shape[1]):
            total.index_add_(0, self.indices[:, k].long(), weights)
        return all_reduced(total)

    def members(self, groups: Tensor, count: int) -> Tensor:
        """How many marked neurons of each token lie in each group.

        Args:
            groups: int64 [f], the group of a neuron, or -1.
            count: Number of groups R.

        Returns:
            int64 [q, R] of this process.
        """
        total = torch.zeros(len(self.indices), count + 1, dtype=torch.int64)
        where = groups[self.indices.long()]
        where = torch.where(where < 0, torch.full_like(where, count), where)
        total.scatter_add_(1, where, torch.ones_like(where))
        return total[:, :count]

    def matrix(self) -> Tensor:
        """The markers as uint8 [q, f], for tests and small cases."""
        full = torch.zeros(len(self.indices), len(self.counts), dtype=torch.uint8)
        return full.scatter_(1, self.indices.long(), 1)


def profile_markers(ffn: Ffn, x: Tensor, k_act: int, profile: str = "code") -> Markers:
    """Mark neurons on calibration tokens.

    Args:
        ffn: The dense layer.
        x: Its inputs [q, d].
        k_act: Markers per token K, below the number of neurons.
        profile: "code" or "paper".

    Raises:
        OpError: `k_act` or `profile` is out of range, or there are no tokens.
    """
    if profile not in PROFILES:
        raise OpError("carve", "profile", f"is {profile!r}, not one of {', '.join(PROFILES)}")
    if not 1 <= k_act < ffn.size:
        raise OpError(
            "carve", "k_act", f"is {k_act}; with {ffn.size} neurons it must be 1 to {ffn.size - 1}"
        )
    hidden = ffn.unit().hidden_of_directions if profile == "code" else ffn.hidden
    with torch.no_grad():
        marked = [mark(hidden(part), k_act).int() for part in chunks(x, ffn.size)]
    indices = torch.cat(marked) if marked else torch.empty(0, k_act, dtype=torch.int32)
    counts = torch.bincount(indices.flatten().long(), minlength=ffn.size)
    summed = all_reduced(torch.cat((counts, torch.tensor([len(indices)]))))
    tokens = int(summed[-1])
    if tokens == 0:
        raise OpError("carve", "x", "has no tokens to profile")
    return Markers(indices, summed[:-1], tokens)
