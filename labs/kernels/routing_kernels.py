"""The kernels of routing.py: logits, top-k, counting sort, work list.

How    No sort. A token never picks one expert twice, so the rank of a slot (token, choice) among its expert's
       rows is the number of earlier *tokens* that picked the expert: a triangle of ones times the 0/1 matrix
       of choices, one exact tl.dot. The only atomics count arrivals, in the one launch: the last program to arrive
       does the rest, on the same numbers in the same order whichever program it is, so results repeat bit for bit.

       1 launch    route_and_place_kernel   all programs      logits of one token block over one part of D
                                            last of a block   adds the parts, picks experts, ranks in the block
                                            last of all       counts, offsets, rows, work list
       3 launches  logits_kernel            the first step, 64 or 128 tokens a program, by TMA
                   choose_kernel            the second
                   place_kernel             the third, one program a group of 128 or 256 tokens, each of which adds
                                            up what all blocks chose: cheaper than a launch for a scan
       2 launches  logits_and_choose_kernel both first steps without leaving registers, then place_kernel

       Behind another router, whose choice backward_sort.py sorts, work_kernel writes the work list alone.

routing.py says what each index array maps, and launches them.
"""

from __future__ import annotations

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter where there is no GPU)

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# T tokens, D model width, E experts, K top-k, R = T*K routed rows, W entries of the work list.

TAKEN = tl.constexpr(-(2**31))  # below the key of every number


@triton.jit
def sortable(bits):
    """Float32 bits to int32 keys in the same order, and back: the map is its own inverse.

    Integers order totally, so NaN logits still pick K distinct experts and corrupt no index.
    """
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def partial_logits(
    x_ptr,  # (T, D)
    router_ptr,  # (E, D)
    t, e, first_d, end_d, T, D, E,
    BLOCK_D: tl.constexpr,
):
    """x[t, first_d:end_d] @ router[e, first_d:end_d].T, accumulated in float32."""
    logits = tl.zeros([t.shape[0], e.shape[0]], tl.float32)
    for start in tl.range(first_d, end_d, BLOCK_D, num_stages=3):
        d = start + tl.arange(0, BLOCK_D)
        inside = (d < end_d)[None, :]
        x = tl.load(x_ptr + t.to(tl.int64)[:, None] * D + d[None, :], mask=(t < T)[:, None] & inside, other=0.0)
        router = tl.load(router_ptr + e[:, None] * D + d[None, :], mask=(e < E)[:, None] & inside, other=0.0)
        logits = tl.dot(x, router.T, logits, input_precision="ieee")
    return logits


@triton.jit
def pick(
    keys,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
):
    """The TOP_K greatest keys of each row, greatest first, ties to the lower expert.

    Returns expert_ids and their keys (BLOCK_T, TOP_K_POW2), valid in the first TOP_K columns, and of each row the last
    one's key and expert. A round looks at the greater key of each two neighbours, which then gives way to the other:
    for 128 experts 295 instructions a round, where a look at all keys takes 369 (LOG.md, row 48).
    """
    BLOCK_T: tl.constexpr = keys.shape[0]
    HALF: tl.constexpr = keys.shape[1] // 2
    even, odd = tl.split(tl.reshape(keys, [BLOCK_T, HALF, 2]))  # neighbours lie in one thread
    even_e = 2 * tl.arange(0, HALF)[None, :]
    high = tl.maximum(even, odd)
    low = tl.minimum(even, odd)
    high_e = tl.where(odd > even, even_e + 1, even_e)
    k = tl.arange(0, TOP_K_POW2)
    expert_ids = tl.zeros([BLOCK_T, TOP_K_POW2], tl.int32)
    chosen_keys = tl.zeros([BLOCK_T, TOP_K_POW2], tl.int32)
    best = tl.zeros([BLOCK_T], tl.int32)
    winner = tl.zeros([BLOCK_T], tl.int32)
    for i in tl.range(TOP_K):
        best = tl.max(high, 1)
        winner = tl.min(tl.where(high == best[:, None], high_e, keys.shape[1]), 1)
        expert_ids = tl.where(k[None, :] == i, winner[:, None], expert_ids)
        chosen_keys = tl.where(k[None, :] == i, best[:, None], chosen_keys)
        won = high_e == winner[:, None]
        left = tl.where(won, TAKEN, high)
        high_e = tl.where(won, (winner ^ 1)[:, None], high_e)
        high = tl.maximum(left, low)
        low = tl.minimum(left, low)
    return expert_ids, chosen_keys, best, winner


@triton.jit
def choose_experts(
    logits, t, e, T, E,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EVEN_E: tl.constexpr,
):
    """Top-k of each token, its scores, and each slot's rank among its expert's rows in this block.

    Returns expert_ids, scores, ranks (BLOCK_T, TOP_K_POW2), valid in the first TOP_K columns, and how many of the
    block's tokens up to each one chose each expert, (BLOCK_T, BLOCK_E) float32. EVEN_E: E is BLOCK_E. No expert is
    padding then.
    """
    BLOCK_T: tl.constexpr = t.shape[0]
    BLOCK_E: tl.constexpr = e.shape[0]
    keys = sortable((logits + 0.0).to(tl.int32, bitcast=True))  # + 0.0: -0.0 ties with 0.0
    if not EVEN_E:
        keys = tl.where((e < E)[None, :], keys, TAKEN)
        logits = tl.where((e < E)[None, :], logits, float("-inf"))
    expert_ids, chosen_keys, last_key, last_expert = pick(keys, TOP_K, TOP_K_POW2)
    chosen_logits = sortable(chosen_keys).to(tl.float32, bitcast=True)
    k = tl.arange(0, TOP_K_POW2)[None, :]
    top_logit = tl.max(tl.where(k == 0, chosen_logits, float("-inf")), 1)[:, None]
    scores = tl.where(k < TOP_K, tl.exp(chosen_logits - top_logit), 0.0)
    total = tl.sum(scores if RENORMALIZE else tl.exp(logits - top_logit), 1)
    scores = scores / total[:, None]

    chosen = (keys > last_key[:, None]) | ((keys == last_key[:, None]) & (e[None, :] <= last_expert[:, None]))
    chosen = chosen & (t < T)[:, None]
    i = tl.arange(0, BLOCK_T)
    up_to = tl.where(i[None, :] <= i[:, None], 1.0, 0.0).to(tl.float16)
    chosen_up_to = tl.dot(up_to, tl.where(chosen, 1.0, 0.0).to(tl.float16))  # exact: at most BLOCK_T
    # Of a flat array tl.gather goes through shared memory. Along an axis that lies in one warp it takes shuffles and
    # selects, for 64 tokens and 128 experts 1300 instructions a warp in place of a hundred.
    flat = tl.reshape(chosen_up_to, [BLOCK_T * BLOCK_E])
    places = tl.reshape(i[:, None] * BLOCK_E + expert_ids, [BLOCK_T * TOP_K_POW2])
    ranks = tl.reshape(tl.gather(flat, places, 0), [BLOCK_T, TOP_K_POW2]).to(tl.int32) - 1
    return expert_ids, scores, ranks, chosen_up_to


@triton.jit
def store_choice(
    expert_ids, scores, ranks, t,
    expert_ids_ptr,  # (T, K)
    scores_ptr,  # (T, K)
    ranks_ptr,  # (T, K)
    T,
    TOP_K: tl.constexpr,
):
    """Store the first TOP_K columns of the tokens that exist."""
    k = tl.arange(0, expert_ids.shape[1])
    slots = t[:, None] * TOP_K + k[None, :]
    valid = (t < T)[:, None] & (k < TOP_K)[None, :]
    tl.store(expert_ids_ptr + slots, expert_ids, mask=valid)
    tl.store(scores_ptr + slots, scores, mask=valid)
    tl.store(ranks_ptr + slots, ranks, mask=valid)


@triton.jit
def load_slots(
    first_block,
    expert_ids_ptr,  # (T, K)
    ranks_ptr,  # (T, K)
    T,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """What BLOCKS token blocks chose: slots, whether they exist, block, expert, rank."""
    i = tl.arange(0, BLOCKS * BLOCK_T * TOP_K_POW2)
    slots = first_block * BLOCK_T * TOP_K + i
    exist = (i < BLOCKS * BLOCK_T * TOP_K) & (slots < T * TOP_K)
    # .cg: from L2, where the other programs' stores are.
    expert = tl.load(expert_ids_ptr + slots, mask=exist, other=0, cache_modifier=".cg")
    rank = tl.load(ranks_ptr + slots, mask=exist, other=0, cache_modifier=".cg")
    block = tl.where(exist, i // (BLOCK_T * TOP_K), 0)
    return slots, exist, block, expert, rank


@triton.jit
def sum_counts(
    num_blocks, first_block,
    counts_ptr,  # (num_blocks, BLOCK_E)
    BLOCKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows of each expert, int32: in all token blocks, (BLOCK_E,), and in column j < BLOCKS of (BLOCK_E, N) those in
    the blocks before first_block + j. Its last column is all of them again; N is the power of 2 with room for it.

    A product of the counts with ones and zeros, exact: in float16 they are at most BLOCK_T, in float32 their sums below
    2**24. From L2, as load_slots.
    """
    N: tl.constexpr = max(16, triton.next_power_of_2(BLOCKS + 1))
    e = tl.arange(0, BLOCK_E)
    j = tl.arange(0, N)
    end = tl.where(j == N - 1, num_blocks, first_block + j)
    rows = tl.zeros([BLOCK_E, N], tl.float32)
    for start in tl.range(0, num_blocks, CHUNK, num_stages=2):
        b = start + tl.arange(0, CHUNK)
        counts = tl.load(counts_ptr + b[:, None] * BLOCK_E + e[None, :], mask=(b < num_blocks)[:, None], other=0.0,
                         cache_modifier=".cg")
        rows = tl.dot(counts.T, tl.where(b[:, None] < end[None, :], 1.0, 0.0).to(tl.float16), rows)
    rows = rows.to(tl.int32)
    return tl.sum(tl.where((j == N - 1)[None, :], rows, 0), 1), rows


@triton.jit
def store_rows(
    first_row, rows_before, slots, exist, block, expert, rank,
    row_of_slot_ptr,  # (T, K)
    token_of_row_ptr,  # (R,)
    TOP_K: tl.constexpr,
):
    """Sorted row of each slot: its expert's first row, plus the expert's rows in the blocks before, plus its rank."""
    BLOCK_E: tl.constexpr = rows_before.shape[0]
    N: tl.constexpr = rows_before.shape[1]
    first = tl.reshape(first_row[:, None] + rows_before, [BLOCK_E * N])
    row = rank + tl.gather(first, expert * N + block, 0)
    tl.store(row_of_slot_ptr + slots, row, mask=exist)
    tl.store(token_of_row_ptr + row, slots // TOP_K, mask=exist)


@triton.jit
def store_offsets(
    offsets_ptr,  # (E + 1,)
    e, first_row, counts, E,
):
    """Each expert's first row, and the last one's end."""
    tl.store(offsets_ptr + e, first_row, mask=e < E)
    tl.store(offsets_ptr + e + 1, first_row + counts, mask=e == E - 1)


@triton.jit
def store_work(
    work_ptr,  # (W, 4)
    W, e, first_row, counts, first, step,
    ROW_TILE: tl.constexpr,
):
    """Work list entries of the row tiles first, first + step, ... of every expert; by program 0 also their number.
    Nothing where ROW_TILE is 0.

    Experts in order. The m-th tile of an expert starts at its first row + m * ROW_TILE.
    """
    if ROW_TILE > 0:
        tiles = (counts + (ROW_TILE - 1)) // ROW_TILE
        first_tile = tl.cumsum(tiles, 0) - tiles
        for m in tl.range(first, tl.max(tiles, 0), step):
            entry = work_ptr + (first_tile + m) * 4
            tl.store(entry, e, mask=m < tiles)
            tl.store(entry + 1, first_row, mask=m < tiles)
            tl.store(entry + 2, first_row + counts, mask=m < tiles)
            tl.store(entry + 3, first_tile, mask=m < tiles)
        if first == 0:
            tl.store(work_ptr + (W - 1) * 4, tl.sum(tiles, 0))


@triton.jit
def work_kernel(
    offsets_ptr,  # (E + 1,) int32
    work_ptr,  # (W, 4) int32
    E, W,
    ROW_TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """The work list of rows that were sorted elsewhere. Int32 throughout.

    Grid (programs,): program p owns the row tiles p, p + programs, ... of every expert.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    e = tl.arange(0, BLOCK_E)
    first_row = tl.load(offsets_ptr + e, mask=e < E, other=0)
    end_row = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    store_work(work_ptr, W, e, first_row, end_row - first_row, tl.program_id(0), tl.num_programs(0), ROW_TILE)


@triton.jit
def last_to_arrive(counter_ptr, expected):
    """True in the program that arrives last; everything the others wrote before is visible there.

    The barrier puts all of a program's stores before its one atomic. The last one resets the counter.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def finish_block(
    logits, block, t, e,
    counts_ptr,  # (blocks, BLOCK_E)
    expert_ids_ptr,  # (T, K)
    scores_ptr,  # (T, K)
    ranks_ptr,  # (T, K)
    T, E,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EVEN_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Choice of one token block, and how many of its tokens chose each expert, stored.

    Lets place_kernel start, which must not be early: the first SMs with room would take all of its programs.
    """
    expert_ids, scores, ranks, chosen_up_to = choose_experts(logits, t, e, T, E, TOP_K, TOP_K_POW2, RENORMALIZE,
                                                             EVEN_E)
    if PDL:
        gdc_launch_dependents()
    store_choice(expert_ids, scores, ranks, t, expert_ids_ptr, scores_ptr, ranks_ptr, T, TOP_K)
    # The last token's, from where they lie: in a row of their own first, they would go through shared memory.
    BLOCK_T: tl.constexpr = t.shape[0]
    BLOCK_E: tl.constexpr = e.shape[0]
    count_ptrs = tl.broadcast_to((counts_ptr + block * BLOCK_E + e)[None, :], [BLOCK_T, BLOCK_E])
    tl.store(count_ptrs, chosen_up_to, mask=(tl.arange(0, BLOCK_T) == BLOCK_T - 1)[:, None])


@triton.jit(do_not_specialize=["T", "E", "W"])
def route_and_place_kernel(
    x_ptr,  # (T, D)
    router_ptr,  # (E, D)
    partials_ptr,  # (SPLITS, NUM_BLOCKS * BLOCK_T, BLOCK_E) float32, scratch
    arrivals_ptr,  # (NUM_BLOCKS + 1,) int32, zero before and after
    counts_ptr,  # (NUM_BLOCKS, BLOCK_E) float16, scratch
    expert_ids_ptr,  # (T, K) int32
    scores_ptr,  # (T, K) float32
    row_of_slot_ptr,  # (T, K) int32
    token_of_row_ptr,  # (R,) int32
    offsets_ptr,  # (E + 1,) int32
    work_ptr,  # (W, 4) int32
    T, D, E, W, split_D,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    NUM_BLOCKS_POW2: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Everything in one launch, for T <= NUM_BLOCKS * BLOCK_T. Float32 accumulator (BLOCK_T, BLOCK_E).

    Grid (NUM_BLOCKS, SPLITS): a program owns the logits of BLOCK_T tokens over split_D columns of D.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    end_d = tl.minimum(D, (split + 1) * split_D)
    logits = partial_logits(x_ptr, router_ptr, t, e, split * split_D, end_d, T, D, E, BLOCK_D)
    part_ptrs = partials_ptr + t[:, None] * BLOCK_E + e[None, :]
    part_stride = NUM_BLOCKS * BLOCK_T * BLOCK_E
    tl.store(part_ptrs + split * part_stride, logits)
    if PDL:
        gdc_launch_dependents()
    if last_to_arrive(arrivals_ptr + block, SPLITS):
        logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        for s in tl.static_range(SPLITS):
            logits += tl.load(part_ptrs + s * part_stride, cache_modifier=".cg")
        # Never EVEN_E: without the mask ptxas has the parts of 512 experts in registers at once, and spills.
        expert_ids, scores, ranks, chosen_up_to = choose_experts(logits, t, e, T, E, TOP_K, TOP_K_POW2, RENORMALIZE,
                                                                 False)
        counts = tl.gather(tl.reshape(chosen_up_to, [BLOCK_T * BLOCK_E]), (BLOCK_T - 1) * BLOCK_E + e, 0).to(tl.int32)
        if NUM_BLOCKS == 1:
            first_row = tl.cumsum(counts, 0) - counts
            slots = tl.reshape(expert_ids, [BLOCK_T * TOP_K_POW2])
            rows = tl.reshape(tl.gather(first_row, slots, 0), [BLOCK_T, TOP_K_POW2]) + ranks
            store_choice(expert_ids, scores, rows, t, expert_ids_ptr, scores_ptr, row_of_slot_ptr, T, TOP_K)
            valid = (t < T)[:, None] & (tl.arange(0, TOP_K_POW2) < TOP_K)[None, :]
            tl.store(token_of_row_ptr + rows, tl.zeros_like(rows) + t[:, None], mask=valid)
            store_offsets(offsets_ptr, e, first_row, counts, E)
            store_work(work_ptr, W, e, first_row, counts, 0, 1, ROW_TILE)
        else:
            store_choice(expert_ids, scores, ranks, t, expert_ids_ptr, scores_ptr, row_of_slot_ptr, T, TOP_K)
            tl.store(counts_ptr + block * BLOCK_E + e, counts.to(tl.float16))
            if last_to_arrive(arrivals_ptr + NUM_BLOCKS, NUM_BLOCKS):
                slots, exist, b, expert, rank = load_slots(0, expert_ids_ptr, row_of_slot_ptr, T, TOP_K, TOP_K_POW2,
                                                           NUM_BLOCKS_POW2, BLOCK_T)
                total, rows_before = sum_counts(NUM_BLOCKS, 0, counts_ptr, NUM_BLOCKS, BLOCK_E, 16)
                first_row = tl.cumsum(total, 0) - total
                store_rows(first_row, rows_before, slots, exist, b, expert, rank, row_of_slot_ptr, token_of_row_ptr,
                           TOP_K)
                store_offsets(offsets_ptr, e, first_row, total, E)
                store_work(work_ptr, W, e, first_row, total, 0, 1, ROW_TILE)


@triton.jit(do_not_specialize=["T"])
def logits_kernel(
    x_desc,  # (T, D), box (BLOCK_T, BLOCK_D)
    router_desc,  # (E, D), box (BLOCK_E, BLOCK_D)
    partials_ptr,  # (splits, T, E_PAD) float32
    T, D, split_D,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Partial logits over split_D columns of D, a multiple of BLOCK_D. Float32 accumulator (BLOCK_T, BLOCK_E).

    Grid (token blocks, E_PAD / BLOCK_E, splits).
    """
    if PDL:
        gdc_launch_dependents()
    first_t = tl.program_id(0) * BLOCK_T
    first_e = tl.program_id(1) * BLOCK_E
    first_d = tl.program_id(2) * split_D
    logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for d in tl.range(first_d, tl.minimum(D, first_d + split_D), BLOCK_D, num_stages=STAGES):
        x = x_desc.load([first_t, d])
        router = router_desc.load([first_e, d])
        logits = tl.dot(x, router.T, logits, input_precision="ieee")
    t = first_t + tl.arange(0, BLOCK_T)
    e = first_e + tl.arange(0, BLOCK_E)
    row = tl.program_id(2).to(tl.int64) * T + t
    tl.store(partials_ptr + row[:, None] * E_PAD + e[None, :], logits, mask=(t < T)[:, None])


@triton.jit(do_not_specialize=["T", "E"])
def choose_kernel(
    partials_ptr,  # (SPLITS, T, BLOCK_E) float32
    counts_ptr,  # (blocks, BLOCK_E) float16: rows of each expert in each token block
    expert_ids_ptr,  # (T, K) int32
    scores_ptr,  # (T, K) float32
    ranks_ptr,  # (T, K) int32: rank of the slot among its expert's rows in its block
    T, E,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EVEN_E: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sum of the partial logits in float32, then finish_block. Grid (token blocks,): a program owns BLOCK_T tokens."""
    if PDL:
        gdc_wait()
    block = tl.program_id(0)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for s in tl.static_range(SPLITS):
        row = t.to(tl.int64) + s * T.to(tl.int64)
        logits += tl.load(partials_ptr + row[:, None] * BLOCK_E + e[None, :], mask=(t < T)[:, None], other=0.0)
    finish_block(logits, block, t, e, counts_ptr, expert_ids_ptr, scores_ptr, ranks_ptr, T, E, TOP_K,
                 TOP_K_POW2, RENORMALIZE, EVEN_E, PDL)


@triton.jit(do_not_specialize=["T", "E"])
def logits_and_choose_kernel(
    x_desc,  # (T, D), box (BLOCK_T, BLOCK_D)
    router_desc,  # (E, D), box (BLOCK_E, BLOCK_D)
    counts_ptr,  # (blocks, BLOCK_E) float16
    expert_ids_ptr,  # (T, K) int32
    scores_ptr,  # (T, K) float32
    ranks_ptr,  # (T, K) int32
    T, D, E,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EVEN_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Logits that never leave the registers, then finish_block. Float32 accumulator (BLOCK_T, BLOCK_E).

    Grid (token blocks,): a program owns BLOCK_T tokens. With a warp for every 16 of them, a token's logits
    lie in four threads of one warp and no reduction over experts crosses warps.
    """
    block = tl.program_id(0)
    logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        x = x_desc.load([block * BLOCK_T, d])
        router = router_desc.load([0, d])
        logits = tl.dot(x, router.T, logits, input_precision="ieee")
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    finish_block(logits, block, t, e, counts_ptr, expert_ids_ptr, scores_ptr, ranks_ptr, T, E, TOP_K,
                 TOP_K_POW2, RENORMALIZE, EVEN_E, PDL)


@triton.jit(do_not_specialize=["T", "E", "W", "num_blocks"])
def place_kernel(
    counts_ptr,  # (num_blocks, BLOCK_E) float16
    expert_ids_ptr,  # (T, K) int32
    row_of_slot_ptr,  # (T, K) int32: ranks within the block on entry, sorted rows on exit
    token_of_row_ptr,  # (R,) int32
    offsets_ptr,  # (E + 1,) int32
    work_ptr,  # (W, 4) int32
    T, E, W, num_blocks,
    TOP_K: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    ROW_TILE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sorted rows of GROUP token blocks, and a share of the work list. Indices are int32.

    Grid (groups,): a program owns one group, and adds up the counts of all blocks for itself, CHUNK at a time.
    Program 0 also writes the offsets.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    group = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    slots, exist, b, expert, rank = load_slots(group * GROUP, expert_ids_ptr, row_of_slot_ptr, T, TOP_K, TOP_K_POW2,
                                               GROUP, BLOCK_T)
    total, rows_before = sum_counts(num_blocks, group * GROUP, counts_ptr, GROUP, BLOCK_E, CHUNK)
    first_row = tl.cumsum(total, 0) - total
    store_rows(first_row, rows_before, slots, exist, b, expert, rank, row_of_slot_ptr, token_of_row_ptr, TOP_K)
    if group == 0:
        store_offsets(offsets_ptr, e, first_row, total, E)
    store_work(work_ptr, W, e, first_row, total, group, tl.num_programs(0), ROW_TILE)
