"""What is computed: the MoE layer's shape, the workload, the presets, and the work they cost.

Shape letters, here and everywhere: T tokens, D model width, F expert width, E experts,
K top-k, R = T*K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROUTING_MODES = ("natural", "uniform", "skewed", "one_hot", "sparse")
SCORINGS = ("softmax_topk", "topk_softmax")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class MoEConfig:
    """One SwiGLU MoE layer.

    `scoring` says how router logits become scores. `softmax_topk`: softmax over all experts, then
    the K largest (Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V2). `topk_softmax`: the K largest logits,
    then softmax over those (Mixtral's first release, gpt-oss). `renormalize` divides the chosen
    scores by their sum (Mixtral, Qwen3-MoE; not OLMoE); with it both scorings agree exactly in
    real arithmetic, without it they differ.

    Raises ValueError for a size below 1, K > E, or an unknown scoring.
    """

    name: str
    D: int
    F: int
    E: int
    K: int
    scoring: str = "softmax_topk"
    renormalize: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        for letter in "DFEK":
            size = getattr(self, letter)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{letter}={size!r}: sizes are whole numbers of at least 1")
        if self.K > self.E:
            raise ValueError(f"K={self.K} is more than E={self.E}: a token cannot choose an expert twice")
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring={self.scoring!r}: choose one of {', '.join(SCORINGS)}")


PRESETS: dict[str, MoEConfig] = {
    cfg.name: cfg
    for cfg in (
        MoEConfig("tiny", D=64, F=96, E=8, K=2, source="small enough for a CPU and Triton's interpreter"),
        MoEConfig("seed", D=512, F=1024, E=8, K=2, source="the small lab shape this project started from"),
        MoEConfig("mixtral-8x7b", D=4096, F=14336, E=8, K=2, source="mistralai/Mixtral-8x7B-v0.1, config.json"),
        MoEConfig("qwen3-30b-a3b", D=2048, F=768, E=128, K=8, source="Qwen/Qwen3-30B-A3B, config.json"),
        MoEConfig("olmoe-1b-7b", D=2048, F=1024, E=64, K=8, renormalize=False,
                  source="allenai/OLMoE-1B-7B-0924, config.json (norm_topk_prob false)"),
        MoEConfig("deepseek-v3", D=7168, F=2048, E=256, K=8,
                  source="deepseek-ai/DeepSeek-V3, config.json; softmax stands in for its sigmoid router"),
        MoEConfig("sonic-7b", D=1536, F=256, E=128, K=8, source="SonicMoE, arXiv 2512.14080, 7B fine-grained"),
        MoEConfig("sonic-30b", D=4096, F=1024, E=128, K=8, source="SonicMoE, arXiv 2512.14080, 30B row"),
    )
}

# Tokens a preset is timed at when the caller names none.
DEFAULT_TOKENS: dict[str, tuple[int, ...]] = {
    "tiny": (64,),
    "seed": (64, 8192),
    "mixtral-8x7b": (64, 8192),
    "qwen3-30b-a3b": (64, 512, 16384),
    "olmoe-1b-7b": (64, 16384),
    "deepseek-v3": (64, 4096),
    "sonic-7b": (24576,),
    "sonic-30b": (32768,),
}


def preset(name: str) -> MoEConfig:
    """The preset called `name`. Raises ValueError, naming the known ones, if there is none."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def parse_shape(text: str) -> tuple[int, MoEConfig]:
    """Read `T,D,F,E,K` as (tokens, config). Raises ValueError saying which part is wrong."""
    parts = text.split(",")
    if len(parts) != 5 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"shape={text!r}: give five whole numbers T,D,F,E,K, for example 512,2048,768,128,8")
    T, D, F, E, K = (int(part) for part in parts)
    if T < 1:
        raise ValueError(f"shape={text!r}: T={T}, but timing needs at least 1 token")
    return T, MoEConfig(f"{D}x{F}x{E}x{K}", D=D, F=F, E=E, K=K, source="given by --shape")


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`. Raises ValueError, naming the known ones, if there is none."""
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} is unknown: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Workload:
    """A config with its token count, dtype, routing mode and seed: all that a timing depends on.

    Raises ValueError for T < 1 (a timing needs tokens), an unknown routing mode, or a forced
    routing mode at E > D, where router rows cannot be independent (see common/model.py).
    """

    config: MoEConfig
    T: int
    dtype: torch.dtype = torch.bfloat16
    routing: str = "natural"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.T < 1:
            raise ValueError(f"tokens={self.T}: timing needs at least 1 token")
        if self.routing not in ROUTING_MODES:
            raise ValueError(f"routing={self.routing!r} is unknown: choose one of {', '.join(ROUTING_MODES)}")
        if self.routing != "natural" and self.config.E > self.config.D:
            raise ValueError(f"routing={self.routing!r} needs E <= D to force the router, got "
                             f"E={self.config.E} > D={self.config.D}: use routing='natural'")

    @property
    def R(self) -> int:
        """Routed rows, T*K."""
        return self.T * self.config.K


def flops(workload: Workload) -> int:
    """Floating-point operations of one forward, a multiply-add counted as two.

    Experts: each of R rows meets gate_up (2F x D) and down (D x F): 2*R*(2*F*D + D*F) = 6*R*D*F.
    Router: 2*T*D*E. Activation, softmax and sums are below a per cent and left out.
    """
    cfg = workload.config
    return 6 * workload.R * cfg.D * cfg.F + 2 * workload.T * cfg.D * cfg.E


def least_bytes(workload: Workload, active_experts: int) -> int:
    """Fewest bytes one forward can move through device memory: each needed value once.

    Weights of the experts that got rows (3*D*F each), the router (E*D), x in and out once (2*T*D).
    Intermediates are counted as never leaving the chip, which no real kernel reaches at large T.
    """
    cfg = workload.config
    values = active_experts * 3 * cfg.D * cfg.F + cfg.E * cfg.D + 2 * workload.T * cfg.D
    return values * workload.dtype.itemsize
