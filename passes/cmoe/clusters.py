"""Shared neurons and balanced clusters of the rest.

Source: CMoE, arXiv 2502.04416, expert construction: the most often marked neurons are always on;
the rest is assigned to experts of equal size, exactly, by a linear assignment problem.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from resplice.passes.cmoe.profile import Markers, all_reduced

_ROUNDS = 20


@dataclass(frozen=True)
class Groups:
    """A partition of all neurons.

    Attributes:
        shared: int64, always on, by descending rate.
        experts: One int64 vector per expert, ascending.
        cost: Sum of the distances to the centroids of the (last) assignment.
        seeds: The neuron that each cluster grew from, int64 [R].
    """

    shared: Tensor
    experts: tuple[Tensor, ...]
    cost: float
    seeds: Tensor


def sizes_of(neurons: int, experts: int, shared: int) -> tuple[int, list[int]]:
    """Number of shared neurons, and of each routed expert's.

    m = neurons // experts; what is left over joins the shared ones, or, where nothing is shared,
    the first clusters, one each. No neuron is lost.
    """
    size, rest = divmod(neurons, experts)
    routed = [size] * (experts - shared)
    if shared:
        return shared * size + rest, routed
    return 0, [size + (number < rest) for number in range(experts)]


def group_neurons(
    markers: Markers, experts: int, shared: int, *, euclidean: bool = False
) -> Groups:
    """Partition all neurons.

    Args:
        markers: What calibration says about them.
        experts: E.
        shared: S.
        euclidean: Distances and iterations as in the paper (L2, until nothing changes) instead
            of the published code's (L1, one assignment).
    """
    counts = markers.counts
    kept, sizes = sizes_of(len(counts), experts, shared)
    always = _most_marked(counts, torch.arange(len(counts)), kept, stable=euclidean)
    if not sizes:
        return Groups(always, (), 0.0, torch.empty(0, dtype=torch.int64))
    free = torch.ones(len(counts), dtype=torch.bool)
    free[always] = False
    rest = free.nonzero().flatten()
    seeds = _most_marked(counts, rest, len(sizes), stable=euclidean)
    labels = torch.full((len(counts),), -1, dtype=torch.int64)
    found = labels.clone()
    found[seeds] = torch.arange(len(sizes))
    divisors, cost = torch.ones(len(sizes), dtype=torch.int64), 0.0
    for _ in range(_ROUNDS if euclidean else 1):
        weights = markers.members(found, len(sizes))
        distances = _distances(markers, weights, divisors, euclidean)[rest]
        assigned, cost = assign(distances, sizes)
        before, found = found, labels.clone()
        found[rest] = assigned
        divisors = torch.tensor(sizes)
        if torch.equal(found, before):
            break
    members = tuple((found == number).nonzero().flatten() for number in range(len(sizes)))
    return Groups(always, members, cost, seeds)


def _most_marked(counts: Tensor, among: Tensor, number: int, *, stable: bool) -> Tensor:
    """The neurons with the highest counts, by descending count.

    Equal counts: the lower index, or (`stable` false) whichever `torch.topk` on a CPU takes, as
    the published code does; it is the same in every process.
    """
    values = counts[among]
    if stable:
        return among[torch.argsort(values, descending=True, stable=True)[:number]]
    return among[values.float().topk(number).indices]


def _distances(markers: Markers, weights: Tensor, divisors: Tensor, euclidean: bool) -> Tensor:
    """Distance of each neuron's column of markers to each centroid, float64 [f, R].

    A centroid is c = w / n with w[t] marked members of n. For a binary column a,
    |a - c| summed is sum(c) + sum(a) - 2 sum(a c), and (a - c)^2 is sum(a) - 2 sum(a c) + sum(c^2):
    integer sums, whatever the order of the tokens.
    """
    both, n = markers.together(weights).double(), divisors.double()
    sums = torch.stack((weights.sum(0), weights.square().sum(0)))
    once, squares = all_reduced(sums).double()
    own = markers.counts.double().unsqueeze(1)
    if euclidean:
        squared: Tensor = own - 2 * both / n + squares / n**2
        return squared.clamp_min(0).sqrt()
    absolute: Tensor = own + once / n - 2 * both / n
    return absolute


def representatives(
    markers: Markers, experts: tuple[Tensor, ...], count: int = 1, *, euclidean: bool = False
) -> Tensor:
    """The members nearest to each cluster's mean column; ties go to the lower index.

    Returns:
        int64 [R, count]; a cluster with fewer members repeats its first.
    """
    labels = torch.full((len(markers.counts),), -1, dtype=torch.int64)
    for number, members in enumerate(experts):
        labels[members] = number
    sizes = torch.tensor([max(1, len(members)) for members in experts])
    weights = markers.members(labels, len(experts))
    distances = _distances(markers, weights, sizes, euclidean)
    rows = []
    for number, members in enumerate(experts):
        near = members[torch.argsort(distances[members, number], stable=True)][:count]
        rows.append(torch.cat((near, near[:1].expand(count - len(near)))))
    return torch.stack(rows)


def assign(distances: Tensor, sizes: list[int]) -> tuple[Tensor, float]:
    """The cheapest assignment of n neurons to clusters of given sizes.

    Args:
        distances: [n, R], n = sum(sizes).
        sizes: Members of each cluster.

    Returns:
        Cluster of each neuron, int64 [n], and the total distance. Optima are rarely unique.
    """
    from scipy.optimize import linear_sum_assignment

    places = np.repeat(np.arange(len(sizes)), sizes)
    costs = distances.numpy()[:, places]
    rows, columns = linear_sum_assignment(costs)
    labels = np.empty(len(costs), dtype=np.int64)
    labels[rows] = places[columns]
    return torch.from_numpy(labels), float(costs[rows, columns].sum())
