"""The slot rule and the rule that ties H, e and d together. Everything else asks these functions.

Symbols as in the paper: H slots of a chunk, e execution horizon, d inference delay, k slot::

    observation o_t taken         chunk of o_t arrives         next observation sent
      |------------- d ------------|------------ e-d -----------|
      slot:  0    1   ...   d-1    |  d   d+1   ...   e-1       |  e  ...  e+d-1   (until the next chunk arrives)
"""

from a2c2_ros.core.errors import ConfigError


def slot_index(t_tick_ns: int, t_obs_ns: int, step_ns: int) -> int:
    """Slot of a chunk that owns a tick: ``k = floor((t_tick - t_obs) / step)``.

    A slot is a time, never a queue position: slot k owns ``[t_obs + k·step, t_obs + (k+1)·step)``. With the
    *scheduled* time of the tick, jitter of its execution can neither repeat nor skip a slot.

    Args:
        t_tick_ns: Scheduled time of the tick [ns].
        t_obs_ns: Stamp of the observation that the chunk was computed from [ns].
        step_ns: Duration of a slot [ns], positive.

    Returns:
        k; negative before the observation, H or more when the chunk is used up.
    """
    return (t_tick_ns - t_obs_ns) // step_ns


def first_slot(latency_ns: int, step_ns: int) -> int:
    """First slot that begins when a chunk is there, ``ceil(δ / Δt)``: the d that a control loop on the grid gets.

    The paper's equation 2 rounds down; a slot that has begun is gone.
    """
    return -(-latency_ns // step_ns)


def admissible_execution_horizons(horizon: int, inference_delay: int) -> range:
    """All e with ``d <= e``, ``e >= 1`` and ``e + d <= H`` (paper section 2), in rising order; may be empty."""
    return range(max(1, inference_delay), horizon - inference_delay + 1)


def check_timing(horizon: int, execution_horizon: int, inference_delay: int) -> None:
    """Check H, e and d as one candidate: ``0 <= d <= e``, ``e >= 1`` and ``e + d <= H`` (paper section 2).

    With e < d the robot would wait for the inference; with e + d > H the chunk would end before the next arrives.

    Raises:
        ConfigError: Naming all three values and the rule that they break.
    """
    values = f"horizon H={horizon}, execution_horizon e={execution_horizon}, inference_delay d={inference_delay}"
    if horizon < 1 or execution_horizon < 1 or inference_delay < 0:
        raise ConfigError(f"{values}: allowed are H >= 1, e >= 1, d >= 0")
    if execution_horizon in admissible_execution_horizons(horizon, inference_delay):
        return
    if inference_delay > execution_horizon:
        raise ConfigError(f"{values}: d <= e is violated, the robot would wait for the inference")
    raise ConfigError(f"{values}: e + d <= H is violated, the chunk would be used up before the next one arrives")
