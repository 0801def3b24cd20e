"""What each level claims beyond the right answer: python -m pytest tests/test_claims.py"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.config import MoEConfig, Workload, preset
from common.measure import PeakMemory, count_host_syncs, gate, profile_call, relative_error
from common.model import Weights, make_inputs, make_weights, oracle
from labs.kernels.choice import Choice
from labs.kernels.routing import new_arrivals
from tests.cases import IDS, LEVELS, build

# Operations whose result the host must see before it can go on.
SYNCING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal", "item")
NO_SYNC = [loaded for loaded in LEVELS if loaded.level.claims.host_syncs == 0]
FEW_LAUNCHES = [loaded for loaded in LEVELS if loaded.level.claims.max_launches is not None]


class CountOperations(TorchDispatchMode):
    """Counts the PyTorch operations that run inside it: on a GPU each is a launch or more."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def operations(loaded, E: int, T: int = 40) -> Counter[str]:
    cfg = MoEConfig("case", D=32, F=16, E=E, K=2)
    weights = make_weights(cfg, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    x_TD = make_inputs(Workload(cfg, T, torch.float32), weights)
    forward = build(loaded, cfg, weights)
    launchers = [name for name in ("silu_mul", "grouped_gemm") if hasattr(loaded.module, name)]
    patch = pytest.MonkeyPatch()
    with CountOperations() as counter:
        for name in launchers:  # the interpreter's own tensor operations are not the level's
            patch.setattr(loaded.module, name, quiet(getattr(loaded.module, name), counter, name))
        forward(x_TD)
    patch.undo()
    return counter.seen


def quiet(launcher, counter: CountOperations, name: str):
    def call(*args):
        before = counter.seen.copy()
        result = launcher(*args)
        counter.seen = before
        counter.seen[name] += 1
        return result

    return call


@pytest.mark.parametrize("loaded", [one for one in NO_SYNC if "cuda" not in one.level.requires],
                         ids=lambda one: f"level{one.level.number}")
def test_no_operation_makes_the_host_wait(loaded):
    assert not [name for name in operations(loaded, E=8) if name in SYNCING]


def test_the_count_sees_level0_wait():
    assert operations(LEVELS[0], E=8)["nonzero"] == 16


@pytest.mark.parametrize("number", [1, 2, 4])
def test_launches_do_not_grow_with_experts_or_tokens(number):
    few = operations(LEVELS[number], E=4)
    assert few == operations(LEVELS[number], E=32) == operations(LEVELS[number], E=4, T=90)
    if number >= 2:
        assert few["silu_mul"] == 1
    if number == 4:
        assert few["grouped_gemm"] == 2


def test_level0_launches_grow_with_experts():
    assert operations(LEVELS[0], E=32).total() > 6 * operations(LEVELS[0], E=4).total()


@pytest.mark.parametrize("number", [2, 3, 4])
def test_the_fused_kernel_is_launched(number, monkeypatch):
    launches = []
    module = LEVELS[number].module
    inner = module.silu_mul
    monkeypatch.setattr(module, "silu_mul", lambda *args: launches.append(args) or inner(*args))
    cfg = MoEConfig("case", D=32, F=16, E=4, K=2)
    weights = make_weights(cfg, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    x_TD = make_inputs(Workload(cfg, 8, torch.float32), weights)
    build(LEVELS[number], cfg, weights)(x_TD)
    assert len(launches) == 1


def test_the_fused_kernel_rounds_once():
    """In float16, silu(gate) * up from float32 inside, rounded once, is exact to half a unit in the last place."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate_up = torch.randn(33, 2 * 77, device=device).half()
    exact = torch.nn.functional.silu(gate_up[:, :77].double()) * gate_up[:, 77:].double()
    fused = LEVELS[2].module.silu_mul(gate_up).double()
    twice_rounded = (torch.nn.functional.silu(gate_up[:, :77]) * gate_up[:, 77:]).double()
    # float32 sigmoid adds a little to half an ulp (2**-11 relative)
    assert ((fused - exact).abs() <= 2**-11 * 1.01 * exact.abs() + 1e-7).all()
    assert ((twice_rounded - exact).abs() > 2**-11 * 1.01 * exact.abs() + 1e-7).any()


# ---- on the GPU: the claims as measured ------------------------------------------------------------

REAL = MoEConfig("real", D=512, F=256, E=32, K=4)


@pytest.fixture(scope="module")
def real() -> tuple[Weights, torch.Tensor]:
    weights = make_weights(REAL, torch.bfloat16, "cuda")
    return weights, make_inputs(Workload(REAL, 300), weights)


@pytest.mark.gpu
@pytest.mark.parametrize("loaded", NO_SYNC, ids=lambda one: f"level{one.level.number}")
def test_host_never_waits(loaded, real):
    weights, x_TD = real
    forward = build(loaded, REAL, weights)
    forward(x_TD)
    assert count_host_syncs(lambda: forward(x_TD)) == 0


@pytest.mark.gpu
def test_the_sync_counter_counts(real):
    weights, x_TD = real
    forward = build(LEVELS[0], REAL, weights)
    assert count_host_syncs(lambda: forward(x_TD)) >= REAL.E * REAL.K


@pytest.mark.gpu
@pytest.mark.parametrize("loaded", FEW_LAUNCHES, ids=lambda one: f"level{one.level.number}")
def test_launches_stay_under_the_claim(loaded, real):
    weights, x_TD = real
    forward = build(loaded, REAL, weights)
    for _ in range(2):  # the second call captures a graph that reads x where it lies
        forward(x_TD)
    assert 1 <= profile_call(lambda: forward(x_TD)).launches <= loaded.level.claims.max_launches


@pytest.mark.gpu
@pytest.mark.parametrize("loaded", LEVELS, ids=IDS)
def test_bitwise_repeatable_at_scale(loaded, real):
    weights, x_TD = real
    forward = build(loaded, REAL, weights)
    first = forward(x_TD).clone()
    assert all(torch.equal(first, forward(x_TD)) for _ in range(5))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [64, 1024, 4096])
def test_level3_holds_its_budget(T):
    cfg = preset("qwen3-30b-a3b")
    weights = make_weights(cfg, torch.bfloat16, "cuda")
    x_TD = make_inputs(Workload(cfg, T), weights)
    budget = 2**30
    with PeakMemory(torch.device("cuda")) as memory:
        memory.result = LEVELS[3].build(cfg, weights, budget_bytes=budget)(x_TD)
    assert 0.5 * budget < memory.bytes <= budget


@pytest.mark.gpu
def test_offsets_past_2_to_the_31():
    """R*D and R*2F values pass 2**31: the last rows must be as right as the first."""
    cfg = MoEConfig("long", D=2048, F=1024, E=8, K=4)
    T = 300_000
    assert T * cfg.K * cfg.D > 2**31
    weights = make_weights(cfg, torch.bfloat16, "cuda")
    workload = Workload(cfg, T)
    x_TD = make_inputs(workload, weights)
    tail_TD = x_TD[-500:].contiguous()
    expected = oracle(cfg, weights, tail_TD)
    for number in (4, 5, 8):
        forward = LEVELS[number].build(cfg, weights)
        found = gate(forward(x_TD)[-500:], expected, workload)
        assert found.ok, f"level {number}: {found.reason}"
        del forward
    level8 = LEVELS[8].module
    for kernels in ("gather", "ahead", "spread") if torch.cuda.get_device_capability() == (9, 0) else ():
        out_TD = level8.layer(x_TD, level8.repack(cfg, weights), cfg, new_arrivals("cuda"), Choice(kernels))
        found = gate(out_TD[-500:], expected, workload)
        assert found.ok, f"{kernels}: {found.reason}"


@pytest.mark.gpu
def test_graphs_kept_are_bounded():
    module = LEVELS[5].module
    weights = make_weights(REAL, torch.bfloat16, "cuda")
    forward = LEVELS[5].build(REAL, weights)
    for T in range(1, module.MAX_GRAPHS + 4):
        forward(make_inputs(Workload(REAL, T), weights))
    assert len(forward.graphs) == module.MAX_GRAPHS
    assert list(forward.graphs)[-1] == module.MAX_GRAPHS + 3


@pytest.mark.gpu
@pytest.mark.parametrize("loaded", [LEVELS[5], LEVELS[8]], ids=lambda one: f"level{one.level.number}")
def test_an_x_that_comes_again_is_read_where_it_lies(loaded, real):
    """Also with other values there; what kernels cannot read, a view with gaps or one off 16 bytes, is copied. Which
    graph answers is tested on a CPU, by tests/test_replay.py."""
    weights, first_TD = real
    forward, eager = build(loaded, REAL, weights), build(LEVELS[4], REAL, weights)
    T, D = first_TD.shape
    x_TD, wide_TD = first_TD.clone(), torch.cat([first_TD, first_TD.flip(0)], dim=1)
    odd_TD = torch.cat([first_TD.new_zeros(1), first_TD.flatten()])[1:].view(T, D)
    for change in (lambda: None, lambda: None, lambda: x_TD.neg_(), lambda: x_TD.copy_(first_TD.flip(0))):
        change()
        kept_TD = x_TD.clone()
        assert relative_error(forward(x_TD), eager(x_TD).double()) < 3e-2
        assert torch.equal(x_TD, kept_TD), "nobody writes to a caller's x"
    assert forward.in_place[T][2] == x_TD.data_ptr()
    assert profile_call(lambda: forward(x_TD)).launches == 1
    for other_TD in (wide_TD[:, :D], odd_TD, x_TD):
        assert relative_error(forward(other_TD), eager(other_TD.contiguous()).double()) < 3e-2
    with torch.inference_mode():
        assert relative_error(forward(x_TD), eager(x_TD).double()) < 3e-2


@pytest.mark.gpu
def test_a_replay_refuses_other_dtypes_and_widths(real):
    weights, x_TD = real
    forward = LEVELS[5].build(REAL, weights)
    with pytest.raises(ValueError, match="this forward was built for"):
        forward(x_TD.float())
    with pytest.raises(ValueError, match="this forward was built for"):
        forward(x_TD[:, :-8])


@pytest.mark.gpu
def test_level6_compiles_once_a_token_count(real):
    weights, _ = real
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    forward = LEVELS[6].build(REAL, weights)
    for seed in range(4):
        for routing in ("natural", "one_hot", "sparse"):
            forward(make_inputs(Workload(REAL, 300, routing=routing, seed=seed), weights))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.gpu
def test_level6_takes_more_token_counts_than_pytorchs_own_limit():
    weights = make_weights(REAL, torch.bfloat16, "cuda")
    forward = LEVELS[6].build(REAL, weights)
    for T in range(8, 18):
        workload = Workload(REAL, T)
        x_TD = make_inputs(workload, weights)
        assert gate(forward(x_TD), oracle(REAL, weights, x_TD), workload).ok
