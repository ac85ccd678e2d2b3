"""`carve` as a function: vectors, partitions, edge cases, routers, two processes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cmoe_worker
import numpy as np
import pytest
import torch
from cmoe_worker import BATCHES, carved_weights, weights
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from resplice.compare import difference
from resplice.errors import OpError
from resplice.kernels.moe_ffn import moe_ffn
from resplice.kernels.moe_routing import ACTIVATIONS
from resplice.passes.cmoe import Carving, carve
from resplice.passes.cmoe.carving import assemble
from resplice.passes.cmoe.clusters import Groups, assign, representatives, sizes_of
from resplice.passes.cmoe.ffn import Ffn
from resplice.passes.cmoe.profile import profile_markers
from resplice.passes.cmoe.routers import expert_mass, neuron_router

DATA = Path(__file__).parent / "data"
VECTORS = sorted(DATA.glob("cmoe_*.npz"))
BAR = 1e-5


def dense(gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """SwiGLU, written again, in float64."""
    gate, up, down, x = (t.double() for t in (gate, up, down, x))
    return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


# ---- the vectors -------------------------------------------------------------------------


class Vector:
    """One file of vectors and what it was made with."""

    def __init__(self, path: Path) -> None:
        raw = np.load(path)
        self.meta: dict[str, Any] = eval(str(raw["meta"]))  # a dict of numbers and one string
        self.data = {k: torch.from_numpy(np.asarray(raw[k])) for k in raw.files if k != "meta"}
        self.x = self["X"].reshape(-1, self["X"].shape[-1])
        self.ffn = Ffn(self["Wg"], self["Wu"], self["Wd"])

    def __getitem__(self, name: str) -> Tensor:
        return self.data[name]

    def carve(self) -> Carving:
        """Carve as the vectors were carved."""
        return carve(
            self["Wg"], self["Wu"], self["Wd"], self["X"], experts=self.meta["E"],
            shared=self.meta["S"], active=self.meta["A"], k_act=self.meta["K"],
        )  # fmt: skip

    def groups(self) -> Groups:
        """The partition of the vectors; optimal assignments are not unique."""
        rows = [row[row >= 0] for row in self["groups"]]
        return Groups(rows[0], tuple(rows[1:]), 0.0, self["centroid_seeds"])

    def given(self) -> Carving:
        """Our layer with the vectors' partition and representatives."""
        markers = profile_markers(self.ffn, self.x, self.meta["K"])
        router = neuron_router(self.ffn, self["reps"][:, None], "code")
        return assemble(self.ffn, markers, self.groups(), router, self.meta["A"])


@pytest.fixture(params=VECTORS, ids=lambda path: path.stem)
def vector(request: pytest.FixtureRequest) -> Vector:
    return Vector(request.param)


def near(expected: Tensor, found: Tensor) -> None:
    """Within 1e-5 of the largest value."""
    assert difference(expected.reshape(found.shape), found).relative <= BAR


def test_there_are_vectors() -> None:
    assert len(VECTORS) == 2


def test_profiles_and_markers_are_the_vectors(vector: Vector) -> None:
    near(vector["h_norm"], vector.ffn.unit().hidden_of_directions(vector.x))
    markers = profile_markers(vector.ffn, vector.x, vector.meta["K"])
    assert torch.equal(markers.matrix(), vector["markers"])
    assert torch.equal(markers.counts, vector["counts"].long())
    assert markers.counts.dtype == torch.int64
    torch.testing.assert_close(markers.rates, vector["rates"].double(), rtol=1e-6, atol=0)


def test_the_assignment_costs_as_much_as_in_the_vectors(vector: Vector) -> None:
    found = vector.carve()
    assert found.assignment_cost == float(vector["assign_cost"])
    expected = vector.groups()
    assert torch.equal(found.shared.sort().values, expected.shared.sort().values)
    assert torch.equal(found.groups.seeds, vector["centroid_seeds"])
    assert [len(e) for e in found.experts] == [len(e) for e in expected.experts]
    # the partition's cost, counted by hand from the markers
    columns = vector["markers"].double()
    cost = sum(
        float((columns[:, members] - columns[:, [seed]]).abs().sum())
        for seed, members in zip(found.groups.seeds.tolist(), found.experts, strict=True)
    )
    assert cost == found.assignment_cost


def test_representatives_and_router_are_the_vectors(vector: Vector) -> None:
    markers = profile_markers(vector.ffn, vector.x, vector.meta["K"])
    chosen = representatives(markers, vector.groups().experts)
    assert torch.equal(chosen[:, 0], vector["reps"])
    given = vector.given()
    assert given.router_gate is not None
    assert given.router_up is not None
    near(vector["router_gate"], given.router_gate)
    near(vector["router_up"], given.router_up)


def test_routes_and_outputs_are_the_vectors(vector: Vector) -> None:
    given = vector.given()
    chosen = given.route(vector.x).sort(-1).values
    assert torch.equal(chosen, vector["route_idx"].sort(-1).values)
    near(vector["moe_out"], given(vector["X"]))
    near(vector["dense"], vector.ffn(vector["X"]))
    every = assemble(vector.ffn, given.markers, given.groups, None, len(given.experts))
    near(vector["moe_full"], every(vector["X"]))


def test_trained_gates_are_the_vectors(vector: Vector) -> None:
    given = vector.given()
    arguments = {**given.arguments(), "gate_scale": vector["u"]}
    near(vector["moe_out_u"], moe_ffn(vector["X"], *arguments.values()))


# ---- the whole is the dense layer --------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "shared", "f"),
    [(8, 3, 64), (8, 0, 64), (1, 0, 64), (1, 1, 64), (8, 8, 64), (8, 2, 100), (8, 0, 101),
     (7, 1, 30), (16, 0, 17)],
)  # fmt: skip
def test_every_expert_active_is_the_dense_layer(experts: int, shared: int, f: int) -> None:
    gate, up, down, x = weights(f=f)
    found = carve(
        gate, up, down, x, experts=experts, shared=shared, active=experts - shared, k_act=5
    )
    y = torch.randn(3, 7, 16)
    assert difference(dense(gate, up, down, y), found(y)).relative <= BAR


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_kind_of_layer_is_whole(activation: str, gated: bool) -> None:
    gate, up, down, x = weights()
    b1, b2, b3 = torch.randn(64), torch.randn(64), torch.randn(16)
    found = carve(
        gate if gated else None, up, down, x, experts=8, shared=2, active=6, k_act=5,
        activation=activation, gate_bias=b1 if gated else None, up_bias=b2, down_bias=b3,
    )  # fmt: skip
    y = torch.randn(5, 16)
    act = ACTIVATIONS[activation]
    h = act(y @ gate.T + b1) * (y @ up.T + b2) if gated else act(y @ up.T + b2)
    assert difference(h @ down.T + b3, found(y)).relative <= BAR


@pytest.mark.parametrize("profile", ["code", "paper"])
@pytest.mark.parametrize(
    ("experts", "shared", "f"), [(8, 3, 64), (8, 0, 67), (8, 2, 67), (5, 0, 64), (3, 1, 10)]
)
def test_neurons_are_partitioned(experts: int, shared: int, f: int, profile: str) -> None:
    gate, up, down, x = weights(f=f)
    found = carve(
        gate, up, down, x, experts=experts, shared=shared, active=1, k_act=4, profile=profile
    )
    everyone = torch.cat((found.shared, *found.experts)).sort().values
    assert torch.equal(everyone, torch.arange(f))
    size, rest = divmod(f, experts)
    if shared:
        assert len(found.shared) == shared * size + rest
        assert {len(e) for e in found.experts} == {size}
    else:
        wanted = [size + 1] * rest + [size] * (experts - rest)
        assert [len(e) for e in found.experts] == wanted
    rates = found.rates[found.shared]
    assert bool((rates[:-1] >= rates[1:]).all())


def test_static_pruning_keeps_the_shared_neurons() -> None:
    gate, up, down, x = weights()
    found = carve(gate, up, down, x, experts=8, shared=6, active=0, k_act=5)
    kept = found.shared
    assert len(kept) == 48
    expected = dense(gate[kept], up[kept], down[:, kept], x)
    assert difference(expected, found(x)).relative <= BAR
    assert found.router is None


def test_only_chosen_experts_run() -> None:
    """By hand, token by token, in float64."""
    gate, up, down, x = weights()
    found = carve(gate, up, down, x, experts=8, shared=2, active=2, k_act=5)
    chosen = found.route(x)
    for t, row in enumerate(chosen):
        on = torch.cat((found.shared, *(found.experts[e] for e in row.tolist())))
        expected = dense(gate[on], up[on], down[:, on], x[t : t + 1])
        assert difference(expected, found(x[t : t + 1])).relative <= BAR
        assert len(set(row.tolist())) == 2


def test_duplicated_neurons() -> None:
    gate, up, down, x = weights()
    gate, up = gate[:8].repeat(8, 1), up[:8].repeat(8, 1)
    found = carve(gate, up, down, x, experts=8, shared=2, active=6, k_act=5)
    assert difference(dense(gate, up, down, x), found(x)).relative <= BAR
    again = carve(gate, up, down, x, experts=8, shared=2, active=2, k_act=5)
    other = carve(gate, up, down, x, experts=8, shared=2, active=2, k_act=5)
    assert torch.equal(again(x), other(x))


def test_clusters_from_neurons_that_no_token_marks() -> None:
    gate, up, down, x = weights(q=2)
    found = carve(gate, up, down, x, experts=8, shared=1, active=2, k_act=2)
    assert found.cold_seeds > 0
    assert carve(*weights(q=400), experts=8, shared=1, active=2, k_act=8).cold_seeds == 0
    everyone = torch.cat((found.shared, *found.experts)).sort().values
    assert torch.equal(everyone, torch.arange(64))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k_act": 64}, "it must be 1 to 63"),
        ({"k_act": 1000}, "it must be 1 to 63"),
        ({"k_act": 0}, "it must be 1 to 63"),
        ({"active": 6}, "must be 0 to 5"),
        ({"active": -1}, "must be 0 to 5"),
        ({"shared": 9}, "must be 0 to 8"),
        ({"experts": 0}, "at least 1"),
        ({"experts": 65, "shared": 0}, "there are 64 neurons"),
        ({"shared": 0, "active": 0}, "nothing would be computed"),
        ({"router": "oracle"}, "not one of analytic"),
        ({"profile": "v1"}, "not one of code, paper"),
        ({"activation": "swish"}, "not one of"),
    ],
)
def test_what_carve_refuses(changes: dict[str, Any], words: str) -> None:
    settings = {"experts": 8, "shared": 3, "active": 3, "k_act": 5, **changes}
    with pytest.raises(OpError, match=words):
        carve(*weights(), **settings)


def test_matrices_that_do_not_fit_are_refused() -> None:
    gate, up, down, x = weights()
    settings = {"experts": 8, "shared": 3, "active": 3}
    with pytest.raises(OpError, match="up has shape"):
        carve(gate, up[1:], down, x, **settings)
    with pytest.raises(OpError, match="down has 64 columns, there are 63"):
        carve(gate[1:], up[1:], down, x, **settings)
    with pytest.raises(OpError, match="x has width 15"):
        carve(gate, up, down, x[:, 1:], **settings)
    with pytest.raises(OpError, match="no tokens"):
        carve(gate, up, down, x[:0], **settings)
    with pytest.raises(OpError, match="up is missing"):
        carve(None, None, down, x, **settings)


# ---- clusters ----------------------------------------------------------------------------


def test_the_assignment_is_optimal() -> None:
    """Against every assignment of a small case, and scipy on the expanded matrix of a larger."""
    distances = torch.rand(6, 3, dtype=torch.float64)
    labels, cost = assign(distances, [2, 2, 2])
    every = (
        sum(float(distances[i, j]) for i, j in enumerate(order))
        for order in set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    )
    assert cost == pytest.approx(min(every), abs=1e-12)
    assert torch.bincount(labels).tolist() == [2, 2, 2]
    large = torch.randint(0, 50, (60, 5)).double()
    _, cost = assign(large, [12] * 5)
    expanded = large.repeat_interleave(12, 1).numpy()
    assert cost == float(expanded[linear_sum_assignment(expanded)].sum())


@pytest.mark.parametrize("euclidean", [False, True])
def test_representatives_are_nearest_to_the_mean(euclidean: bool) -> None:
    gate, up, down, x = weights()
    markers = profile_markers(Ffn(gate, up, down), x, 6)
    experts = tuple(torch.randperm(64)[:40].reshape(5, 8).sort(-1).values)
    found = representatives(markers, experts, 3, euclidean=euclidean)
    columns = markers.matrix().double()
    for row, members in zip(found, experts, strict=True):
        gap = columns[:, members] - columns[:, members].mean(1, keepdim=True)
        distance = gap.square().sum(0).sqrt() if euclidean else gap.abs().sum(0)
        expected = distance.sort().values[:3]
        order = [members.tolist().index(i) for i in row.tolist()]
        torch.testing.assert_close(distance[order], expected)


def test_the_paper_variant_ends_where_nothing_changes() -> None:
    """Its last assignment is optimal for the mean columns of the clusters it returns."""
    gate, up, down, x = weights(q=300)
    found = carve(gate, up, down, x, experts=8, shared=2, active=2, k_act=6, profile="paper")
    columns = found.markers.matrix().double()
    rest = torch.cat(found.experts).sort().values
    means = torch.stack([columns[:, e].mean(1) for e in found.experts], 1)
    distances = torch.cdist(columns[:, rest].T, means.T)
    _, cost = assign(distances, [8] * 6)
    own = sum(float(distances[torch.isin(rest, e), j].sum()) for j, e in enumerate(found.experts))
    assert own == pytest.approx(cost, rel=1e-9)
    assert found.router is not None
    assert found.router.score == "signed"


def test_ties_go_to_the_lower_index_in_the_paper_variant() -> None:
    gate, up, down, x = weights(q=40)
    found = carve(gate, up, down, x, experts=8, shared=2, active=2, k_act=6, profile="paper")
    order = sorted(range(64), key=lambda i: (-int(found.markers.counts[i]), i))
    assert found.shared.tolist() == order[:16]
    assert found.groups.seeds.tolist() == order[16:22]


def test_sizes() -> None:
    assert sizes_of(100, 8, 3) == (3 * 12 + 4, [12] * 5)
    assert sizes_of(100, 8, 0) == (0, [13] * 4 + [12] * 4)
    assert sizes_of(64, 8, 8) == (64, [])


# ---- routers -----------------------------------------------------------------------------


def hits(found: Carving, x: Tensor) -> float:
    """Share of chosen experts that the L1 oracle would choose."""
    oracle = expert_mass(found.ffn, x, found.experts).topk(found.active, -1).indices
    chosen = found.route(x)
    return float((chosen[:, :, None] == oracle[:, None]).any(-1).float().mean())


def test_routers_against_the_oracle() -> None:
    """On clustered tokens a regression finds the busy experts; chance is A / R."""
    g = torch.Generator().manual_seed(1)
    gate, up, down, _ = weights(d=16, f=128)
    centres = 3 * torch.randn(12, 16, generator=g)

    def tokens(n: int) -> Tensor:
        pick = torch.randint(12, (n,), generator=g)
        return centres[pick] + torch.randn(n, 16, generator=g)

    x, fresh = tokens(2000), tokens(1000)
    rate = {
        router: hits(
            carve(gate, up, down, x, experts=8, shared=2, active=2, k_act=8, router=router), fresh
        )
        for router in ("analytic", "analytic-multi", "ridge", "random")
    }
    assert rate["ridge"] > max(rate["random"], rate["analytic"]) + 0.1
    assert abs(rate["random"] - 2 / 6) < 0.15


def test_ridge_solves_its_equations() -> None:
    gate, up, down, x = weights(q=200)
    found = carve(gate, up, down, x, experts=8, shared=2, active=2, k_act=5, router="ridge")
    assert found.router is not None
    assert found.router.bias is not None
    inputs = np.concatenate([x.double().numpy(), np.ones((200, 1))], 1)
    mass = torch.stack(
        [
            (nn.functional.silu(x @ gate[e].T) * (x @ up[e].T)).abs().sum(1)
            for e in found.experts
        ], 1,
    ).double().numpy()  # fmt: skip
    solved = np.linalg.solve(inputs.T @ inputs + 1e-3 * 200 * np.eye(17), inputs.T @ mass)
    ours = torch.cat((found.router.weight, found.router.bias[:, None]), 1)
    near(torch.from_numpy(solved.T), ours)
    assert found.router_up is None


def test_several_representatives_add_their_activations() -> None:
    gate, up, down, x = weights()
    settings = {"experts": 8, "shared": 2, "active": 2, "k_act": 5}
    found = carve(gate, up, down, x, **settings, router="analytic-multi")
    reps = found.representatives
    assert reps.shape == (6, 8)
    unit = lambda w: w / w.norm(dim=-1, keepdim=True)  # noqa: E731
    h = nn.functional.silu(x @ unit(gate)[reps.flatten()].T) * (x @ unit(up)[reps.flatten()].T)
    scores = h.abs().reshape(-1, 6, 8).sum(-1)
    assert torch.equal(found.route(x).sort().values, scores.topk(2, -1).indices.sort().values)


# ---- two processes -----------------------------------------------------------------------


def test_two_processes_carve_like_one(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = Path(cmoe_worker.__file__)
    environment = {**os.environ, "PYTHONPATH": str(worker.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*torchrun, str(worker), str(tmp_path)], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    gate, up, down, x = weights(q=301)
    for router, profile in (("analytic", "code"), ("ridge", "paper")):
        one = carve(
            gate, up, down, x, experts=8, shared=2, active=2, k_act=5, router=router,
            profile=profile,
        )  # fmt: skip
        assert one.router is not None
        for rank in range(2):
            two = torch.load(tmp_path / f"{router}-{rank}.pt")
            assert torch.equal(one.shared, two["shared"])
            assert all(map(torch.equal, one.experts, two["experts"]))
            assert torch.equal(one.rates, two["rates"])
            assert one.assignment_cost == two["cost"]
            near(one.router.weight, two["router"])
    whole = carved_weights(BATCHES)
    for rank in range(2):
        part = torch.load(tmp_path / f"pass-{rank}.pt")
        assert whole.keys() == part.keys()
        assert all(torch.equal(whole[name], part[name]) for name in whole)
