"""Planted faults: each is one edit of a level's source that a real mistake could make. The gate must go red.

python -m pytest tests/test_faults.py
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import pytest
import torch

from common.level import Loaded
from tests.cases import CASES, LEVELS, Case, check


@dataclass(frozen=True)
class Fault:
    """In `level`'s file, `right` becomes `wrong`; `why` is the mistake, `case` the first case that shows it."""

    why: str
    level: int
    right: str
    wrong: str

    def __str__(self) -> str:
        return f"level{self.level} {self.why}".replace(" ", "_")


FAULTS = (
    Fault("swapped gate and up", 0, "gate_NF, up_NF = ", "up_NF, gate_NF = "),
    Fault("score skipped", 0, "y_ND * scores_T[token_N, None]", "y_ND"),
    Fault("last expert forgotten", 0, "range(cfg.E)", "range(max(1, cfg.E - 1))"),
    Fault("last slot forgotten", 0, "range(cfg.K)", "range(max(1, cfg.K - 1))"),
    Fault("scores not renormalised", 0, "if cfg.renormalize:", "if False:"),
    Fault("scores of the neighbour slot", 1, "scores_TK[:, :, None]", "scores_TK.flip(1)[:, :, None]"),
    Fault("rows of another token", 1, "x_TD.repeat_interleave(expert_ids_TK.shape[1], dim=0)",
          "x_TD.repeat(expert_ids_TK.shape[1], 1)"),
    Fault("SiLU without its factor", 2, "gate * tl.sigmoid(gate) * up", "tl.sigmoid(gate) * up"),
    Fault("swapped gate and up", 2, "gate * tl.sigmoid(gate) * up", "up * tl.sigmoid(up) * gate"),
    Fault("last column block dropped", 2, "inside = column < F", "inside = column < F - 1"),
    Fault("only the first chunk", 3, "x_TD.split(workspace.tokens), out_TD.split(workspace.tokens), strict=True",
          "x_TD.split(workspace.tokens)[:1], out_TD.split(workspace.tokens), strict=False"),
    Fault("down weights of the chunk before", 3,
          "gather_into(down_weights_RDF, weights.down_EDF, expert_of_row_R)", "pass"),
    Fault("offset off by one", 4, "row_start = tl.load(offsets_ptr + expert)",
          "row_start = tl.load(offsets_ptr + expert) + 1"),
    Fault("last row tile dropped", 4, "row_tiles = tl.cdiv(row_end - row_start, BLOCK_M)",
          "row_tiles = tl.maximum(1, (row_end - row_start) // BLOCK_M)"),
    Fault("last depth block dropped", 4, "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K + 1, BLOCK_K)"),
    Fault("depth tail not masked", 4, "< K - k", "< K"),
    Fault("too few tiles launched", 4, "+ min(E, R)", ""),
    Fault("expert of the tile before", 4, "(tile_ends <= tile)", "(tile_ends < tile)"),
    Fault("half precision in a float32 layer", 4, "tl.dot(a, w,", "tl.dot(a.to(tl.float16), w.to(tl.float16),"),
    Fault("combine in sorted order", 4, "y_RD[row_of_slot_TK]", "y_RD.unflatten(0, row_of_slot_TK.shape)"),
    Fault("unstable order", 4, "slot_of_row_R // K]", "slot_of_row_R.flip(0) // K]"),
)


def planted(fault: Fault, folder) -> Loaded:
    loaded = LEVELS[fault.level]
    source = loaded.path.read_text()
    assert source.count(fault.right) >= 1, "the fault's line is gone from the level: plant it anew"
    path = folder / f"{loaded.path.stem}_faulty.py"
    path.write_text(source.replace(fault.right, fault.wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Loaded(module.LEVEL, module)


def caught(loaded: Loaded, case: Case, device: torch.device) -> bool:
    try:
        return not check(loaded, case, torch.float32, device).ok
    except (IndexError, RuntimeError, ValueError, TypeError):
        return True


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault, tmp_path, device):
    loaded = planted(fault, tmp_path)
    assert any(caught(loaded, case, device) for case in CASES)
