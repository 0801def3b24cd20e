"""The shapes every level is held to, each with its reason, and the one check they all go through."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.config import MoEConfig, Workload
from common.level import Loaded, discover
from common.measure import Gate, gate
from common.model import Weights, make_inputs, make_weights, oracle


@dataclass(frozen=True)
class Case:
    """A workload shape and why it is here. build_options go to a level's build by its name."""

    why: str
    T: int
    D: int
    F: int
    E: int
    K: int
    routing: str = "natural"
    scoring: str = "softmax_topk"
    renormalize: bool = True

    @property
    def config(self) -> MoEConfig:
        return MoEConfig("case", self.D, self.F, self.E, self.K, self.scoring, self.renormalize)

    def __str__(self) -> str:
        return self.why.replace(" ", "_")


CASES = (
    Case("plain", T=64, D=64, F=96, E=8, K=2),
    Case("one token", T=1, D=32, F=16, E=4, K=2),
    Case("odd tokens and sizes", T=37, D=40, F=24, E=6, K=3),
    Case("prime experts", T=29, D=32, F=16, E=13, K=2),
    Case("K is 1", T=33, D=32, F=16, E=5, K=1),
    Case("K is E", T=9, D=32, F=16, E=4, K=4),
    Case("one expert", T=20, D=32, F=16, E=1, K=1),
    Case("one expert takes all rows", T=50, D=32, F=16, E=8, K=1, routing="one_hot"),
    Case("same experts for all", T=70, D=32, F=16, E=8, K=3, routing="one_hot"),
    Case("empty experts", T=40, D=32, F=16, E=16, K=2, routing="sparse"),
    Case("skewed", T=90, D=32, F=16, E=8, K=2, routing="skewed"),
    Case("balanced", T=64, D=32, F=16, E=8, K=2, routing="uniform"),
    Case("rows fill tiles exactly", T=64, D=64, F=64, E=8, K=2, routing="uniform"),
    Case("softmax over the chosen", T=31, D=32, F=16, E=6, K=2, scoring="topk_softmax"),
    Case("scores not renormalised", T=31, D=32, F=16, E=6, K=3, renormalize=False),
)

LEVELS = discover()
IDS = [f"level{loaded.level.number}" for loaded in LEVELS]
SMALL_BUDGET = 33 * 2**20


def precise_dtype(loaded: Loaded) -> torch.dtype:
    """float32, or bfloat16 for a level that takes 16 bits only."""
    return torch.bfloat16 if "16-bit" in loaded.level.requires else torch.float32


def build(loaded: Loaded, cfg: MoEConfig, weights: Weights):
    """The level's forward; level 3 with a budget small enough that the shapes above need several chunks."""
    if hasattr(loaded.module, "DEFAULT_BUDGET_BYTES") and cfg.D <= 64:
        return loaded.build(cfg, weights, budget_bytes=SMALL_BUDGET)
    return loaded.build(cfg, weights)


def check(loaded: Loaded, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Gate:
    """Run one level on one case and gate it. Raises Unsupported where the level does not run."""
    loaded.level.check_supported(device, dtype)
    workload = Workload(case.config, case.T, dtype, case.routing, seed)
    weights = make_weights(case.config, dtype, device, seed)
    x_TD = make_inputs(workload, weights)
    return gate(build(loaded, case.config, weights)(x_TD), oracle(case.config, weights, x_TD), workload)
