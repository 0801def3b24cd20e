"""OptimizedMoELayer against the float64 definition, and its commands: python -m pytest tests/test_full_moe.py"""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch

from common.level import Unsupported
from common.measure import relative_error
from labs import full_moe_benchmark, train_byte_lm
from labs.full_moe import OptimizedMoELayer
from labs.moe_layer import experts as experts_module
from labs.moe_layer.admission import drop_over_capacity
from labs.moe_layer.experts import BACKENDS, Backend, compute_experts, why_not_kernels
from labs.moe_layer.memory import measure_kept_bytes
from labs.moe_layer.rows import SlotRows
from labs.studies import study
from labs.studies.byte_lm import SMALL, moe_factory, train
from tests.cases import CASES
from tests.layers import BOUNDS, NAMES, ON_GPU, Result, assert_close, expected, make_layer, mask_of, measured, small


# ---- the layer -----------------------------------------------------------------------------------

RUNS = [("loop", torch.float64), ("grouped", torch.float64), ("grouped", torch.float32), ("loop", torch.float32)]
RUNS += [("grouped", torch.bfloat16), ("kernels", torch.bfloat16)] if ON_GPU else []


@pytest.mark.parametrize(("backend", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_equal_the_definition(case, backend, dtype, device):
    if backend == "kernels" and (case.D % 8 or case.F % 8):
        pytest.skip("the kernels need D and F in multiples of 8")
    layer, x_TD = make_layer(case, dtype, device, backend=backend)
    grad_TD = torch.randn(x_TD.shape, generator=torch.Generator(device).manual_seed(2), device=device).to(dtype)
    chosen_TE = mask_of(layer.gate(x_TD).expert_ids_TK, case.E)
    assert_close(measured(layer, x_TD, grad_TD), expected(layer, x_TD, grad_TD, chosen_TE), BOUNDS[dtype])


@pytest.mark.parametrize("options", [
    {"scoring": "sigmoid"}, {"scoring": "sigmoid", "num_groups": 4, "top_groups": 2, "score_scale": 2.5},
    {"temperature": 2.0}, {"gradient_checkpointing": True}, {"capacity_factor": 0.75},
    {"capacity_factor": 0.75, "gradient_checkpointing": True}, {"capacity_factor": 0.5, "backend": "loop"},
    {"scoring": "topk_softmax", "temperature": 0.5, "capacity_factor": 1.0},
], ids=str)
def test_options_equal_the_definition(options, device):
    layer, x_TD = small(device, **options)
    grad_TD = torch.randn_like(x_TD)
    choice = layer.gate(x_TD)
    kept_ids_TK = choice.expert_ids_TK
    if layer.capacity_factor:
        kept_ids_TK = drop_over_capacity(choice.scores_TK, choice.expert_ids_TK, 8, layer.capacity_factor)
        assert (kept_ids_TK == 8).any(), "nothing to test"
    wanted = expected(layer, x_TD, grad_TD, mask_of(choice.expert_ids_TK, 8), mask_of(kept_ids_TK, 8))
    assert_close(measured(layer, x_TD, grad_TD), wanted, 2e-5)


@pytest.mark.parametrize("fault", ["swapped gate and up", "skipped score", "wrong expert"])
def test_the_comparison_finds_faults(fault, device, monkeypatch):
    layer, x_TD = small(device)
    grad_TD = torch.randn_like(x_TD)
    wanted = expected(layer, x_TD, grad_TD, mask_of(layer.gate(x_TD).expert_ids_TK, 8))
    original = experts_module.BACKENDS["grouped"]

    def faulty(x, gate_up, down, admitted, main_grads):
        if fault == "swapped gate and up":
            gate_up = gate_up.roll(24, dims=1)
        elif fault == "skipped score":
            admitted = admitted._replace(scores_TK=admitted.scores_TK * 0 + 0.5)
        else:
            admitted = admitted._replace(slots=SlotRows.of((admitted.expert_ids_TK + 1) % 8, 8, may_drop=False))
        return original(x, gate_up, down, admitted)

    monkeypatch.setitem(experts_module.BACKENDS, "grouped", faulty)
    with pytest.raises(AssertionError):
        assert_close(measured(layer, x_TD, grad_TD), wanted, 2e-5)


@pytest.mark.parametrize("options", [{"capacity_factor": 0.5}, {"token_rounding": "down", "tile_size": 4}], ids=str)
def test_rows_that_nobody_wrote_reach_nothing(options, device, monkeypatch):
    """grouped_mm leaves rows past the last expert's as they are: NaN there must not be seen, forward or backward."""
    layer, x_TD = small(device, backend="grouped", **options)
    grad_TD = torch.randn_like(x_TD)
    clean = measured(layer, x_TD, grad_TD)

    class Dirty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values, ends):
            ctx.save_for_backward(ends)
            return Dirty.spoil(values, ends)

        @staticmethod
        def backward(ctx, grad):
            return Dirty.spoil(grad, *ctx.saved_tensors), None

        @staticmethod
        def spoil(values, ends):
            rows = torch.arange(values.shape[0], device=values.device)
            assert (rows >= ends[-1]).any(), "nothing to test"
            return values.masked_fill((rows >= ends[-1])[:, None], torch.nan)

    original = experts_module.grouped_linear
    monkeypatch.setattr(experts_module, "grouped_linear", lambda x, weight, ends: Dirty.apply(
        original(Dirty.apply(x, ends), weight, ends), ends))
    dirty = measured(layer, x_TD, grad_TD)
    assert torch.equal(dirty.out_TD, clean.out_TD)
    for name in NAMES:
        assert torch.equal(dirty.gradients[name], clean.gradients[name]), name


@pytest.mark.parametrize("admit", ["exact", "capacity", "rounded"])
def test_the_kernels_take_what_the_layer_admits(admit, device):
    """The kernels' seam, in the interpreter where there is no GPU."""
    options = {"exact": {}, "capacity": {"capacity_factor": 0.75},
               "rounded": {"token_rounding": "nearest", "tile_size": 16, "rounding_least_tiles": 0.0,
                           "score_scale": 1.5}}[admit]
    layer, x_TD = small(device, **options)
    dtype = torch.bfloat16 if ON_GPU else torch.float16
    results = []
    for backend, kind in (("grouped", torch.float32), ("kernels", dtype)):
        x = x_TD.clone().requires_grad_()
        choice = layer.gate(x)
        admitted, _, _ = layer.admit(choice)
        weights = [p.detach().to(kind).requires_grad_() for p in layer.experts.parameters()]
        out_TD = compute_experts(x.to(kind), *weights, admitted, backend).float()
        grad_TD = torch.randn(out_TD.shape, generator=torch.Generator(device).manual_seed(5), device=device)
        grads = torch.autograd.grad(out_TD, [x, layer.gate.weight, *weights], grad_TD)
        results.append(Result(out_TD.detach(), dict(zip(NAMES, grads, strict=True))))
    assert_close(results[1], results[0], BOUNDS[dtype])


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (1, 32), (3, 5, 32)], ids=str)
@pytest.mark.parametrize("options", [{}, {"capacity_factor": 1.0}, {"backend": "loop"}, {"shared_ffn_dim": 16},
                                     {"token_rounding": "up", "tile_size": 2}], ids=str)
def test_any_number_of_tokens(shape, options, device):
    layer, _ = small(device, **options)
    x = torch.randn(shape, device=device, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that rounding is off for few rows
        output, aux_loss = layer(x, return_aux_loss=True)
    assert output.shape == x.shape
    (output.sum() + aux_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert len(layer.stats().rows_per_expert) == 8


def test_a_shared_expert_is_added(device):
    layer, x_TD = small(device, shared_ffn_dim=16)
    shared, layer.shared_experts = layer.shared_experts, None
    routed_TD = layer(x_TD)
    layer.shared_experts = shared
    gate, up = x_TD @ shared.gate_proj.weight.T, x_TD @ shared.up_proj.weight.T
    wanted_TD = routed_TD + (torch.nn.functional.silu(gate) * up) @ shared.down_proj.weight.T
    assert relative_error(layer(x_TD), wanted_TD.double()) < 1e-5


def test_autocast_routes_in_float32_and_computes_in_its_dtype(device):
    layer, x_TD = small(device)
    ids_TK = layer.gate(x_TD).expert_ids_TK
    with torch.autocast(device.type, dtype=torch.bfloat16):
        choice, out_TD = layer.gate(x_TD), layer(x_TD)
    assert choice.logits_TE.dtype == torch.float32
    assert torch.equal(choice.expert_ids_TK, ids_TK)
    assert out_TD.dtype == torch.bfloat16
    assert 1e-4 < relative_error(out_TD, layer(x_TD).double()) < 3e-2


def test_two_runs_agree_bit_for_bit(device):
    layer, x_TD = small(device, T=200, token_rounding="nearest", tile_size=8)
    first, second = (measured(layer, x_TD, x_TD) for _ in range(2))
    assert torch.equal(first.out_TD, second.out_TD)
    assert all(torch.equal(first.gradients[name], second.gradients[name]) for name in NAMES)


def test_a_copy_and_a_state_dict_give_the_same_layer(device):
    layer, x_TD = small(device, bias_update_rate=0.1)
    other, _ = small(device, bias_update_rate=0.1)
    torch.nn.init.normal_(other.gate.weight)
    assert set(layer.state_dict()) == {"gate.weight", "gate.e_score_correction_bias", "experts.gate_up_proj",
                                       "experts.down_proj"}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x_TD), layer(x_TD))
    assert torch.equal(copy.deepcopy(layer)(x_TD), layer(x_TD))


def test_a_layer_made_on_meta_is_drawn_as_one_made_at_once(device):
    options = {"shared_ffn_dim": 16, "router_bias": True, "capacity_factor": 1.25, "adaptive_capacity": True}
    with torch.device("meta"):
        layer = OptimizedMoELayer(32, 24, 8, 2, **options)
    layer.to_empty(device=device)
    for tensor in layer.state_dict().values():
        tensor.fill_(torch.nan)
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    wanted = OptimizedMoELayer(32, 24, 8, 2, **options, device=device)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name


@pytest.mark.parametrize("options", [{}, {"token_rounding": "nearest", "tile_size": 4}, {"capacity_factor": 0.5}],
                         ids=str)
def test_torch_compile_takes_the_layer_and_does_not_compile_it_again(options, device):
    torch._dynamo.reset()
    layer, x_TD = small(device, **options)
    compiled = torch.compile(layer, backend="aot_eager")
    grad_TD = torch.randn_like(x_TD)
    wanted = measured(layer, x_TD, grad_TD)
    for _ in range(3):
        compiled(torch.randn_like(x_TD).requires_grad_())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    layer.zero_grad()
    x = x_TD.clone().requires_grad_()
    out_TD = compiled(x)
    out_TD.backward(grad_TD)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    parameters = dict(layer.named_parameters())
    found = Result(out_TD.detach(), {"x": x.grad, **{name: parameters[name].grad for name in NAMES[1:]}})
    assert_close(found, Result(wanted.out_TD.double(), {name: one.double() for name, one in wanted.gradients.items()}),
                 1e-5)


# ---- backends ------------------------------------------------------------------------------------

def test_the_backend_says_what_runs_and_why():
    assert OptimizedMoELayer(32, 24, 8, 2, device="cpu").backend == (
        "grouped", "the kernels need a GPU; torch.nn.functional.grouped_mm")
    assert OptimizedMoELayer(32, 24, 8, 2, device="cpu", use_io_overlap=False).backend == (
        "grouped", "use_io_overlap is off; torch.nn.functional.grouped_mm")
    name, reason = OptimizedMoELayer(30, 24, 8, 2, device="cpu").backend
    assert name == "grouped"
    assert "one product an expert" in reason
    assert "D=30" in reason
    assert OptimizedMoELayer(32, 24, 8, 2, device="cpu", backend="loop").backend.name == "loop"


def test_a_backend_that_does_not_run_here_raises():
    with pytest.raises(Unsupported, match="backend='kernels'"):
        OptimizedMoELayer(32, 24, 8, 2, device="cpu", backend="kernels").backend  # noqa: B018


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_run_unless_told_otherwise():
    made = {"device": "cuda", "dtype": torch.bfloat16}
    assert OptimizedMoELayer(32, 24, 8, 2, **made).backend.name == "kernels"
    assert OptimizedMoELayer(32, 24, 8, 2, use_io_overlap=False, **made).backend.name == "grouped"
    assert OptimizedMoELayer(32, 24, 8, 2, device="cuda", dtype=torch.float32).backend.name == "grouped"
    with pytest.raises(Unsupported, match="multiples of 8"):
        OptimizedMoELayer(30, 24, 8, 2, backend="kernels", **made)(torch.zeros(1, 30, **made))


# ---- memory --------------------------------------------------------------------------------------

MEMORY_OPTIONS = [{}, {"backend": "loop"}, {"gradient_checkpointing": True}, {"capacity_factor": 1.25},
                  {"token_rounding": "nearest", "tile_size": 16}, {"shared_ffn_dim": 48}, {"scoring": "sigmoid"}]


@pytest.mark.parametrize("options", MEMORY_OPTIONS, ids=str)
def test_activation_bytes_are_what_autograd_keeps(options):
    torch.manual_seed(0)
    layer = OptimizedMoELayer(64, 48, 16, 4, **{"capacity_factor": None, **options})
    x_TD = torch.randn(512, 64, requires_grad=True)
    kept = measure_kept_bytes(lambda: layer(x_TD), x_TD, list(layer.parameters()))
    if layer.gradient_checkpointing:  # holds the scores and two index arrays itself, where the measure cannot see them
        kept += 12 * 512 * 4
    assert layer.activation_bytes(512) == pytest.approx(kept, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [*MEMORY_OPTIONS, {"backend": "grouped"}], ids=str)
def test_activation_bytes_are_what_the_allocator_says(options, device):
    layer = OptimizedMoELayer(512, 256, 32, 4, **{"capacity_factor": None, **options}, device=device,
                              dtype=torch.bfloat16)
    x_TD = torch.randn(4096, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer(x_TD)  # what is made once, at a first call, is not the forward's
    torch.cuda.synchronize()
    layer.reset_stats()
    kept = measure_kept_bytes(lambda: layer(x_TD), x_TD, list(layer.parameters()))
    assert layer.activation_bytes(4096) == pytest.approx(kept, rel=0.03)


# ---- presets and inference -----------------------------------------------------------------------

def test_presets(device):
    training = OptimizedMoELayer.for_training(32, 24, 8, 2).to(device)
    assert training.training
    assert (training.token_rounding, training.capacity_factor) == (None, None)
    inference = OptimizedMoELayer.for_inference(32, 24, 8, 2).to(device)
    assert not inference.training
    assert not any(p.requires_grad for p in inference.parameters())
    inference.load_state_dict(training.state_dict())
    x_TD = torch.randn(30, 32, device=device)
    assert relative_error(inference(x_TD), training.eval()(x_TD).double()) < 1e-5
    with pytest.raises(RuntimeError, match="collect_stats"):
        inference.stats()


ROUTERS = [{"scoring": "sigmoid"}, {"temperature": 2.0}, {"renormalize": False, "router_bias": True},
           {"scoring": "topk_softmax", "collect_stats": True},
           {"scoring": "sigmoid", "num_groups": 4, "top_groups": 2, "score_scale": 2.5, "router_bias": True,
            "shared_ffn_dim": 16}]


def give_a_bias(layer: OptimizedMoELayer) -> None:
    """A router bias that changes the choice, where there is one."""
    bias_E = layer.gate.e_score_correction_bias
    if bias_E is not None:
        bias_E.copy_(torch.randn(bias_E.shape, generator=torch.Generator().manual_seed(4)) * 0.2)


@pytest.mark.parametrize("options", ROUTERS, ids=str)
@pytest.mark.parametrize("T", [37, 280])  # level 8's kernels for few rows, and for many
def test_inference_runs_level_8_behind_any_router(T, options, device, monkeypatch):
    """What a graph would record, run as it is: in the interpreter where there is no GPU."""
    dtype = torch.bfloat16 if ON_GPU else torch.float16
    torch.manual_seed(0)
    layer = OptimizedMoELayer.for_inference(32, 24, 8, 2, **options).to(device, dtype)
    give_a_bias(layer)
    x_TD = torch.randn(T, 32, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    expected_TD = copy.deepcopy(layer).float()(x_TD.float()).double()
    monkeypatch.setattr(OptimizedMoELayer, "backend", Backend("kernels", "as if on a GPU"))
    monkeypatch.setitem(experts_module.BACKENDS, "kernels", None)  # level 9's forward would write H
    found_TD, loads = layer._make_inference_forward()(x_TD)
    assert relative_error(found_TD, expected_TD) < BOUNDS[dtype]
    assert (loads is not None) == layer.collect_stats
    assert loads is None or all(rows_E.sum() == 2 * T for rows_E in loads)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"collect_stats": True}, {"shared_ffn_dim": 64}, {"backend": "grouped"},
                                     *ROUTERS], ids=str)
@pytest.mark.parametrize("T", [1, 64, 3000])
def test_graphed_inference_answers_other_tokens_and_weights(T, options, device):
    made = {"device": device, "dtype": torch.bfloat16}
    layer = OptimizedMoELayer.for_inference(256, 128, 16, 4, **options, **made)
    give_a_bias(layer)
    plain = copy.deepcopy(layer)
    plain.cuda_graph = False
    for seed in range(3):
        x_TD = torch.randn(T, 256, generator=torch.Generator(device).manual_seed(seed), **made)
        if seed == 2:
            for one in (layer, plain):
                with torch.no_grad():
                    one.experts.gate_up_proj.mul_(-1)
        expected_TD = plain(x_TD).double()
        with torch.inference_mode(seed == 1):
            assert relative_error(layer(x_TD), expected_TD) < 2e-2
        assert relative_error(layer(x_TD.view(1, T, 256)).view(T, 256), expected_TD) < 2e-2


@pytest.mark.gpu
def test_graphs_recorded_in_inference_mode_serve_outside_of_it(device):
    made = {"device": device, "dtype": torch.bfloat16}
    layer = OptimizedMoELayer.for_inference(256, 128, 16, 4, **made)
    with torch.inference_mode():
        first = layer(torch.randn(64, 256, **made)).clone()
    assert first.isfinite().all()
    assert layer(torch.randn(64, 256, **made)).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"backend": "grouped"}, {"eval_capacity_factor": 1.0}], ids=str)
def test_stats_tell_the_last_replay(options, device):
    """Not the last capture."""
    made = {"device": device, "dtype": torch.bfloat16}
    layer = OptimizedMoELayer.for_inference(256, 128, 16, 4, collect_stats=True, **options, **made)
    for T in (64, 128, 64, 0, 128):
        layer(torch.randn(T, 256, **made))
        assert sum(layer.stats().rows_per_expert) == 4 * T


@pytest.mark.gpu
def test_graphed_inference_keeps_its_buffers(device):
    made = {"device": device, "dtype": torch.bfloat16}
    layer = OptimizedMoELayer.for_inference(256, 128, 16, 4, **made)
    x_TD = torch.randn(64, 256, **made)
    first, second, third = (layer(x_TD) for _ in range(3))
    assert first.data_ptr() != second.data_ptr() == third.data_ptr()  # copied; read where it lies


@pytest.mark.gpu
def test_an_output_stands_until_the_next_call_of_as_many_tokens(device):
    """Though graphs of one count share memory, and x may be the last output."""
    made = {"device": device, "dtype": torch.bfloat16}
    layer = OptimizedMoELayer.for_inference(256, 128, 16, 4, **made)
    plain = copy.deepcopy(layer)
    plain.cuda_graph = False
    x_TD, other_TD = torch.randn(64, 256, **made), torch.randn(96, 256, **made)
    for _ in range(3):
        out_TD, expected_TD = layer(x_TD), plain(x_TD)
        for _ in range(3):
            layer(other_TD)
        assert relative_error(out_TD, expected_TD.double()) < 2e-2
    for _ in range(4):
        expected_TD = plain(x_TD)
        x_TD = layer(x_TD)
        assert relative_error(x_TD, expected_TD.double()) < 2e-2


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize(("options", "named"), [
    ({"hidden_dim": 0}, "hidden_dim=0"), ({"ffn_dim": 2.5}, "ffn_dim=2.5"), ({"top_k": 9}, "top_k=9"),
    ({"tile_size": 0}, "tile_size=0"), ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
    ({"capacity_factor": -1.0}, "capacity_factor=-1.0"), ({"eval_capacity_factor": 0.0}, "eval_capacity_factor"),
    ({"capacity_factor": float("nan")}, "capacity_factor=nan"), ({"capacity_factor": math.inf}, "capacity_factor=inf"),
    ({"token_rounding": "floor"}, "token_rounding='floor'"),
    ({"token_rounding": "exact"}, "token_rounding='exact'"), ({"load_balance_weight": -0.1}, "load_balance_weight"),
    ({"z_loss_weight": -1.0}, "z_loss_weight"), ({"bias_update_rate": -1.0}, "bias_update_rate"),
    ({"scoring": "tanh"}, "scoring='tanh'"), ({"temperature": 0.0}, "temperature=0.0"),
    ({"noise_std": -1.0}, "noise_std"), ({"num_groups": 3}, "num_groups=3"),
    ({"num_groups": 4, "top_groups": 5}, "top_groups=5"), ({"num_groups": 8, "top_groups": 4}, "num_groups=8"),
    ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "top_k=3"), ({"shared_ffn_dim": -1}, "shared_ffn_dim"),
    ({"backend": "cublas"}, "backend='cublas'"), ({"backend": "loop", "token_rounding": "up"}, "token_rounding"),
    ({"capacity_factor": None, "adaptive_capacity": True}, "adaptive_capacity"),
    ({"capacity_factor": "1.25"}, "capacity_factor='1.25'"), ({"eval_capacity_factor": True}, "factor=True"),
    ({"load_balance_weight": None}, "load_balance_weight=None"), ({"z_loss_weight": math.nan}, "z_loss_weight=nan"),
    ({"bias_update_rate": "0.1"}, "bias_update_rate='0.1'"), ({"num_groups": 2.0}, "num_groups=2.0"),
    ({"num_groups": 4, "top_groups": "2"}, "top_groups='2'"), ({"num_groups": 4, "top_groups": 0}, "top_groups=0"),
    ({"renormalize": "no"}, "renormalize='no'"), ({"temperature": "1"}, "temperature='1'"),
    ({"noise_std": None}, "noise_std=None"), ({"score_scale": 0.0}, "score_scale=0.0"),
    ({"score_scale": "2"}, "score_scale='2'"), ({"use_io_overlap": "off"}, "use_io_overlap='off'"),
    ({"gradient_checkpointing": 1}, "gradient_checkpointing=1"), ({"adaptive_capacity": "yes"}, "adaptive_capacity"),
    ({"router_bias": None}, "router_bias=None"), ({"cuda_graph": "on"}, "cuda_graph='on'"),
    ({"collect_stats": 0}, "collect_stats=0"), ({"rounding_least_tiles": "2"}, "rounding_least_tiles='2'"),
    ({"top_k": True}, "top_k=True"), ({"hidden_dim": "32"}, "hidden_dim='32'"), ({"shared_ffn_dim": 8.0}, "=8.0"),
    ({"backend": None}, "backend=None"), ({"scoring": None}, "scoring=None"),
])
def test_what_cannot_be_is_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        OptimizedMoELayer(**{"hidden_dim": 32, "ffn_dim": 24, "num_experts": 8, "top_k": 2, **options})


def test_wrong_tokens_are_refused(device):
    layer, x_TD = small(device)
    with pytest.raises(ValueError, match=r"x has shape \(48, 31\)"):
        layer(x_TD[:, :31])
    with pytest.raises(ValueError, match="x has shape"):
        layer(x_TD[0])
    with pytest.raises(ValueError, match="x is bfloat16, the layer float32"):
        layer(x_TD.bfloat16())
    with pytest.raises(ValueError, match="x is on meta"):
        layer(x_TD.to("meta"))
    with pytest.raises(RuntimeError, match="run a forward first"):
        layer.stats()
    with pytest.raises(ValueError, match="T=-1"):
        layer.activation_bytes(-1)


# ---- a training ----------------------------------------------------------------------------------

def test_the_byte_lm_learns_and_repeats():
    run, again = (train(moe_factory(SMALL), SMALL, steps=20, device="cpu", progress=None) for _ in range(2))
    assert run.losses == again.losses
    assert run.losses[0] == pytest.approx(math.log(256), rel=0.15)
    assert run.evaluation_loss < 0.8 * run.losses[0]
    assert torch.tensor(run.rows).shape == (20, SMALL.L, SMALL.E)
    assert torch.tensor(run.rows).sum(dim=2).eq(SMALL.T * SMALL.K).all()
    with pytest.raises(ValueError, match="steps=0"):
        train(moe_factory(SMALL), steps=0)


def test_backends_train_alike():
    runs = [train(moe_factory(SMALL, capacity_factor=None, backend=backend), SMALL, steps=5, device="cpu",
                  progress=None) for backend in ("grouped", "loop")]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-4)


def test_every_backend_is_tested():
    assert set(BACKENDS) == {"loop", "grouped", "kernels"}
    assert why_not_kernels(torch.device("cpu"), torch.float16, 32, 24, 8) == "the kernels need a GPU"


# ---- the commands --------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["train", "infer"])
def test_the_breakdown_is_measured_saved_and_drawn_again(mode, tmp_path, capsys):
    arguments = ["--quick", "--mode", mode, "--rounds", "1", "--out", str(tmp_path)]
    assert study.main(full_moe_benchmark.STUDY, arguments) == 0
    stem = next(tmp_path.glob(f"*_full_moe_tiny_{mode}.json")).with_suffix("")
    record = json.loads(stem.with_suffix(".json").read_text())
    rows = {row["name"]: row for row in record["figures"]["rows"]}
    assert rows["+ grouped GEMM"]["forward_ms"]["p50"] > 0
    last = "+ IO overlap" if mode == "train" else "+ IO overlap, CUDA graph"
    if torch.cuda.is_available():
        assert rows[last]["forward_ms"]["p50"] > 0
    else:
        assert rows[last]["status"] == "unsupported", "no time for kernels that a CPU lacks"
    drawn = stem.with_suffix(".svg").read_bytes()
    stem.with_suffix(".svg").unlink()
    assert study.main(full_moe_benchmark.STUDY, ["--plot", str(stem.with_suffix(".json"))]) == 0
    assert stem.with_suffix(".svg").read_bytes() == drawn
    assert torch.cuda.is_available() or "n/a" in capsys.readouterr().out


def test_a_wrong_row_of_the_breakdown_gets_no_time(tmp_path, monkeypatch, capsys):
    original = experts_module.BACKENDS["grouped"]
    monkeypatch.setitem(experts_module.BACKENDS, "grouped", lambda x, gate_up, down, admitted, main_grads: original(
        x, gate_up.roll(96, dims=1), down, admitted))
    assert study.main(full_moe_benchmark.STUDY, ["--quick", "--out", str(tmp_path)]) == 1
    assert "+ grouped GEMM: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "named"), [
    (["--config", "gpt"], "preset='gpt'"), (["--tokens", "0"], "'0'"), (["--mode", "both"], "'both'")])
def test_wrong_arguments_of_the_breakdown_are_named(arguments, named, tmp_path, capsys):
    try:
        status = study.main(full_moe_benchmark.STUDY, [*arguments, "--quick", "--out", str(tmp_path)])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert named in capsys.readouterr().err


def test_the_training_run_is_recorded(tmp_path):
    arguments = ["--quick", "--steps", "3", "--out", str(tmp_path)]
    assert study.main(train_byte_lm.STUDY, arguments) == 0
    path = next(tmp_path.glob("*_byte_lm.json"))
    runs = json.loads(path.read_text())["figures"]["runs"]
    assert set(runs) == set(train_byte_lm.RUNS)
    assert all(len(run["losses"]) == len(run["gini"]) == 3 for run in runs.values())
    near = 2e-2 if torch.cuda.is_available() else 1e-4  # kernels in bfloat16 against a loop in float32
    assert runs[train_byte_lm.OPTIMIZED]["losses"] == pytest.approx(runs[train_byte_lm.LOOP]["losses"], rel=near)
    assert path.with_suffix(".svg").exists()
