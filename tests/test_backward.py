"""The experts that train: every gradient against the float64 oracle's autograd, what is kept, and what may wrap them.

python -m pytest tests/test_backward.py
"""

from __future__ import annotations

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter before anything imports triton)

import functools
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from common.config import Workload
from common.measure import relative_error
from common.model import make_inputs, make_weights, route_float64
from labs.kernels import backward, backward_gemm, backward_loop, backward_sort, down_combine
from labs.kernels.rounding import dense_scores, plan_rounding, round_tokens
from tests.cases import CASES, Case
from tests.machine_code import Request, compile_all

GPU = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float16, torch.float32]
GRADS = ("x_TD", "router_ED", "gate_up_E2FD", "down_EDF")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of them, so that each has several tiles; and the interpreter runs one after the other."""
    for module in (backward_loop, backward_gemm, backward):
        monkeypatch.setattr(module, "sm_count", lambda device: 5)
    monkeypatch.setattr(backward_gemm, "LEAST_OPERATIONS", 0)  # or no case here had enough to do for warp roles


def bound(dtype: torch.dtype) -> float:
    """Largest relative error of a gradient that rounding alone may cause: a value is rounded to the dtype some ten
    times on its way forward and back, a third of an eps each, half of them in sums of many; measured, under 1 eps."""
    return 2 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps


class Problem:
    """One case's inputs, a gradient for its output, and the float64 oracle's output and gradients."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, mode: str = "exact", tile: int = 16):
        self.cfg, self.case = case.config, case
        weights = make_weights(self.cfg, dtype, device)
        x_TD = make_inputs(Workload(self.cfg, max(case.T, 1), dtype, case.routing), weights)[:case.T]
        self.leaves = {"x_TD": x_TD, "router_ED": weights.router_ED, "gate_up_E2FD": weights.gate_up_E2FD,
                       "down_EDF": weights.down_EDF}
        self.grad_TD = torch.randn(case.T, case.D, generator=torch.Generator(device).manual_seed(7), device=device)
        self.grad_TD = self.grad_TD.to(dtype)
        _, self.expert_ids_TK, _ = route_float64(self.cfg, weights.router_ED, x_TD)
        self.plan = self.rounded = None
        if mode != "exact":
            self.plan = plan_rounding(self.cfg, case.T, tile, mode, least_tiles=0)
            probs_TE = (x_TD.float() @ weights.router_ED.float().T).softmax(1)
            self.rounded = round_tokens(probs_TE, self.expert_ids_TK, self.plan)
        leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in self.leaves.items()}
        out_TD = self.oracle(leaves)
        out_TD.backward(self.grad_TD.double())
        self.expected = {"out_TD": out_TD.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}

    def oracle(self, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        """The layer in float64 over the chosen experts, dense in the experts."""
        cfg, x_TD = self.cfg, leaves["x_TD"]
        scores_TE = self.dense(x_TD @ leaves["router_ED"].T)
        out_TD = torch.zeros_like(x_TD)
        for e in range(cfg.E):
            gate, up = (x_TD @ leaves["gate_up_E2FD"][e].T).chunk(2, dim=1)
            y_TD = (torch.nn.functional.silu(gate) * up) @ leaves["down_EDF"][e].T
            out_TD = out_TD + scores_TE[:, e, None] * y_TD
        return out_TD

    def dense(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """Scores of the chosen experts, zeros elsewhere, from the router's logits."""
        if self.rounded is None:
            chosen_TE = torch.zeros_like(logits_TE).scatter(1, self.expert_ids_TK, 1.0)
        else:
            chosen_TE = (dense_scores(self.rounded, self.plan) > 0).to(logits_TE.dtype)
        scores_TE = logits_TE.softmax(1) * chosen_TE
        if self.cfg.renormalize or self.cfg.scoring == "topk_softmax":
            scores_TE = scores_TE / scores_TE.sum(1, keepdim=True).clamp_min(1e-300)
        return scores_TE

    def run(self, module=backward, **options) -> dict[str, torch.Tensor]:
        """Output and gradients of the kernels."""
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in self.leaves.items()}
        out_TD = layer(self, leaves, module, **options)
        out_TD.backward(self.grad_TD)
        return {"out_TD": out_TD.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}

    def errors(self, found: dict[str, torch.Tensor]) -> dict[str, float]:
        """Relative error of the output and of each gradient; infinite where something is missing or not finite."""
        errors = {}
        for name, expected in self.expected.items():
            got = found[name]
            scale = expected.norm()
            if got is None or got.shape != expected.shape or not got.isfinite().all():
                errors[name] = float("inf")
            elif scale < 1e-9 * max(1, expected.numel()) ** 0.5:  # K = 1 renormalised: the router has no gradient
                errors[name] = 0.0 if got.norm() < 1e-2 else float("inf")
            else:
                errors[name] = relative_error(got, expected)
        return errors


def layer(problem: Problem, leaves: dict[str, torch.Tensor], module=backward, **options) -> torch.Tensor:
    """The layer as a model would write it: the router in PyTorch, the experts by the kernels."""
    x_TD, cfg = leaves["x_TD"], problem.cfg
    probs_TE = (x_TD.float() @ leaves["router_ED"].float().T).softmax(1)
    weights = leaves["gate_up_E2FD"], leaves["down_EDF"]
    if problem.rounded is not None:
        scores_C = module.rounded_scores(probs_TE, problem.rounded, problem.plan)
        return module.moe_experts_rounded(x_TD, *weights, scores_C, problem.rounded, problem.plan, **options)
    scores_TK = probs_TE.gather(1, problem.expert_ids_TK)
    if cfg.renormalize or cfg.scoring == "topk_softmax":
        scores_TK = scores_TK / scores_TK.sum(1, keepdim=True)
    return module.moe_experts(x_TD, *weights, scores_TK, problem.expert_ids_TK, **options)


def assert_right(problem: Problem, found: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    errors = problem.errors(found)
    assert all(error <= bound(dtype) for error in errors.values()), errors


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_the_oracles(case, dtype, device):
    problem = Problem(case, dtype, device)
    assert_right(problem, problem.run(), dtype)


MODES = ("nearest", "up", "down", "balance")
# Every case in every mode on a GPU; in the interpreter, which is slow, each case in one mode, each mode in several.
ROUNDED = [(case, mode) for i, case in enumerate(CASES) for j, mode in enumerate(MODES)
           if torch.cuda.is_available() or i % len(MODES) == j]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("case", "mode"), ROUNDED, ids=lambda value: str(value))
def test_gradients_of_a_rounded_routing_are_the_oracles(case, mode, device):
    dtype = DTYPES[0]
    problem = Problem(case, dtype, device, mode, tile=8)
    assert_right(problem, problem.run(), dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", ["exact", "nearest"])
@pytest.mark.parametrize("beside", [False, True], ids=["sum after", "sum beside"])
@pytest.mark.parametrize("routing", ["natural", "uniform", "skewed", "one_hot", "sparse"])
def test_gradients_at_real_tiles(routing, beside, mode, monkeypatch, device):
    """The sizes at which level 8's forward is tested: experts of several tiles, none of them whole. Top-k's sum beside
    the down projection or after it."""
    least = 0 if beside else 2**30
    monkeypatch.setattr(down_combine, "LEAST_ROWS", least)
    monkeypatch.setattr(down_combine, "LEAST_MEAN_ROWS", least)
    case = Case("real", T=777, D=520, F=392, E=16, K=4, routing=routing)
    problem = Problem(case, DTYPES[0], device, mode, tile=64)
    assert_right(problem, problem.run(), DTYPES[0])


@pytest.mark.gpu
def test_an_expert_that_is_no_number_stays_alone(device):
    """Inner dimensions that fill no step: what lies past them is the next expert's, and 0 times NaN is NaN.

    The weights' gradients are left out: their inner dimension is the rows, and its last step has the next expert's.
    """
    problem = Problem(Case("odd", T=300, D=264, F=200, E=4, K=1), torch.bfloat16, device)
    problem.leaves["gate_up_E2FD"][2] = problem.leaves["down_EDF"][2] = torch.nan
    found = problem.run()
    others = (problem.expert_ids_TK != 2).all(1)
    assert 0 < others.sum() < 300
    assert found["out_TD"][others].isfinite().all()
    scores_TK = torch.ones(300, 1, device=device)
    x_TD = problem.leaves["x_TD"].detach().clone().requires_grad_()
    weights = problem.leaves["gate_up_E2FD"], problem.leaves["down_EDF"]
    backward.moe_experts(x_TD, *weights, scores_TK, problem.expert_ids_TK).backward(problem.grad_TD)
    assert x_TD.grad[others].isfinite().all()


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("T", "E", "K"), [(1, 1, 1), (5, 3, 3), (129, 7, 2), (300, 130, 3), (700, 20, 4), (0, 4, 2)])
def test_the_counting_sort_is_a_stable_sort(T, E, K, ids_dtype, device):
    """Also where a token names an expert twice."""
    ids_TK = torch.randint(0, E, (T, K), generator=torch.Generator(device).manual_seed(0), device=device)
    offsets_E1, token_of_row_R, row_of_slot_TK = backward.sort_rows(ids_TK.to(ids_dtype), E)
    sorted_ids_R, slot_of_row_R = ids_TK.flatten().sort(stable=True)
    assert torch.equal(token_of_row_R, (slot_of_row_R // K).int())
    assert torch.equal(row_of_slot_TK.flatten(), slot_of_row_R.argsort().int())
    assert torch.equal(offsets_E1[1:], torch.bincount(sorted_ids_R, minlength=E).cumsum(0).int())
    assert offsets_E1[0] == 0


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", ["exact", "nearest"])
@pytest.mark.parametrize("copied", [False, True], ids=["gathered", "copied"])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[9]], ids=str)
def test_gradients_by_tma_are_the_oracles(case, copied, mode, monkeypatch, device):
    """The paths of Hopper's tile, where the interpreter would take others: descriptors, and rows copied before."""
    dtype = DTYPES[0]
    monkeypatch.setattr(backward_loop, "SMALL", backward_loop.SMALL._replace(tma=True))
    monkeypatch.setattr(backward_gemm, "COPY_FROM", 0 if copied else 2**30)
    problem = Problem(case, dtype, device, mode, tile=8)
    assert_right(problem, problem.run(), dtype)


@pytest.mark.parametrize("case", [Case("no tokens", T=0, D=32, F=16, E=4, K=2)], ids=str)
def test_no_tokens_give_zeros(case, device):
    found = Problem(case, DTYPES[0], device).run()
    assert found["out_TD"].shape == found["x_TD"].shape == (0, 32)
    assert not any(found[name].any() for name in GRADS[1:])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", ["exact", "down"])
def test_an_expert_without_rows_gets_exact_zeros(mode, device):
    problem = Problem(Case("empty experts", T=40, D=32, F=16, E=16, K=2, routing="sparse"), DTYPES[0], device, mode, 8)
    found = problem.run()
    counts_E = torch.bincount(problem.expert_ids_TK.flatten(), minlength=16)
    if problem.rounded is not None:
        counts_E = problem.rounded.offsets_E1.diff()
    assert (counts_E == 0).any()
    for name in ("gate_up_E2FD", "down_EDF"):
        assert not found[name][counts_E == 0].any()
        assert found[name][counts_E > 0].flatten(1).any(1).all()


@pytest.mark.parametrize("mode", ["exact", "nearest"])
def test_two_runs_agree_bit_for_bit(mode, device):
    problem = Problem(Case("skewed", T=60, D=72, F=40, E=8, K=3, routing="skewed"), DTYPES[0], device, mode)
    first, second = problem.run(), problem.run()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- planted faults ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """In labs/kernels/backward`file`.py, `right` becomes `wrong`; `why` is the mistake."""

    why: str
    file: str
    right: str
    wrong: str

    def __str__(self) -> str:
        return self.why.replace(" ", "_")


FAULTS = (
    Fault("score forgotten in dA", "_gemm", "    d_hidden = d_hidden * score[:, None]\n", ""),
    Fault("score forgotten in the activation for dW2", "_gemm", "hidden * score[:, None], row", "hidden, row"),
    Fault("dS of the first column tile alone", "_weights", "range(X)", "range(1)"),
    Fault("dS in one column tile's place", "_gemm", "column_tile.to(tl.int64) * R", "column_tile.to(tl.int64) * 0"),
    Fault("dS of one half of a tile", "_gemm", "d_score += swiglu", "d_score = swiglu"),
    Fault("dS by row, not by entry", "_weights",
          "row = tl.load(row_of_entry_ptr + entry, mask=used, other=0).to(tl.int64)", "row = entry.to(tl.int64)"),
    Fault("gate and up swapped in dSwiGLU", "_gemm", "d_hidden * up * (sigmoid + silu * (1 - sigmoid))",
          "d_hidden * gate * (sigmoid + silu * (1 - sigmoid))"),
    Fault("SiLU's second term forgotten", "_gemm", "(sigmoid + silu * (1 - sigmoid))", "sigmoid"),
    Fault("gate and up exchanged in H", "_gemm", "gates, ups = halves(acc)", "ups, gates = halves(acc)"),
    Fault("tokens of the step before", "_weights", "        token = next_token\n", ""),
    Fault("rows past the end multiplied", "_weights", "exists = (first_row + i < row_end)", "exists = (i < BLOCK_K)"),
    Fault("a step too few for ragged experts", "_weights", "tl.cdiv(rows, BLOCK_K)", "rows // BLOCK_K"),
    Fault("accumulator kept from tile to tile", "_weights",
          "            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)\n        tile", "        tile"),
    Fault("weights of the first expert in dX", "_loop", "row = expert.to(tl.int64) * K + depth",
          "row = expert.to(tl.int64) * 0 + depth"),
    Fault("dW1 not transposed", "", "dh_R2F, offsets_E1, out, tile, transposed=True",
          "dh_R2F, offsets_E1, out.view(-1, *out.shape[:0:-1]), tile, transposed=False"),
    Fault("dX scaled", "", "ones = torch.ones(", "ones = torch.full(fill_value=0.5, size="),
    Fault("halves of a weight tile exchanged", "_weights", "halves(acc)[part]", "halves(acc)[1 - part]"),
)


def planted(fault: Fault, folder: Path):
    """backward.py with the fault in it or in a file below it, loaded from copies whose operators have other names."""
    copies = {}
    for part in ("_loop", "_gemm", "_weights", "_sort", ""):
        source = (Path(backward.__file__).parent / f"backward{part}.py").read_text()
        if part == fault.file:
            assert source.count(fault.right) >= 1, "the fault's line is gone: plant it anew"
            source = source.replace(fault.right, fault.wrong)
        stem = f"faulty_{abs(hash(str(fault)))}"
        source = source.replace("labs.kernels.backward", stem).replace("moe_lab::", f"moe_lab_{stem}::")
        path = folder / f"{stem}{part}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        copies[part] = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copies[part])
        if part == "_loop":
            copies[part].sm_count = lambda device: 5
    return copies[""]


@functools.cache
def all_paths(device: torch.device) -> Problem:
    """A problem that the right kernels solve, of small tiles: two column tiles, three K steps, experts of more than one
    row tile, and one that is empty."""
    problem = Problem(Case("all paths", T=150, D=72, F=72, E=5, K=2, routing="skewed"), torch.float32, device)
    assert_right(problem, problem.run(), torch.float32)
    return problem


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault, tmp_path, device):
    problem = all_paths(device)
    errors = problem.errors(problem.run(planted(fault, tmp_path)))
    assert max(errors.values()) > 10 * bound(torch.float32), errors


# ---- memory --------------------------------------------------------------------------------------------------------


def kept_bytes(call) -> tuple[torch.Tensor, int]:
    """What `call` returns, and the bytes of the different tensors that autograd keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    return out, sum(kept.values())


def test_kept_bytes_are_as_predicted(device):
    case, dtype = Case("kept", T=64, D=64, F=96, E=8, K=2), DTYPES[0]
    problem = Problem(case, dtype, device)
    x_TD, gate_up, down = (problem.leaves[name].detach().clone().requires_grad_() for name in ("x_TD", *GRADS[2:]))
    scores_TK = torch.rand(64, 2, device=device).requires_grad_()
    _, kept = kept_bytes(lambda: backward.moe_experts(x_TD, gate_up, down, scores_TK, problem.expert_ids_TK))
    weights = gate_up.nbytes + down.nbytes
    assert kept == weights + backward.activation_bytes(64, 64, 96, 8, 2, dtype.itemsize)


def test_qwen3_keeps_450_mib():
    assert backward.activation_bytes(16384, 2048, 768, 128, 8) <= 450 * 2**20


# ---- main grads, frozen parts, and what wraps a layer --------------------------------------------------------------

CASE = Case("all paths", T=70, D=72, F=40, E=5, K=2, routing="skewed")


def test_main_grads_add_up_in_float32(device):
    dtype = DTYPES[0]
    problem = Problem(CASE, dtype, device)
    plain = problem.run()
    buffers = tuple(torch.full(problem.leaves[name].shape, 3.0, device=device) for name in GRADS[2:])
    for _ in range(2):
        found = problem.run(main_grads=buffers)
        assert all(found[name] is None for name in GRADS[2:])
        assert all(torch.equal(found[name], plain[name]) for name in GRADS[:2])
    for name, buffer in zip(GRADS[2:], buffers, strict=True):
        assert relative_error((buffer - 3) / 2, problem.expected[name]) < bound(dtype)


@pytest.mark.parametrize("trained", [("x_TD",), ("gate_up_E2FD",), ("down_EDF",), ("router_ED",)], ids=str)
def test_only_what_is_trained_gets_a_gradient(trained, device):
    problem = Problem(CASE, DTYPES[0], device)
    leaves = {name: leaf.detach().clone().requires_grad_(name in trained) for name, leaf in problem.leaves.items()}
    layer(problem, leaves).backward(problem.grad_TD)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in trained)
        if name in trained:
            assert relative_error(leaf.grad, problem.expected[name]) < bound(DTYPES[0])


def test_an_expanded_gradient_works(device):
    problem = Problem(CASE, DTYPES[0], device)
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in problem.leaves.items()}
    layer(problem, leaves).sum().backward()
    problem.grad_TD = torch.ones_like(problem.grad_TD)
    assert torch.equal(leaves["down_EDF"].grad, problem.run()["down_EDF"])


def test_checkpointing_gives_the_same_bits_and_keeps_the_inputs_alone(device):
    problem = Problem(CASE, DTYPES[0], device)
    plain = problem.run()
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in problem.leaves.items()}
    out_TD, kept = kept_bytes(lambda: torch.utils.checkpoint.checkpoint(layer, problem, leaves, use_reentrant=False))
    out_TD.backward(problem.grad_TD)
    assert all(torch.equal(leaf.grad, plain[name]) for name, leaf in leaves.items())
    assert kept < 1024, "H is made again"


def test_autocast_runs_in_its_dtype(device):
    low = torch.bfloat16 if GPU else torch.float16
    problem = Problem(CASE, torch.float32, device)
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in problem.leaves.items()}
    weights, ids = (leaves["gate_up_E2FD"], leaves["down_EDF"]), problem.expert_ids_TK
    scores_TK = torch.full(ids.shape, 0.5, device=device)
    with torch.autocast(device.type, low):
        out_TD = backward.moe_experts(leaves["x_TD"], *weights, scores_TK, ids)
    assert out_TD.dtype == low
    out_TD.sum().backward()
    assert all(leaves[name].grad.dtype == torch.float32 for name in ("x_TD", *GRADS[2:]))


def operands(problem: Problem, ragged: bool) -> tuple:
    """Arguments of both operators; by entries if ragged, with all rows in use: what others hold is undefined."""
    x_TD, gate_up, down = (problem.leaves[name].detach().clone().requires_grad_() for name in ("x_TD", *GRADS[2:]))
    if ragged:
        probs_TE = (x_TD.detach().float() @ problem.leaves["router_ED"].float().T).softmax(1)
        rounded = round_tokens(probs_TE, problem.expert_ids_TK, plan_rounding(problem.cfg, len(x_TD), 4, "exact"))
        scores, rows = rounded.score_of_entry_C.clone(), rounded.row_of_entry_C
        index = rounded.offsets_E1, rounded.token_of_row_C, rows, rounded.first_of_token_T1
    else:
        scores = torch.rand(problem.expert_ids_TK.shape, device=x_TD.device)
        index = *backward.sort_rows(problem.expert_ids_TK, problem.cfg.E), None
    h_R2F, hidden_RF = (one.detach() for one in backward.train_up(x_TD, gate_up, *index, None))
    for_down = h_R2F.requires_grad_(), hidden_RF, down, scores.requires_grad_(), *index, None
    return (x_TD, gate_up, *index, None), for_down


@pytest.mark.parametrize("ragged", [False, True], ids=["slots", "entries"])
def test_the_operators_are_registered_as_pytorch_wants_it(ragged, device):
    problem = Problem(Case("tiny", T=9, D=16, F=16, E=3, K=2), DTYPES[0], device)
    for_up, for_down = operands(problem, ragged)
    torch.library.opcheck(backward.train_up.operator, for_up)
    torch.library.opcheck(backward.train_down.operator, for_down)


class Seen(TorchDispatchMode):
    """Notes the operators that are called, as selective checkpointing would to choose among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_operators_and_gets_the_same_bits(device):
    problem = Problem(Case("tiny", T=19, D=32, F=16, E=3, K=2), DTYPES[0], device)
    plain = problem.run()
    with Seen() as seen:
        found = problem.run()
    parts = ("sort_rows", "train_up", "train_down", "train_up_backward", "train_down_backward")
    assert seen.names >= {f"moe_lab::{part}" for part in parts}
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_transform_takes_the_operators(device):
    ids_BTK = torch.randint(0, 5, (3, 9, 2), generator=torch.Generator(device).manual_seed(0), device=device).int()
    found = torch.vmap(lambda ids_TK: backward.sort_rows(ids_TK, 5))(ids_BTK)
    for b in range(3):
        alone = backward.sort_rows(ids_BTK[b], 5)
        assert all(torch.equal(one[b], other) for one, other in zip(found, alone, strict=True))


def test_what_is_added_to_counts_as_changed(device):
    """So that autograd refuses a graph that saved a main grad before."""
    problem = Problem(Case("tiny", T=9, D=16, F=16, E=3, K=2), DTYPES[0], device)
    main_grads = tuple(torch.zeros(problem.leaves[name].shape, device=device) for name in GRADS[2:])
    problem.run(main_grads=main_grads)
    assert all(main_grad._version == 1 for main_grad in main_grads)


@pytest.mark.parametrize("E", [1, 64, 65, 128, 256, 512, 1000, 2048])
@pytest.mark.parametrize("T", [1, 128, 4096, 5000, 16384, 10**6])
def test_the_counting_sorts_blocks_divide_its_groups_and_fit(T, E):
    group, block_T, warps = backward_sort.group_for(T, E)
    assert group % block_T == 0
    assert 32 <= group <= 128
    assert block_T == 16 or block_T * triton.next_power_of_2(E) <= 8192, "more would not fit into registers"
    assert warps in (4, 8)


def test_a_gradient_of_the_gradients_is_refused(device):
    problem = Problem(Case("tiny", T=9, D=16, F=16, E=3, K=2), DTYPES[0], device)
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in problem.leaves.items()}
    out_TD = layer(problem, leaves)
    x_grad_TD, = torch.autograd.grad(out_TD, leaves["x_TD"], torch.ones_like(out_TD), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        x_grad_TD.sum().backward()


@pytest.mark.parametrize("main", [False, True], ids=["grads", "main_grads"])
def test_compiled_whole_it_gives_the_same_bits(main, device):
    problem = Problem(Case("tiny", T=19, D=32, F=16, E=3, K=2), DTYPES[0], device)
    x_TD, gate_up, down = (problem.leaves[name].detach().clone().requires_grad_() for name in ("x_TD", *GRADS[2:]))
    scores_TK = torch.rand(19, 2, device=device).requires_grad_()
    found = []
    for call in (backward.moe_experts, torch.compile(backward.moe_experts, fullgraph=True)):
        main_grads = tuple(torch.zeros(one.shape, device=device) for one in (gate_up, down)) if main else None
        out_TD = call(x_TD, gate_up, down, scores_TK, problem.expert_ids_TK, main_grads=main_grads)
        leaves = (x_TD, scores_TK) if main else (x_TD, scores_TK, gate_up, down)
        found.append((out_TD, *torch.autograd.grad(out_TD, leaves, problem.grad_TD), *(main_grads or ())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[1][-1].any()


@pytest.mark.parametrize(("change", "message"), [
    ({"gate_up_E2FD": (5, 64, 72)}, "gate_up_E2FD has shape"), ({"down_EDF": (5, 72, 39)}, "F=39"),
    ({"x_TD": (70, 71)}, "D=71"), ({"scores_TK": (70, 3)}, "scores has shape"),
])
def test_wrong_shapes_are_named(change, message, device):
    shapes = {"x_TD": (70, 72), "gate_up_E2FD": (5, 80, 72), "down_EDF": (5, 72, 40), "scores_TK": (70, 2), **change}
    tensors = [torch.zeros(shape, dtype=torch.float32 if name == "scores_TK" else DTYPES[0], device=device)
               for name, shape in shapes.items()]
    with pytest.raises(ValueError, match=message):
        backward.moe_experts(*tensors, torch.zeros(70, 2, dtype=torch.int64, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "nearest"])
def test_a_captured_step_answers_another_routing(mode, device):
    """Forward and backward under a CUDA graph, no sync: a replay with other tokens and routing equals an eager run."""
    case, T = Case("plain", T=512, D=256, F=256, E=8, K=2), 512
    problem = Problem(case, torch.bfloat16, device, mode, 128)
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in problem.leaves.items()}
    ids_TK, grad_TD = problem.expert_ids_TK.clone(), problem.grad_TD.clone()

    def step() -> list[torch.Tensor]:
        probs_TE = (leaves["x_TD"].float() @ leaves["router_ED"].float().T).softmax(1)
        weights = leaves["gate_up_E2FD"], leaves["down_EDF"]
        if mode == "exact":
            out_TD = backward.moe_experts(leaves["x_TD"], *weights, probs_TE.gather(1, ids_TK), ids_TK)
        else:
            rounded = round_tokens(probs_TE.detach(), ids_TK, problem.plan)
            scores_C = backward.rounded_scores(probs_TE, rounded, problem.plan)
            out_TD = backward.moe_experts_rounded(leaves["x_TD"], *weights, scores_C, rounded, problem.plan)
        return [out_TD.detach(), *torch.autograd.grad(out_TD, list(leaves.values()), grad_TD)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves["x_TD"].copy_(torch.randn(T, 256, device=device))
        ids_TK.copy_(torch.rand(T, 8, device=device).topk(2).indices)
    graph.replay()
    torch.cuda.synchronize()
    captured = [one.clone() for one in captured]
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


# ---- machine code --------------------------------------------------------------------------------------------------

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
TABLE = {"offsets_ptr": "*i32", "tiles_ptr": "*i32", "tile_count_ptr": "*i32"}


def boxes(*sizes: int) -> str:
    return f"tensordesc<bf16[{', '.join(map(str, sizes))}]>"


def requests(sm: int) -> list[Request]:
    """Every GEMM of the step for a target, as its launcher asks for it."""
    tile = backward_loop.TILES[sm]
    M, N, K = tile.block_M, tile.block_N, tile.block_K
    how = f"{backward_loop.__name__}.{'tma' if tile.tma else 'pointer'}"

    def one(name: str, file: str, kernel: str, signature: dict[str, str], **constants: object) -> Request:
        aligned = tuple(argument for argument, kind in signature.items() if kind.startswith("*"))
        constants |= {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_K": K}
        return Request(f"{name} sm_{sm}", f"labs.kernels.backward_{file}", kernel, signature, constants, aligned,
                       tile.warps, tile.stages, sm)

    def operand(*sizes: int) -> str:
        return boxes(*sizes) if tile.tma else "*bf16"

    sizes = {"D8": "i32", "F8": "i32"}
    found = []
    for copied in (False, True) if tile.tma else (False,):
        rows, of = operand(M, K) if copied else "*bf16", " copied" * copied
        up = {"x": rows, "token_of_row_ptr": "*i32", "weights": operand(2, N // 2, K), "h_ptr": "*bf16",
              "hidden_ptr": "*bf16", **TABLE, **sizes}
        hidden = {"grad_out": rows, "token_of_row_ptr": "*i32", "score_of_row_ptr": "*fp32",
                  "weights": operand(1, K, N), "h_ptr": "*bf16", "dh_ptr": "*bf16", "scaled_ptr": "*bf16",
                  "d_scores_ptr": "*fp32", **TABLE, "R": "i32", **sizes}
        found.append(one(f"up{of}", "gemm", "up_kernel", up, load_weights=f"{how}_gate_up", SORTED=copied))
        found.append(one(f"hidden_grad{of}", "gemm", "hidden_grad_kernel", hidden, load_weights=f"{how}_straight",
                         SORTED=copied))
    for transposed in (False, True):
        for accumulate in (False, True):
            weights = {"gathered_ptr": "*bf16", "token_of_row_ptr": "*i32", "sorted_rows": operand(K, N),
                       "out_ptr": "*fp32" if accumulate else "*bf16", "offsets_ptr": "*i32", "E": "i32", "G8": "i32",
                       "S8": "i32"}
            name = f"weight_grad{' transposed' * transposed}{' accumulate' * accumulate}"
            found.append(one(name, "weights", "weight_grad_kernel", weights, TMA=tile.tma, TRANSPOSED=transposed,
                             ACCUMULATE=accumulate, E_POW2=128))
    for layout, box in (("transposed", (1, N, K)), ("straight", (1, K, N))):
        rows = {"rows": operand(M, K), "weights": operand(*box), "out_ptr": "*bf16", **TABLE, "N8": "i32", "K8": "i32"}
        found.append(one(f"rows {layout}", "gemm", "rows_kernel", rows, load_weights=f"{how}_{layout}", TMA=tile.tma))
    return found


@pytest.mark.parametrize(("name", "sm"), [(one.name.rpartition(" ")[0], sm)
                                          for sm in SHARED_MEMORY for one in requests(sm)])
def test_machine_code_is_as_planned(name, sm):
    found = compile_all(requests(sm))[f"{name} sm_{sm}"]
    assert found.count("HGMMA" if sm == 90 else "HMMA") > 0, "tensor cores"
    few = 32 if triton.__version__.startswith("3.6") and name.startswith("hidden_grad") and sm == 90 else 0
    assert found.stack_bytes <= few, "in the epilogue, under Triton 3.6"
    assert few or found.count(r"LDL|STL") == 0
    assert found.shared_bytes <= SHARED_MEMORY[sm]
    assert found.count(r"REDG?\.|ATOMG?\.") == 0, "no atomics: bitwise repeatable"
    assert found.count(r"LDGSTS") == found.count(r"LDGSTS.*128"), "16-byte cp.async"
    if sm == 90:
        assert found.count("HGMMA") == 4, "a K step of 64 is four wgmmas of depth 16, both operands from shared memory"
        loads = 2 if name.startswith("rows") or "copied" in name else 1
        assert found.count("UTMALDG") == 3 * loads, "by TMA: two steps ahead of the loop, and one in it"
        gathered = not name.startswith("rows") and "copied" not in name
        assert (found.count("LDGSTS") > 0) == gathered, "gathered rows by cp.async, others by TMA"
