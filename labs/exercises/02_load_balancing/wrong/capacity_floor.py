"""The capacity is rounded down."""

SAYS = "capacity rounded down"


def expert_capacity(T: int, K: int, E: int, factor: float) -> int:
    return int(factor * T * K / E)
