"""A small byte-level language model with MoE layers, trained on the Python standard library's own source.

What   a decoder of pre-norm blocks, attention and a mixture of experts each, that predicts the next byte. Every
       machine that runs this has the text: the .py files of its standard library, every tenth of them held out.
Use    run = train(moe_factory(SMALL), SMALL, steps=20)
       moe_factory builds the layer of each block, `factory(hidden_dim) -> nn.Module` with
           output, aux_loss = layer(x, return_aux_loss=True)
           layer.rows_E        (E,) rows an expert was chosen for in the last forward, on the device
           layer.update_balance() optional, called after each optimizer step
       Initial weights, batches and their order depend on the seed alone, so that runs differ by their layers only.
       Evaluation is in eval mode: exact top-k, whatever the training routed.
Costs  Two Python versions have two standard libraries: compare losses within one machine. TrainingRun.text says
       which text it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from labs.full_moe import OptimizedMoELayer
from labs.moe_layer.statistics import evenness

# B batch, S sequence, T = B*S tokens, D model width, F expert width, E experts, K top-k, L layers, H heads.

BYTES = 256
HELD_OUT = 10  # every tenth file is for evaluation
EVALUATION_BATCHES = 8

MoEFactory = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Size:
    """Sizes of the model, its MoE layers and its batches."""

    L: int
    D: int
    H: int
    F: int
    E: int
    K: int
    batch: int
    sequence: int

    @property
    def T(self) -> int:
        """Tokens a step."""
        return self.batch * self.sequence


SMALL = Size(L=2, D=64, H=2, F=64, E=8, K=2, batch=8, sequence=64)
LARGE = Size(L=2, D=512, H=8, F=512, E=8, K=2, batch=16, sequence=512)


def moe_factory(size: Size, **options) -> MoEFactory:
    """OptimizedMoELayer with the size's experts; `options` go to it."""
    return lambda hidden_dim: OptimizedMoELayer(hidden_dim, size.F, size.E, size.K, **options)


# ---- text ----------------------------------------------------------------------------------------

@cache
def standard_library() -> tuple[torch.Tensor, torch.Tensor, str]:
    """(training bytes, held-out bytes, description), uint8. Tests and installed packages are left out: not every
    machine has them. Raises FileNotFoundError if this Python has no source of its library."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
    files = sorted((path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts[:-1])),
                   key=lambda path: path.relative_to(root).as_posix())
    if len(files) < HELD_OUT:
        raise FileNotFoundError(f"{root} holds {len(files)} .py files: this Python comes without its library's source")
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for number, path in enumerate(files):
        parts[number % HELD_OUT == 0].append(path.read_bytes())
    training, held_out = b"\n".join(parts[False]), b"\n".join(parts[True])
    digest = hashlib.sha256(training + held_out).hexdigest()[:12]
    description = (f"standard library of Python {platform.python_version()}, {len(files)} files, "
                   f"{len(training)} bytes to train on and {len(held_out)} held out, sha256 {digest}")
    return (torch.frombuffer(bytearray(training), dtype=torch.uint8),
            torch.frombuffer(bytearray(held_out), dtype=torch.uint8), description)


class Batches:
    """Random windows of a text, the same for the same seed on every device."""

    def __init__(self, text: torch.Tensor, size: Size, seed: int, device: torch.device):
        self.text, self.size, self.device = text.to(device), size, device
        self.generator = torch.Generator().manual_seed(seed)
        self.span_S1 = torch.arange(size.sequence + 1, device=device)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes (B, S) int64 and the bytes that follow each of them."""
        starts_B = torch.randint(len(self.text) - self.size.sequence, (self.size.batch,), generator=self.generator)
        window_BS1 = self.text[starts_B.to(self.device)[:, None] + self.span_S1].long()
        return window_BS1[:, :-1], window_BS1[:, 1:]


# ---- model ---------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Causal self-attention with rotary positions (RoFormer, arXiv 2104.09864)."""

    def __init__(self, D: int, H: int):
        super().__init__()
        self.H = H
        self.qkv_proj, self.o_proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        B, S, D = x_BSD.shape
        q, k, v = self.qkv_proj(x_BSD).view(B, S, 3, self.H, D // self.H).permute(2, 0, 3, 1, 4)
        out_BHSd = scaled_dot_product_attention(self._rotate(q), self._rotate(k), v, is_causal=True)
        return self.o_proj(out_BHSd.transpose(1, 2).reshape(B, S, D))

    @staticmethod
    def _rotate(x_BHSd: torch.Tensor) -> torch.Tensor:
        S, d = x_BHSd.shape[-2:]
        rates = 10_000.0 ** (-torch.arange(0, d, 2, device=x_BHSd.device) / d)
        angles = torch.arange(S, device=x_BHSd.device)[:, None] * rates
        cos, sin = angles.cos().to(x_BHSd.dtype), angles.sin().to(x_BHSd.dtype)
        first, second = x_BHSd.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    """x + attention, then x + experts, each on a normalised x."""

    def __init__(self, size: Size, factory: MoEFactory):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(size.D), Attention(size.D, size.H)
        self.mlp_norm, self.mlp = nn.RMSNorm(size.D), factory(size.D)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S, D) -> (B, S, D), and the layer's auxiliary loss."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        out_BSD, aux_loss = self.mlp(self.mlp_norm(x_BSD), return_aux_loss=True)
        return x_BSD + out_BSD, aux_loss


class ByteLM(nn.Module):
    """Bytes (B, S) int64 -> logits (B, S, 256) of the next byte, and the sum of the layers' auxiliary losses."""

    def __init__(self, size: Size, factory: MoEFactory):
        super().__init__()
        self.embedding = nn.Embedding(BYTES, size.D)
        self.blocks = nn.ModuleList(Block(size, factory) for _ in range(size.L))
        self.norm, self.head = nn.RMSNorm(size.D), nn.Linear(size.D, BYTES, bias=False)

    def forward(self, bytes_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes (B, S), integers -> logits of the next byte (B, S, 256), and the sum of the auxiliary losses."""
        x_BSD, aux_losses = self.embedding(bytes_BS), []
        for block in self.blocks:
            x_BSD, aux_loss = block(x_BSD)
            aux_losses.append(aux_loss)
        return self.head(self.norm(x_BSD)), torch.stack(aux_losses).sum()

    def draw_weights(self, seed: int) -> None:
        """Initial weights by name and shape alone, so that models with other layers of the same names start equal:
        matrices normal with standard deviation (inputs)^-0.5, vectors one."""
        for name, parameter in sorted(self.named_parameters()):
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
                continue
            name_seed = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
            generator = torch.Generator().manual_seed(name_seed)
            drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            with torch.no_grad():
                parameter.copy_(drawn)


# ---- training ------------------------------------------------------------------------------------

@dataclass
class TrainingRun:
    """What a training did, in plain numbers.

    losses: the training loss of each step, nats a byte, without auxiliary losses. evaluations: (step, loss on
    held-out text with exact top-k), the last one after the last step. rows: (steps, L, E), each layer's load at each
    step, before anything is dropped or rounded. balance: name -> per step and layer, of the measures below. seconds:
    of the steps, evaluation left out. backend: what the layers ran on in the last step; None if they do not say.
    """

    size: dict[str, int]
    text: str
    steps: int
    seed: int
    device: str
    dtype: str
    losses: list[float]
    evaluations: list[tuple[int, float]]
    rows: list[list[list[int]]]
    balance: dict[str, list[list[float]]]
    seconds: float
    tokens_per_second: float
    backend: str | None

    @property
    def evaluation_loss(self) -> float:
        """Nats a byte on held-out text after the last step."""
        return self.evaluations[-1][1]


MEASURES = ("entropy", "gini", "coefficient_of_variation", "max_over_mean")


def train(factory: MoEFactory, size: Size = SMALL, *, steps: int = 500, seed: int = 0,
          device: torch.device | str | None = None, dtype: torch.dtype | None = None, learning_rate: float = 1e-3,
          evaluate_every: int = 0, progress: str | None = "training",
          after_step: Callable[[int, ByteLM], None] | None = None) -> TrainingRun:
    """Train a ByteLM whose layers `factory` makes, with AdamW, a linear warm-up over a tenth of the steps and a cosine
    to a tenth of learning_rate.

    device: the GPU if there is one. dtype: of the arithmetic, by autocast over float32 weights; bfloat16 on a GPU,
    float32 (no autocast) on a CPU. evaluate_every: steps between evaluations, 0 for one at the end. progress: a name to
    print now and then to standard error, None for silence. after_step(step, model) is called after each step.
    Raises ValueError for steps < 1; FloatingPointError if the loss is not finite at the end.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    training, held_out, description = standard_library()
    batches = Batches(training, size, seed, device)
    torch.manual_seed(seed)
    with device:
        model = ByteLM(size, factory)
    model.draw_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, steps // 10)

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = torch.tensor((step - warm_up) / max(1, steps - warm_up))
        return float(0.55 + 0.45 * torch.cos(torch.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses, rows, evaluations = [], [], []
    seconds, said = 0.0, time.monotonic()
    _wait(device)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        bytes_BS, next_BS = batches.draw()
        with _autocast(device, dtype):
            logits_BSV, aux_loss = model(bytes_BS)
            backend = getattr(model.blocks[0].mlp, "backend", None)  # it depends on autocast, so it is asked here
            loss = cross_entropy(logits_BSV.float().flatten(0, 1), next_BS.flatten())
        (loss + aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        for block in model.blocks:
            if hasattr(block.mlp, "update_balance"):
                block.mlp.update_balance()
        losses.append(loss.detach())
        rows.append(torch.stack([block.mlp.rows_E for block in model.blocks]))
        if after_step is not None:
            after_step(step, model)
        if progress and time.monotonic() - said > 2:
            said = time.monotonic()
            print(f"{progress}: step {step} of {steps}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
        if step == steps or (evaluate_every and step % evaluate_every == 0):
            _wait(device)
            seconds += time.perf_counter() - start
            evaluations.append((step, evaluate(model, size, device, dtype, held_out)))
            _wait(device)
            start = time.perf_counter()
    losses = torch.stack(losses).tolist()
    if losses[-1] != losses[-1]:
        raise FloatingPointError(f"the loss is {losses[-1]} after {steps} steps")
    rows_NLE = torch.stack(rows).cpu()
    measured_NLM = evenness(rows_NLE)
    balance = {name: measured_NLM[:, :, i].tolist() for i, name in enumerate(MEASURES)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return TrainingRun(dataclasses.asdict(size), description, steps, seed, name, str(dtype).removeprefix("torch."),
                       losses, evaluations, rows_NLE.tolist(), balance, seconds, size.T * steps / seconds,
                       backend and backend.name)


@torch.no_grad()
def evaluate(model: ByteLM, size: Size, device: torch.device, dtype: torch.dtype, held_out: torch.Tensor) -> float:
    """Nats a byte on held-out text, in eval mode: the same batches at every call."""
    batches = Batches(held_out, size, seed=0, device=device)
    model.eval()
    total = 0.0
    for _ in range(EVALUATION_BATCHES):
        bytes_BS, next_BS = batches.draw()
        with _autocast(device, dtype):
            logits_BSV, _ = model(bytes_BS)
        total += cross_entropy(logits_BSV.float().flatten(0, 1), next_BS.flatten()).item()
    model.train()
    return total / EVALUATION_BATCHES


@torch.no_grad()
def expert_inputs(model: ByteLM, size: Size, T: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(T, D) tokens of held-out text as the last block's MoE layer gets them, in eval mode: the same at every call."""
    batches = Batches(standard_library()[1], size, seed=1, device=device)
    found: list[torch.Tensor] = []
    hook = model.blocks[-1].mlp.register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0].flatten(0, 1)))
    model.eval()
    with _autocast(device, dtype):
        while sum(map(len, found)) < T:
            model(batches.draw()[0])
    hook.remove()
    model.train()
    return torch.cat(found)[:T]


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16 if dtype == torch.float32 else dtype,
                          enabled=dtype != torch.float32)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
