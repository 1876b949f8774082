"""Substeps without repetition: what robosuite computes three times from the same positions is computed once.

In every substep robosuite calls ``forward`` twice and ``step`` once, and each of them finds the bodies' places and
their contacts anew, although nothing moves in between. The constraint solver, which begins where it last ended, runs as
often as before: so the results are the same bit for bit.
"""

import mujoco


class SinglePass:
    """Stands in for ``forward`` and ``step`` of a robosuite simulation while a ``with`` block runs its substeps.

    Nothing but the simulation's own steps may change positions or velocities within the block.

    Args:
        sim: The ``MjSim``.
    """

    def __init__(self, sim: object) -> None:
        self._sim = sim
        self._model, self._data = sim.model._model, sim.data._data
        self._known = False  # places, contacts and velocities of the present positions

    def __enter__(self) -> None:
        self._known = False
        self._sim.forward, self._sim.step = self._forward, self._step

    def __exit__(self, *_) -> None:
        del self._sim.forward, self._sim.step

    def _forward(self) -> None:
        if not self._known:
            mujoco.mj_step1(self._model, self._data)
            mujoco.mj_fwdActuation(self._model, self._data)
            mujoco.mj_fwdAcceleration(self._model, self._data)
            self._known = True
        mujoco.mj_fwdConstraint(self._model, self._data)

    def _step(self) -> None:
        if self._known:
            mujoco.mj_step2(self._model, self._data)
        else:
            mujoco.mj_step(self._model, self._data)
        self._known = False
