"""How much is made and measured of Kinetix; apart from what needs Kinetix itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """How much of everything."""

    experts: int  # seeds per level
    envs: int  # that experts act in at a time
    expert_steps: int  # of the environment, at most
    data_steps: int
    policy_steps: int
    head_steps: int
    batch_size: int
    width: int  # of the policy
    rollouts: int  # episodes per cell


BUDGETS = {
    "quick": Budget(1, 256, 200_000, 8_000, 200, 200, 256, 64, 16),
    "small": Budget(1, 256, 3_000_000, 200_000, 2_000, 4_000, 512, 256, 256),
    "paper": Budget(8, 2048, 64_000_000, 1_000_000, 62_500, 31_250, 512, 512, 2048),
}
"""``paper``: steps of tables 2 and 3 (32 and 16 epochs of a million frames in batches of 512)."""
