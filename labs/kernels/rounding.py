"""Tile-aware token rounding: every expert's row count becomes a multiple of the GEMM's row tile.

Why    an expert's last row tile is half empty on average, and an empty row costs what a full one does. At E=256,
       K=8, T=16384 and tiles of 128 that is an eighth of all arithmetic.
What   expert e was chosen by f_e tokens. Give it r_e instead, a multiple of the tile less than one tile away
       (SonicMoE, arXiv 2512.14080), and keep the r_e best tokens of its column: chosen before not chosen, then by
       score, then by lower token. Rounding down drops the weakest chosen; rounding up adds the best not chosen.
           down     floor           nearest  whichever is nearer, up at exactly half a tile
           up       ceiling         balance  floor, then up for the largest remainders until the total is as near
                                             T*K as tiles allow (ties: lower expert). For its total, no other
                                             choice changes fewer routes.
       No ceiling passes T: an expert that has no more tokens to give is rounded down. Scores are renormalised over
       what a token keeps; a token that keeps nothing has no entries, and combine_rounded writes it zeros.
How    sorting T*E scores would cost more than it saves. Only each column's r_e-th largest key is needed:
           key = chosen << 30 | bits of the score     (a float in [0, 2) has 30 bits that order as it does)

           rank_keys (per token block)     scores (T,E), ids (T,K) --transpose--> keys (E,T), chosen counted
           round_counts (one program)      f_E -> r_E -> offsets
           select_rows (per expert)        bisect on the key's bits, counting its column, held in registers to T=32768;
                                           most columns end at about log2(T) counts, ties and all at 31; write tokens
                                           in order; keys (E,T) become rows (E,T), in place
           list_entries (per token block)  rows (E,T), scores --transpose--> each token's entries, by expert

       Four launches, no sort, no host sync, static shapes, integer atomics only: bitwise repeatable, capturable.
Costs  at T=16384, E=128, K=8: 18, 0.1, 26 and 18 MB moved, mostly within L2. Exact top-k is the same path, tile 1.
       It looks at the whole batch, so it is not causal: for training and offline use. Evaluation uses mode="exact".
       Below two tiles of mean rows an expert it moves too many routes: plan_rounding turns it off and says so.

index array          shape      from -> to
expert_ids_TK        (T, K)     token, slot -> expert the router chose
offsets_E1           (E + 1,)   expert -> its first row, a multiple of the tile; the last entry is the rows in use
token_of_row_C       (C,)       row -> token, ascending within an expert; 0 past the rows in use
first_of_token_T1    (T + 1,)   token -> its first entry; the last entry is the rows in use
row_of_entry_C       (C,)       entry -> row, ascending within a token, so by expert; undefined past the rows in use
score_of_entry_C     (C,)       entry -> weight of that row in its token's sum; undefined past the rows in use
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

import common.level  # noqa: F401  (picks Triton's interpreter where there is no GPU)
from common.config import MoEConfig
from common.rounded import Rounding

import triton
import triton.language as tl

# T tokens, E experts, K top-k, D model width, C capacity in rows, B token blocks, P tokens padded to 16.

MODES = ("nearest", "up", "down", "balance", "exact")
LEAST_TILES = 2.0  # mean rows an expert, in tiles: SonicMoE finds quality falling at 1 and not at 2
MOST_PROGRAMS = 256  # of rank_keys
MOST_IN_REGISTERS = 32768  # tokens of a column that 1024 threads can hold, 32 keys each
WRITTEN_A_WARP = 128  # rows that a warp writes at a time. With 64, Triton 3.6 does not spill, and is slower
KERNELS = ("rank_keys", "round_counts", "select_rows", "list_entries")  # what rounding itself launches
CHOSEN = tl.constexpr(1 << 30)
NO_KEY = tl.constexpr(2**31 - 1)  # above every key


class Plan(NamedTuple):
    """What is known on the host. mode is the one in force; tile the GEMM's; unit what counts are multiples of."""

    T: int
    K: int
    E: int
    mode: str
    tile: int
    unit: int
    capacity: int
    renormalize: bool


class Rounded(NamedTuple):
    """A rounded routing on the device; int32 but for the float32 scores. The module's table says what maps where."""

    counts_E: torch.Tensor  # rows before rounding
    offsets_E1: torch.Tensor
    token_of_row_C: torch.Tensor
    first_of_token_T1: torch.Tensor
    row_of_entry_C: torch.Tensor
    score_of_entry_C: torch.Tensor


class RoundingReport(NamedTuple):
    """What rounding changed, as 0-d tensors on the device. share_changed is (dropped + added) / (T*K); utilisation
    is rows over rows of the tiles that hold them, 1 where there are none."""

    rows_dropped: torch.Tensor
    rows_added: torch.Tensor
    share_changed: torch.Tensor
    utilisation_before: torch.Tensor
    utilisation_after: torch.Tensor
    tokens_without_expert: torch.Tensor


def plan_rounding(cfg: MoEConfig, T: int, tile: int = 128, mode: str = "nearest",
                  least_tiles: float = LEAST_TILES) -> Plan:
    """Settle what the host must know: the mode in force and the most rows that it can give.

    Where T*K/E is under `least_tiles` tiles the mode becomes "exact", with a warning (eager code only: under
    torch.compile, plan outside). Raises ValueError for an unknown mode, a T or tile out of range, too many rows.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown: choose one of {', '.join(MODES)}")
    if T < 0:
        raise ValueError(f"T={T}: the number of tokens is at least 0")
    if tile < 1:
        raise ValueError(f"tile={tile}: the GEMM's rows a tile, at least 1")
    mean = T * cfg.K / cfg.E
    if mode != "exact" and mean < least_tiles * tile:
        if not torch.compiler.is_compiling():
            warnings.warn(f"tile rounding is off, top-k is exact: T*K/E = {mean:.0f} rows an expert is under "
                          f"{least_tiles:g} tiles of {tile}, where rounding would change too many routes", stacklevel=2)
        mode = "exact"
    unit = 1 if mode == "exact" else tile
    most_extra = {"nearest": unit // 2 * min(cfg.E, T * cfg.K), "up": (unit - 1) * min(cfg.E, T * cfg.K),
                  "balance": unit // 2}.get(mode, 0)
    capacity = min((T * cfg.K + most_extra) // unit, cfg.E * (T // unit)) * unit
    if capacity + cfg.E * unit >= 2**31:
        raise ValueError(f"T={T}: {capacity} rows do not fit 32-bit indices, use fewer tokens a call")
    # Softmax over the kept logits is the renormalised softmax over all, whatever cfg.renormalize says.
    return Plan(T, cfg.K, cfg.E, mode, tile, unit, capacity, cfg.renormalize or cfg.scoring == "topk_softmax")


@triton.jit
def rank_keys_kernel(
    probs_ptr,  # (T, E) float32 in [0, 2)
    ids_ptr,  # (T, K) int32 or int64
    keys_ptr,  # (E, P) int32
    counts_ptr,  # (programs, E) int32
    kept_ptr,  # (B,) int32
    T, E, P, B,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, E_POW2: tl.constexpr,
):
    """Keys transposed, chosen rows counted, and the counters of kept rows set to zero for select_rows.

    Grid (min(B, MOST_PROGRAMS),): a program owns every MOST_PROGRAMS-th block of BLOCK_T tokens, by all experts. Few
    programs leave few partial counts for the one program that comes next.
    """
    expert = tl.arange(0, E_POW2)
    counts = tl.zeros((E_POW2,), tl.int32)
    for block in range(tl.program_id(0), B, tl.num_programs(0)):
        token = block * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (token < T)[:, None] & (expert < E)[None, :]
        probs = tl.load(probs_ptr + token.to(tl.int64)[:, None] * E + expert[None, :], mask=inside, other=0.0)
        chosen = tl.zeros((BLOCK_T, E_POW2), tl.int32)
        for k in range(TOP_K):
            ids = tl.load(ids_ptr + token.to(tl.int64) * TOP_K + k, mask=token < T, other=-1).to(tl.int32)
            chosen |= (ids[:, None] == expert[None, :]).to(tl.int32)
        # -0.0 becomes 0; the upper clamp keeps a NaN from reading as chosen.
        bits = tl.minimum(tl.maximum(probs.to(tl.int32, bitcast=True), 0), CHOSEN - 3)
        tl.store(keys_ptr + expert.to(tl.int64)[None, :] * P + token[:, None], chosen * CHOSEN + bits, mask=inside)
        counts += tl.sum(chosen, 0)
        tl.store(kept_ptr + block, 0)
    tl.store(counts_ptr + tl.program_id(0) * E + expert, counts, mask=expert < E)


@triton.jit
def count_at_least(threshold, keys, column_ptr, T, BLOCK: tl.constexpr, IN_REGISTERS: tl.constexpr):
    """How many of a column's keys reach `threshold`; they are in `keys`, or read block by block from L2."""
    if IN_REGISTERS:
        reach = (keys >= threshold).to(tl.int32)
    else:
        reach = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, T, BLOCK):
            token = start + tl.arange(0, BLOCK)
            reach += (tl.load(column_ptr + token, mask=token < T, other=-1) >= threshold).to(tl.int32)
    return tl.sum(reach, 0)


@triton.jit
def bisect(low, count_low, high, count_high, wanted, keys, column_ptr, T, BLOCK: tl.constexpr,
           IN_REGISTERS: tl.constexpr):
    """The threshold that `wanted` keys reach: returns (threshold, how many of the keys equal to it to keep).

    Needs count_low >= wanted keys to reach `low`, and count_high <= wanted to reach `high`. Stops at the first
    threshold that exactly `wanted` reach; then all of them are kept. If ties allow none, the two close in on
    the tied key, and those above it leave so many places.
    """
    while (high - low > 1) & (count_low != wanted):
        middle = low + (high - low) // 2
        count = count_at_least(middle, keys, column_ptr, T, BLOCK, IN_REGISTERS)
        enough = count >= wanted
        low, count_low = tl.where(enough, middle, low), tl.where(enough, count, count_low)
        high, count_high = tl.where(enough, high, middle), tl.where(enough, count_high, count)
    return low, tl.where(count_low == wanted, T, wanted - count_high)


@triton.jit
def round_counts_kernel(
    partials_ptr,  # (programs, E) int32
    counts_ptr,  # (E,) int32
    offsets_ptr,  # (E + 1,) int32
    partials, T, E,
    round_up_from,  # least remainder that is rounded up
    UNIT: tl.constexpr, BALANCE: tl.constexpr, BLOCK: tl.constexpr, E_POW2: tl.constexpr,
):
    """Counts of all experts, their targets, and offsets. Grid (1,): one program owns all."""
    expert = tl.arange(0, E_POW2)
    sums = tl.zeros((BLOCK, E_POW2), tl.int32)
    for start in range(0, partials, BLOCK):
        partial = start + tl.arange(0, BLOCK)
        inside = (partial < partials)[:, None] & (expert < E)[None, :]
        sums += tl.load(partials_ptr + partial[:, None] * E + expert[None, :], mask=inside, other=0)
    counts = tl.sum(sums, 0)
    floors = counts // UNIT * UNIT
    remainders = counts - floors
    can_rise = (remainders > 0) & (floors + UNIT <= T)
    # Experts in the order in which they are rounded up: by remainder, then by lower number. No two are equal.
    urgency = tl.where(can_rise, remainders * E_POW2 + (E_POW2 - 1 - expert), -1)
    threshold = round_up_from * E_POW2
    if BALANCE:
        able = tl.sum(can_rise.to(tl.int32), 0)
        rises = tl.minimum((tl.sum(remainders, 0) + UNIT // 2) // UNIT, able)
        none, above_all = tl.full([], 0, tl.int32), tl.full([], UNIT * E_POW2, tl.int32)
        threshold, _ = bisect(none, able, above_all, none, rises, urgency, counts_ptr, T, E_POW2, True)
    targets = floors + tl.where(urgency >= threshold, UNIT, 0)
    tl.store(counts_ptr + expert, counts, mask=expert < E)
    tl.store(offsets_ptr + 1 + expert, tl.cumsum(targets, 0), mask=expert < E)
    tl.store(offsets_ptr, 0)


@triton.jit
def select_rows_kernel(
    keys_ptr,  # (E, P) int32; in: keys, out: the row of (expert, token), or -1
    counts_ptr,  # (E,) int32
    offsets_ptr,  # (E + 1,) int32
    token_of_row_ptr,  # (C,) int32
    kept_ptr,  # (B,) int32, kept rows of each token block, summed over experts
    T, E, P, C,
    BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, IN_REGISTERS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):
    """The best r_e keys of a column, by bisection, then its rows in token order.

    Grid (E,): a program owns one expert, its column of T keys and its rows. Adds to kept_ptr are of integers, so
    that their order does not matter.
    """
    expert = tl.program_id(0)
    column_ptr = keys_ptr + expert.to(tl.int64) * P
    count = tl.load(counts_ptr + expert)
    row = tl.load(offsets_ptr + expert)
    wanted = tl.load(offsets_ptr + expert + 1) - row
    whole = tl.arange(0, BLOCK)
    held = tl.load(column_ptr + whole, mask=whole < T, other=-1)  # the column's keys, if BLOCK reaches to T

    # Exactly `count` keys reach CHOSEN, so where nothing is to be rounded the loop does not turn.
    add = wanted > count
    low, count_low = tl.where(add, 0, CHOSEN), tl.where(add, T, count)
    high, count_high = tl.where(add, CHOSEN, NO_KEY), tl.where(add, count, 0)
    threshold, places = bisect(low, count_low, high, count_high, wanted, held, column_ptr, T, BLOCK, IN_REGISTERS)

    span = tl.arange(0, BLOCK_OUT)
    ties_before = 0
    for start in range(0, T, BLOCK_OUT):  # reads the column again: two scans need registers too
        token = start + span
        keys = tl.load(column_ptr + token, mask=token < T, other=-1)
        tied = (keys == threshold).to(tl.int32)
        kept = (keys > threshold) | ((tied > 0) & (ties_before + tl.cumsum(tied, 0) <= places))
        ranks = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(token_of_row_ptr + row + ranks, token, mask=kept)
        tl.store(column_ptr + token, tl.where(kept, row + ranks, -1), mask=token < T)
        blocks = start // BLOCK_T + tl.arange(0, BLOCK_OUT // BLOCK_T)
        kept_of_block = tl.sum(tl.reshape(kept.to(tl.int32), (BLOCK_OUT // BLOCK_T, BLOCK_T)), 1)
        tl.atomic_add(kept_ptr + blocks, kept_of_block, mask=blocks * BLOCK_T < T, sem="relaxed")
        row += tl.sum(kept.to(tl.int32), 0)
        ties_before += tl.sum(tied, 0)

    unused = tl.load(offsets_ptr + E) + expert * BLOCK_OUT
    for start in range(unused, C, E * BLOCK_OUT):  # token 0, so that a gather of all C rows is safe
        tl.store(token_of_row_ptr + start + span, tl.zeros((BLOCK_OUT,), tl.int32), mask=start + span < C)


@triton.jit
def list_entries_kernel(
    rows_ptr,  # (E, P) int32
    probs_ptr,  # (T, E) float32
    kept_ptr,  # (B,) int32
    first_ptr,  # (T + 1,) int32
    entry_rows_ptr,  # (C,) int32
    entry_scores_ptr,  # (C,) float32
    T, E, P, B,
    RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, E_POW2: tl.constexpr, B_POW2: tl.constexpr,
):
    """Each token's rows and scores, by expert. Grid (B,): a program owns BLOCK_T tokens; scores summed in float32."""
    block = tl.program_id(0)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, E_POW2)
    inside = (token < T)[:, None] & (expert < E)[None, :]
    rows = tl.load(rows_ptr + expert.to(tl.int64)[None, :] * P + token[:, None], mask=inside, other=-1)
    kept = (rows >= 0).to(tl.int32)
    blocks = tl.arange(0, B_POW2)
    before = tl.sum(tl.load(kept_ptr + blocks, mask=blocks < block, other=0), 0)
    kept_of_token = tl.sum(kept, 1)
    ends = before + tl.cumsum(kept_of_token, 0)
    entry = (ends - kept_of_token)[:, None] + tl.cumsum(kept, 1) - 1
    probs = tl.load(probs_ptr + token.to(tl.int64)[:, None] * E + expert[None, :], mask=rows >= 0, other=0.0)
    if RENORMALIZE:  # by at least the smallest normal number: scores that all underflowed stay 0, not NaN
        probs = probs / tl.maximum(tl.sum(probs, 1), 1.17549435e-38)[:, None]
    tl.store(first_ptr + 1 + token, ends, mask=token < T)
    if block == 0:
        tl.store(first_ptr, 0)
    tl.store(entry_rows_ptr + entry, rows, mask=rows >= 0)
    tl.store(entry_scores_ptr + entry, probs, mask=rows >= 0)


class Blocks(NamedTuple):
    """Block sizes and warps of the kernels above for one T and E."""

    tokens: int  # of a (tokens, experts) block
    warps: int
    column: int  # of an expert's column, to count in
    column_out: int  # and to write out
    column_warps: int
    in_registers: bool  # whether a column is read once for all counts


def choose_blocks(T: int, E: int) -> Blocks:
    """Blocks of 8192 scores where 16 to 64 tokens allow, 16 scores a thread; a column at 16 to 32 keys a thread."""
    e_pow2 = triton.next_power_of_2(E)
    tokens = min(64, max(16, 8192 // e_pow2))
    in_registers = T <= MOST_IN_REGISTERS
    column = max(128, triton.next_power_of_2(max(T, 1))) if in_registers else MOST_IN_REGISTERS // 2
    warps, column_warps = min(16, max(4, tokens * e_pow2 // 512)), min(32, max(4, column // 512))
    return Blocks(tokens, warps, column, min(column, WRITTEN_A_WARP * column_warps), column_warps, in_registers)


def round_tokens(probs_TE: torch.Tensor, expert_ids_TK: torch.Tensor, plan: Plan) -> Rounded:
    """Round the router's choice as planned. Nothing syncs; shapes depend on the plan alone.

    probs_TE (T, E) float32: each expert's score for each token, softmax over all experts, in [0, 2). expert_ids_TK
    (T, K) int32 or int64: the router's choice, no expert twice in a row. Both contiguous, on one device. Raises
    ValueError naming the tensor otherwise (values are not checked: that would sync).
    """
    T, K, E = plan.T, plan.K, plan.E
    for name, tensor, shape, dtypes in (("probs_TE", probs_TE, (T, E), (torch.float32,)),
                                        ("expert_ids_TK", expert_ids_TK, (T, K), (torch.int32, torch.int64))):
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}: the plan needs {shape} "
                             f"{' or '.join(str(dtype) for dtype in dtypes)}")
        if not tensor.is_contiguous() or tensor.device != probs_TE.device:
            raise ValueError(f"{name} on {tensor.device} has strides {tensor.stride()}: it must be contiguous "
                             f"and on {probs_TE.device}")

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=probs_TE.device)

    out = Rounded(integers(E), integers(E + 1), integers(plan.capacity), integers(T + 1), integers(plan.capacity),
                  torch.empty(plan.capacity, dtype=torch.float32, device=probs_TE.device))
    if T == 0:
        for tensor in out:
            tensor.zero_()
        return out
    blocks, e_pow2 = choose_blocks(T, E), triton.next_power_of_2(E)
    B, P = triton.cdiv(T, blocks.tokens), triton.cdiv(T, 16) * 16
    partials = min(B, MOST_PROGRAMS)
    keys_EP, partials_E, kept_B = integers(E, P), integers(partials, E), integers(B)
    rank_keys_kernel[(partials,)](probs_TE, expert_ids_TK, keys_EP, partials_E, kept_B, T, E, P, B, TOP_K=K,
                                  BLOCK_T=blocks.tokens, E_POW2=e_pow2, num_warps=blocks.warps)
    round_up_from = {"up": 1, "nearest": (plan.unit + 1) // 2}.get(plan.mode, plan.unit)
    round_counts_kernel[(1,)](partials_E, out.counts_E, out.offsets_E1, partials, T, E, round_up_from, UNIT=plan.unit,
                              BALANCE=plan.mode == "balance", BLOCK=max(1, 8192 // e_pow2), E_POW2=e_pow2, num_warps=8)
    select_rows_kernel[(E,)](keys_EP, out.counts_E, out.offsets_E1, out.token_of_row_C, kept_B, T, E, P, plan.capacity,
                             BLOCK_T=blocks.tokens, BLOCK=blocks.column, IN_REGISTERS=blocks.in_registers,
                             BLOCK_OUT=blocks.column_out, num_warps=blocks.column_warps)
    list_entries_kernel[(B,)](keys_EP, probs_TE, kept_B, out.first_of_token_T1, out.row_of_entry_C,
                              out.score_of_entry_C, T, E, P, B, RENORMALIZE=plan.renormalize, BLOCK_T=blocks.tokens,
                              E_POW2=e_pow2, B_POW2=triton.next_power_of_2(B), num_warps=blocks.warps)
    return out


@triton.jit
def combine_rounded_kernel(
    y_ptr,  # (C, D) the experts' output
    first_ptr,  # (T + 1,) int32
    entry_rows_ptr,  # (C,) int32
    entry_scores_ptr,  # (C,) float32
    out_ptr,  # (T, D) y's dtype
    D, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """out[t] = sum over its entries of score * y[row], in float32, one rounding.

    Grid (T, cdiv(D, BLOCK_D)): a program owns BLOCK_D columns of a token, and loads BLOCK_ROWS rows at once.
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(first_ptr + token + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(tl.load(first_ptr + token), end, BLOCK_ROWS):
        entry = start + tl.arange(0, BLOCK_ROWS)
        rows = tl.load(entry_rows_ptr + entry, mask=entry < end, other=0).to(tl.int64)  # C * D passes 2**31
        scores = tl.load(entry_scores_ptr + entry, mask=entry < end, other=0.0)
        inside = (entry < end)[:, None] & (column < D)[None, :]
        y = tl.load(y_ptr + rows[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(y * scores[:, None], 0)
    tl.store(out_ptr + token.to(tl.int64) * D + column, total, mask=column < D)


def combine_rounded(y_CD: torch.Tensor, rounded: Rounded, plan: Plan) -> torch.Tensor:
    """Each token's rows of y_CD (C, D), weighted and summed in float32 -> (T, D) in y's dtype; zeros for a token
    without rows. Rows past those in use are not read. Raises ValueError if y is not contiguous or not of C rows."""
    if y_CD.dim() != 2 or y_CD.shape[0] != plan.capacity or not y_CD.is_contiguous():
        raise ValueError(f"y_CD has shape {tuple(y_CD.shape)} and strides {y_CD.stride()}: the plan needs a "
                         f"contiguous ({plan.capacity}, D)")
    D = y_CD.shape[1]
    out_TD = torch.empty((plan.T, D), dtype=y_CD.dtype, device=y_CD.device)
    if plan.T > 0:
        block_D = min(1024, triton.next_power_of_2(D))
        combine_rounded_kernel[(plan.T, triton.cdiv(D, block_D))](
            y_CD, rounded.first_of_token_T1, rounded.row_of_entry_C, rounded.score_of_entry_C, out_TD, D,
            BLOCK_ROWS=min(8, triton.next_power_of_2(plan.K)), BLOCK_D=block_D, num_warps=4)
    return out_TD


def dense_scores(rounded: Rounded, plan: Plan) -> torch.Tensor:
    """The weights in force as (T, E) float32, 0 where an expert does not get a token: for oracles and studies."""
    rows_C = torch.arange(plan.capacity, device=rounded.offsets_E1.device)
    used_C = rows_C < rounded.offsets_E1[-1]
    # In the whole of offsets_E1: compiled, torch 2.11 searches a slice of it from the wrong start (pytorch #160964).
    expert_of_row_C = (torch.searchsorted(rounded.offsets_E1, rows_C, right=True) - 1).clamp_max(plan.E - 1)
    score_of_row_C = torch.zeros_like(rounded.score_of_entry_C)
    row_of_entry_C = torch.where(used_C, rounded.row_of_entry_C, rows_C)  # entries and rows in use are equally many
    score_of_row_C.scatter_(0, row_of_entry_C.long(), torch.where(used_C, rounded.score_of_entry_C, 0.0))
    dense_TE = torch.zeros(plan.T * plan.E, device=rows_C.device)
    dense_TE.index_add_(0, rounded.token_of_row_C * plan.E + expert_of_row_C, score_of_row_C)
    return dense_TE.view(plan.T, plan.E)


def report_rounding(rounded: Rounded, plan: Plan) -> RoundingReport:
    """What rounding did, by a dozen small PyTorch operations outside the layer's time; nothing syncs."""
    before_E, after_E = rounded.counts_E, rounded.offsets_E1.diff()
    dropped, added = (before_E - after_E).clamp_min(0).sum(), (after_E - before_E).clamp_min(0).sum()

    def utilisation(rows_E: torch.Tensor) -> torch.Tensor:
        tile_rows = ((rows_E + plan.tile - 1) // plan.tile * plan.tile).sum()
        return torch.where(tile_rows > 0, rows_E.sum() / tile_rows.clamp_min(1), 1.0)

    return RoundingReport(dropped, added, (dropped + added) / max(1, plan.T * plan.K), utilisation(before_E),
                          utilisation(after_E), (rounded.first_of_token_T1.diff() == 0).sum())


def describe(rounded: Rounded, plan: Plan) -> Rounding:
    """What a forward tells of a rounded routing to whoever judges it. Waits for the GPU."""
    report = {name: value.item() for name, value in report_rounding(rounded, plan)._asdict().items()}
    return Rounding(dense_scores(rounded, plan), plan.tile, plan.mode, report, KERNELS)
