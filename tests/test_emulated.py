"""The Hopper GEMMs' answers without a GPU: their PTX, run warp by warp (ptx.py), against float64.

python -m pytest tests/test_emulated.py
"""

from __future__ import annotations

import itertools
import re

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import pytest
import torch

from labs.kernels import roles, tall_gemm, tiles
from tests.gemm_cases import dispatch
from tests.machine_code import compile_all
from tests.ptx import TensorMap, emulate
from tests.test_kernels_gemm import request, training_request
from tests.test_weight_gemm import request as weight_request

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves")

BOUND = 4e-3  # one rounding to bf16 is 1.7e-3 in the relative norm
SPARE = 70  # rows beyond the last, which nobody may write
COMBINED = {"TOP_K": 2, "CHOICES": 2}
THREE_BANDS, TWO_BANDS = (2, 4), (3, 5)  # the first column tiles of the second and the third, of 1056 columns in 5


class Problem:
    """A layer whose experts have 101, 0, 60 and 41 rows: a tile with rows in both warpgroups, none, two halves.

    Widths that TMA deals out, or that it does not; of several column tiles, the last one narrow. With K=3, expert 1 has
    rows too.
    """

    def __init__(self, dealt: bool, columns: int = 0, T: int = 101, K: int = 2):
        D, F = (288, 320) if dealt else (264, 328)
        E, D = 4, columns or D
        torch.manual_seed(0)
        choices = torch.zeros(T), torch.where(torch.arange(T) < 60, 2, 3), torch.ones(T)
        ids_TK = torch.stack(choices[:K], dim=1).long()
        self.offsets_E1, tokens, self.row_of_slot_TK = dispatch(ids_TK, E)
        self.token_of_row_R, self.scores_TK = tokens[: T * K].contiguous(), torch.rand(T, K)
        self.x_TD = torch.randn(T, D).bfloat16()
        gate_up_E2FD = (torch.randn(E, 2 * F, D) * D**-0.5).bfloat16()
        self.gate_up_E2FD = tiles.interleave_gate_up(gate_up_E2FD)
        self.down_EDF = (torch.randn(E, D, F) * F**-0.5).bfloat16()
        self.rows_RD = self.x_TD[self.token_of_row_R.long()]
        self.hidden_RF = self.per_expert(self.rows_RD, lambda rows, e: torch.nn.functional.silu(
            rows @ gate_up_E2FD[e, :F].double().T) * (rows @ gate_up_E2FD[e, F:].double().T)).bfloat16()
        self.y_RD = self.per_expert(self.hidden_RF, lambda rows, e: rows @ self.down_EDF[e].double().T)
        self.D8, self.F8, self.T = D // 8, F // 8, T

    def per_expert(self, rows: torch.Tensor, apply) -> torch.Tensor:
        """apply(an expert's rows in float64, the expert) for all."""
        return torch.cat([apply(rows[first:end].double(), e) for e, (first, end) in
                          enumerate(itertools.pairwise(self.offsets_E1.tolist()))])

    def plan(self, tall: bool = False) -> tiles.TilePlan:
        more = (tall_gemm.TILE_ROWS, tall_gemm.GROUP) if tall else ()
        return tiles.plan_tiles(self.offsets_E1, self.token_of_row_R.numel(), *more)

    def out(self, width: int) -> torch.Tensor:
        return torch.full((self.token_of_row_R.numel() + SPARE, width), torch.nan).bfloat16()


def weights(tensor: torch.Tensor, interleaved: bool = False) -> TensorMap:
    """As TMA reads them."""
    descriptor = roles.describe_weights(tensor, interleaved)
    return TensorMap(tensor.view(-1).as_strided(descriptor.shape, descriptor.strides), tuple(descriptor.block_shape))


def ptx_of(kernel: str, dealt: bool, late: bool | None, constants: dict | None = None, early: bool = False,
           even: bool = False) -> str:
    asked = request(kernel, constants, dealt, late, early, even)
    return compile_all([asked])[asked.name].ptx


def run(kernel: str, dealt: bool, late: bool | None, given: Problem, seed: int,
        slow: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's output and what it should be."""
    tall, up = kernel.startswith("tall"), "up" in kernel
    plan, out = given.plan(tall), given.out(given.F8 * 8 if up else given.D8 * 8)
    table = out, plan.tiles_X5, plan.tile_count, given.D8, given.F8
    operand = weights(given.gate_up_E2FD, True) if up else weights(given.down_EDF)
    claimed = () if tall else (plan.claimed_up if up else plan.claimed_down,)
    rows = TensorMap(given.rows_RD if up else given.hidden_RF, (64, 64))
    if kernel == "up_gather_kernel":
        arguments = [given.x_TD, given.token_of_row_R, *claimed, operand, *table, plan.done_up]
    elif kernel == "up_ahead_kernel":
        gathered_RD = torch.full_like(given.rows_RD, torch.nan)
        arguments = [given.x_TD, given.token_of_row_R, TensorMap(gathered_RD, (64, 64)), gathered_RD, plan.ready_X,
                     plan.begun, *claimed, operand, *table]
    elif up:
        arguments = [rows, *claimed, operand, *table]
    else:
        arguments = [*claimed, rows, operand, *table, *([] if tall else [plan.done_up])]
    emulate(ptx_of(kernel, dealt, late, even=given.D8 % 8 == 0), kernel, arguments, seed, slow=slow)
    return out, (given.hidden_RF if up else given.y_RD)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


KERNELS = ("up_gather_kernel", "up_rows_kernel", "up_ahead_kernel", "down_kernel")
TALL = ("tall_up_rows_kernel", "tall_down_kernel")


@pytest.mark.parametrize("dealt", [True, False], ids=["dealt", "in order"])
@pytest.mark.parametrize(("kernel", "late"), [*((kernel, late) for kernel in KERNELS for late in (True, False)),
                                              *((kernel, None) for kernel in TALL)])
def test_answers_are_the_float64_ones(kernel, late, dealt):
    check_answers(kernel, late, dealt, Problem(dealt))


@pytest.mark.parametrize("late", [True, False])
def test_rows_of_whole_steps_are_gathered_without_a_column_mask(late):
    check_answers("up_gather_kernel", late, True, Problem(True, columns=320))


def check_answers(kernel: str, late: bool | None, dealt: bool, given: Problem) -> None:
    out, expected = run(kernel, dealt, late, given, seed=0)
    assert error(out[:-SPARE], expected) < BOUND
    assert out[-SPARE:].isnan().all(), "stored past the end"


@pytest.mark.parametrize("kernel", KERNELS)
def test_when_warps_run_and_copies_land_changes_nothing(kernel):
    given = Problem(True)
    orders = [(0, False), (1, False), (2, True), (3, True)]
    first, *others = (run(kernel, True, True, given, seed, slow)[0] for seed, slow in orders)
    assert all(torch.equal(first.view(torch.int16), out.view(torch.int16)) for out in others)


@pytest.mark.parametrize(("T", "K", "late", "slow", "edges"), [
    (101, 2, True, False, THREE_BANDS), (101, 2, True, True, THREE_BANDS), (101, 2, False, False, THREE_BANDS),
    (101, 2, True, True, TWO_BANDS), (5, 3, True, True, THREE_BANDS), (1, 1, True, True, THREE_BANDS)])
def test_bands_are_summed_once_they_are_stored(T, K, late, slow, edges):
    given = Problem(True, 1056, T, K)
    D = given.D8 * 8
    plan, y_RD, out_TD = given.plan(), given.out(D), torch.full((T, D), torch.nan).bfloat16()
    widths = [min(edge, -(-D // roles.BLOCK_N)) - first for first, edge in zip((0, *edges), (*edges, D), strict=True)]
    whole_B, counted = [plan.tile_count.item() * width for width in widths], []

    def look(releases: bool) -> None:
        if not releases:
            return
        counted.append(plan.done_B.tolist())
        for band, (done, whole) in enumerate(zip(counted[-1][:3], whole_B, strict=True)):
            first = (0, *edges)[band] * roles.BLOCK_N
            if done == whole:
                assert not y_RD[:-SPARE, first : first + widths[band] * roles.BLOCK_N].isnan().any(), "not stored yet"

    emulate(ptx_of("down_combine_kernel", True, late, {"TOP_K": K, "CHOICES": 1 << (K - 1).bit_length()}),
            "down_combine_kernel",
            [plan.claimed_down, TensorMap(given.hidden_RF, (64, 64)), weights(given.down_EDF), y_RD, plan.tiles_X5,
             plan.tile_count, given.D8, given.F8, given.row_of_slot_TK, given.scores_TK, out_TD, plan.done_B, T,
             *edges, plan.done_up], on_atomic=look, slow=slow)
    assert error(y_RD[:-SPARE], given.y_RD) < BOUND
    assert counted[-1] == [*whole_B, 0]
    assert len(counted) == sum(width > 0 for width in widths), "a band is counted once"
    last = {THREE_BANDS: 1024, TWO_BANDS: 768}[edges]
    expected = (y_RD.double()[given.row_of_slot_TK.long()] * given.scores_TK[..., None]).sum(dim=1)
    assert error(out_TD[:, :last], expected[:, :last]) < BOUND
    assert out_TD[:, last:].isnan().all(), "the last band is combine's"


@pytest.mark.parametrize("late", [True, False])
def test_down_waits_for_what_up_counts(late):
    """up counts the tiles of both parts, however few; down that begins early waits for as many, or for good."""
    given = Problem(True)
    plan, hidden_RF, y_RD = given.plan(), given.out(given.F8 * 8), given.out(given.D8 * 8)
    tiles_of_up, counted = plan.tile_count.item() * -(-2 * given.F8 * 8 // roles.BLOCK_N), []
    assert tiles_of_up == 9

    def look(releases: bool) -> None:
        if not releases:
            return
        counted.append(plan.done_up.tolist())
        if counted[-1] == [6, 0]:  # those of the first two experts that have rows
            assert not hidden_RF[:161].isnan().any(), "counted before it is stored"

    emulate(ptx_of("up_gather_kernel", True, late), "up_gather_kernel",
            [given.x_TD, given.token_of_row_R, plan.claimed_up, weights(given.gate_up_E2FD, True), hidden_RF,
             plan.tiles_X5, plan.tile_count, given.D8, given.F8, plan.done_up], on_atomic=look)
    assert counted == [[6, 0], [6, 3]]
    emulate(ptx_of("down_kernel", True, late, early=True), "down_kernel",
            [plan.claimed_down, TensorMap(hidden_RF[:-SPARE], (64, 64)), weights(given.down_EDF), y_RD, plan.tiles_X5,
             plan.tile_count, given.D8, given.F8, plan.done_up])
    assert error(y_RD[:-SPARE], given.y_RD) < BOUND
    assert y_RD[-SPARE:].isnan().all()


def test_a_program_that_gets_nothing_of_the_last_bands_counts_those_before():
    """Others take all tiles of the later ones: what it leaves at its end is the band that its last tile was of."""
    given = Problem(True, columns=1056)
    T, D = given.row_of_slot_TK.shape[0], given.D8 * 8
    plan, y_RD, out_TD = given.plan(), given.out(D), torch.full((T, D), torch.nan).bfloat16()
    edges = THREE_BANDS
    first_band, total = plan.tile_count.item() * edges[0], plan.tile_count.item() * -(-D // roles.BLOCK_N)

    def take_the_rest(releases: bool) -> None:
        if plan.claimed_down == first_band:
            plan.claimed_down.fill_(total)
            plan.done_B[1:] = total

    emulate(ptx_of("down_combine_kernel", True, True, COMBINED), "down_combine_kernel",
            [plan.claimed_down, TensorMap(given.hidden_RF, (64, 64)), weights(given.down_EDF), y_RD, plan.tiles_X5,
             plan.tile_count, given.D8, given.F8, given.row_of_slot_TK, given.scores_TK, out_TD, plan.done_B, T, *edges,
             plan.done_up], on_atomic=take_the_rest)
    assert plan.done_B.tolist() == [first_band, total, total, total]
    given = Problem(True)
    plan, hidden_RF = given.plan(), given.out(given.F8 * 8)

    def take_the_last(releases: bool) -> None:
        if plan.claimed_up == 6:
            plan.claimed_up.fill_(9)

    emulate(ptx_of("up_gather_kernel", True, True), "up_gather_kernel",
            [given.x_TD, given.token_of_row_R, plan.claimed_up, weights(given.gate_up_E2FD, True), hidden_RF,
             plan.tiles_X5, plan.tile_count, given.D8, given.F8, plan.done_up], on_atomic=take_the_last)
    assert plan.done_up.tolist() == [6, 0]


@pytest.mark.parametrize(("late", "slow"), [(True, False), (True, True), (False, False)])
def test_weights_as_they_lie(late, slow):
    """y times down, straight: what dX~ is made by."""
    given = Problem(False)
    plan, y_RD, out_RF = given.plan(), given.y_RD.bfloat16(), given.out(given.F8 * 8)
    emulate(ptx_of("straight_kernel", True, late), "straight_kernel",
            [plan.claimed_down, TensorMap(y_RD, (64, 64)), TensorMap(given.down_EDF, (1, 64, 64)), out_RF,
             plan.tiles_X5, plan.tile_count, given.F8, given.D8], slow=slow)
    assert error(out_RF[:-SPARE], given.per_expert(y_RD, lambda rows, e: rows @ given.down_EDF[e].double())) < BOUND
    assert out_RF[-SPARE:].isnan().all(), "stored past the end"


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize(("accumulate", "slow"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("wide", [False, True])
def test_weight_gradients(wide, accumulate, slow, length):
    """Experts of 330, 0, 200 and 130 rows: six steps, stored late, none, four and three, before the next tile."""
    torch.manual_seed(0)
    T, K, E, G, S = 330, 2, 4, 264, 136
    ids_TK = torch.stack([torch.zeros(T), torch.where(torch.arange(T) < 200, 2, 3)], dim=1).long()
    offsets_E1, tokens, _ = dispatch(ids_TK, E)
    token_of_row_R = tokens[: T * K].contiguous()
    gathered_TG, sorted_RS = torch.randn(T, G).bfloat16(), torch.randn(T * K, S).bfloat16()
    out = torch.full((E, S, G) if wide else (E, G, S), 0.5 if accumulate else torch.nan)
    out = out if accumulate else out.bfloat16()
    asked = weight_request(wide, accumulate)
    emulate(compile_all([asked])[asked.name].ptx, "weight_gemm_kernel",
            [gathered_TG, token_of_row_R, TensorMap(sorted_RS, (64, 64)), out, offsets_E1, E, G // 8, S // 8, length],
            slow=slow)
    for e, (first, end) in enumerate(itertools.pairwise(offsets_E1.tolist())):
        expected = gathered_TG[token_of_row_R[first:end].long()].double().T @ sorted_RS[first:end].double()
        found = out[e].double() - 0.5 * accumulate
        assert (found - (expected.T if wide else expected)).norm() <= BOUND * expected.norm(), f"expert {e}"


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("gathered", "columns"), [(True, 264), (True, 320), (False, 264)])
def test_training(gathered, columns, slow):
    """What up keeps, and all that hidden_grad's epilogue makes of it."""
    given = Problem(False, columns)
    (E, two_F, D), R, F = given.gate_up_E2FD.shape, given.token_of_row_R.numel(), given.F8 * 8
    gate_up_E2FD = torch.randn(E, two_F, D).mul(D**-0.5).bfloat16()
    rows = given.x_TD if gathered else TensorMap(given.rows_RD, (64, 64))
    plan, h_R2F, hidden_RF = given.plan(), given.out(two_F), given.out(F)
    asked = training_request("train_up_kernel", gathered, even=columns == 320)
    emulate(compile_all([asked])[asked.name].ptx, "train_up_kernel",
            [rows, given.token_of_row_R, plan.claimed_up, TensorMap(gate_up_E2FD.view(2 * E, F, D), (2, 128, 64)),
             h_R2F, hidden_RF, plan.tiles_X5, plan.tile_count, given.D8, given.F8], slow=slow)
    exact_R2F = given.per_expert(given.rows_RD, lambda rows, e: rows @ gate_up_E2FD[e].double().T)
    gate, up = exact_R2F.chunk(2, dim=1)
    assert error(h_R2F[:-SPARE], exact_R2F) < BOUND
    assert error(hidden_RF[:-SPARE], torch.nn.functional.silu(gate) * up) < BOUND
    assert h_R2F[-SPARE:].isnan().all()
    assert hidden_RF[-SPARE:].isnan().all()

    scores_R, h_R2F = torch.rand(R), h_R2F[:-SPARE].contiguous()
    gate, up = h_R2F.double().requires_grad_().chunk(2, dim=1)
    hidden = torch.nn.functional.silu(gate) * up
    d_hidden_RF = given.per_expert(given.rows_RD, lambda rows, e: rows @ given.down_EDF[e].double())  # x for dO
    d_gate, d_up = torch.autograd.grad(hidden, (gate, up), d_hidden_RF * scores_R[:, None])
    plan, dh_R2F, scaled_RF = given.plan(), given.out(two_F), given.out(F)
    d_scores_XR = torch.full((-(-F // roles.BLOCK_N), R), torch.nan)
    asked = training_request("hidden_grad_kernel", gathered, even=columns == 320)
    emulate(compile_all([asked])[asked.name].ptx, "hidden_grad_kernel",
            [rows, given.token_of_row_R, plan.claimed_up, TensorMap(given.down_EDF, (1, 64, 64)), scores_R,
             TensorMap(h_R2F, (64, 32), swizzle=64), dh_R2F, scaled_RF, d_scores_XR, plan.tiles_X5, plan.tile_count, R,
             given.D8, given.F8], slow=slow)
    assert error(dh_R2F[:-SPARE], torch.cat([d_gate, d_up], dim=1)) < BOUND
    assert error(scaled_RF[:-SPARE], hidden.detach() * scores_R[:, None]) < BOUND
    assert error(d_scores_XR.sum(dim=0), (d_hidden_RF * hidden.detach()).sum(dim=1)) < BOUND
    assert dh_R2F[-SPARE:].isnan().all()


def test_a_wrong_count_of_arrivals_and_a_wrong_mask_show():
    """The emulator can tell: a barrier that waits for one arrival more, a store that goes a row too far."""
    given, ptx = Problem(True), ptx_of("down_kernel", True, True)
    plan = given.plan()

    def arguments(rows: int) -> list:
        y_RD = given.out(given.D8 * 8)[:rows]
        return [plan.claimed_down, TensorMap(given.hidden_RF, (64, 64)), weights(given.down_EDF), y_RD, plan.tiles_X5,
                plan.tile_count, given.D8, given.F8, plan.done_up]

    faulty, found = re.subn(r"(mbarrier\.init\S+ \[%r\d+\]), 2;", r"\1, 3;", ptx, count=1)
    assert found == 1
    with pytest.raises(RuntimeError, match="nothing goes on"):
        emulate(faulty, "down_kernel", arguments(272))
    plan = given.plan()
    with pytest.raises(IndexError, match="bytes"):
        emulate(ptx, "down_kernel", arguments(given.token_of_row_R.numel() - 1))


@pytest.mark.parametrize("consumers", [True, False], ids=["of the consumers", "after the barriers"])
def test_what_is_not_fenced_shows(consumers):
    """cp.async writes rows by another way than wgmma reads them, and threads barriers by another than TMA uses them."""
    given, fence = Problem(True), "fence.proxy.async.shared::cta;"
    first, *others = re.split(f"(?={re.escape(fence)})", ptx_of("up_gather_kernel", True, True))
    assert len(others) > 1
    faulty = first + "".join(one.removeprefix(fence) if (i > 0) == consumers else one for i, one in enumerate(others))
    plan = given.plan()
    with pytest.raises(AssertionError, match="since shared memory was written"):
        emulate(faulty, "up_gather_kernel",
                [given.x_TD, given.token_of_row_R, plan.claimed_up, weights(given.gate_up_E2FD, True),
                 given.out(given.F8 * 8), plan.tiles_X5, plan.tile_count, given.D8, given.F8, plan.done_up])


def test_what_is_not_waited_for_shows():
    """Slow work can tell: a copy that is used before it is there, a stage given back while it is multiplied, a sum that
    is taken before it is whole."""
    given = Problem(True, columns=1056)
    T, D = given.row_of_slot_TK.shape[0], given.D8 * 8
    expected = (given.y_RD[given.row_of_slot_TK.long()] * given.scores_TK[..., None]).sum(dim=1)[:, :1024]

    def error_with(right: str, wrong: str) -> float:
        faulty, found = re.subn(right, wrong, ptx_of("down_combine_kernel", True, True, COMBINED))
        assert found > 0
        plan, y_RD, out_TD = given.plan(), given.out(D), torch.full((T, D), torch.nan).bfloat16()
        emulate(faulty, "down_combine_kernel",
                [plan.claimed_down, TensorMap(given.hidden_RF, (64, 64)), weights(given.down_EDF), y_RD, plan.tiles_X5,
                 plan.tile_count, given.D8, given.F8, given.row_of_slot_TK, given.scores_TK, out_TD, plan.done_B, T,
                 *THREE_BANDS, plan.done_up], slow=True)
        return error(out_TD[:, :1024], expected)

    assert error_with(r"(cp\.async\.wait_group\s+)15;", r"\g<1>15;") < BOUND
    with pytest.raises(IndexError, match="addresses in no tensor"):  # of rows whose numbers are not there yet
        error_with(r"(cp\.async\.wait_group\s+)15;", r"\g<1>16;")
    with pytest.raises(AssertionError, match="changed while wgmma read it"):
        error_with(r"(wgmma\.wait_group\.sync\.aligned) 1;", r"\1 2;")
    with pytest.raises(AssertionError, match="used before its wgmma is waited for"):
        error_with(r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;")
