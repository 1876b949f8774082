"""What the paper measured on LIBERO Spatial (arXiv 2509.23224, SmolVLA as base policy): facts to compare with."""

TABLE_1 = {
    (10, 0): {"naive": 0.818, "a2c2": 0.892},
    (40, 10): {"naive": 0.644, "a2c2": 0.842},
    (50, 0): {"naive": 0.722, "a2c2": 0.816},
}
"""(e, d) to success rates, 50 rollouts per task (Table 1)."""

TABLE_7 = {
    (40, 10): {"naive": 0.67, "a2c2": 0.84},
    (40, 5): {"naive": 0.66, "a2c2": 0.86},
    (40, 3): {"naive": 0.65, "a2c2": 0.86},
    (40, 1): {"naive": 0.74, "a2c2": 0.83},
    (10, 10): {"naive": 0.75, "a2c2": 0.88},
    (10, 5): {"naive": 0.82, "a2c2": 0.92},
    (10, 3): {"naive": 0.81, "a2c2": 0.89},
    (10, 1): {"naive": 0.83, "a2c2": 0.92},
    (50, 0): {"naive": 0.71, "a2c2": 0.84},
    (40, 0): {"naive": 0.79, "a2c2": 0.89},
    (30, 0): {"naive": 0.79, "a2c2": 0.89},
    (10, 0): {"naive": 0.85, "a2c2": 0.87},
    (5, 0): {"naive": 0.83, "a2c2": 0.85},
    (1, 0): {"naive": 0.77, "a2c2": 0.84},
}
"""(e, d) to success rates, 10 rollouts per task (Table 7). Its Figure 6 draws these."""


def recovery() -> float:
    """(a2c2(40, 10) - naive(40, 10)) / (naive(10, 0) - naive(40, 10)) of Table 1."""
    lost = TABLE_1[40, 10]["naive"]
    return (TABLE_1[40, 10]["a2c2"] - lost) / (TABLE_1[10, 0]["naive"] - lost)
