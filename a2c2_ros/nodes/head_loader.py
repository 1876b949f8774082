"""Loading a head while the executor goes on with other callbacks."""

from collections.abc import Callable
from concurrent.futures import Future as ConcurrentFuture
from concurrent.futures import ThreadPoolExecutor

from rclpy.task import Future

from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.drivers.profile import Profile
from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.paths import model_path


class HeadLoader:
    """Loads the head that a change of parameters asks for, on a thread of its own.

    Args:
        wake: Called on that thread when a head is loaded; the executor looks at what waits when it wakes.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="head loading")
        self._candidate: tuple[str, ConcurrentFuture] | None = None

    @staticmethod
    def load(config: ControllerConfig, profile: Profile) -> OnnxHead | None:
        """The head of a configuration, checked against the robot, or None if correction is off and no head is named.

        Raises:
            HeadError: If the head cannot be read or run.
            ManifestError: If it is not for this robot.
        """
        name = config.correction__model_path
        if not name and not config.correction__enabled:
            return None
        head = OnnxHead(model_path(name), config.correction__threads, device=config.correction__device)
        robot = profile.robot
        head.manifest.check_robot(
            profile.camera_shapes(), robot.state_names, robot.action_names, robot.action_space, config.period_ns
        )
        head.warm_up()
        return head

    def forget(self) -> None:
        """What was loaded for a request that was refused: its file may be another one by now."""
        self._candidate = None

    def begin(self, config: ControllerConfig, profile: Profile) -> Future:
        """Begin to load the head of a candidate; returns what is done when it is there or has failed."""
        ready = Future()

        def on_loaded(_: ConcurrentFuture) -> None:
            ready.set_result(None)
            self._wake()

        self._submit(config, profile).add_done_callback(on_loaded)
        return ready

    def check(self, config: ControllerConfig, profile: Profile) -> None:
        """Wait for the head of a candidate, whether it was begun or not; raises as :meth:`load`."""
        if self._candidate is None or self._candidate[0] != config.correction__model_path:
            self._submit(config, profile)
        self._candidate[1].result()

    def take(self) -> OnnxHead | None:
        """The head of the candidate that was checked last."""
        loaded, self._candidate = self._candidate[1].result(), None
        return loaded

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _submit(self, config: ControllerConfig, profile: Profile) -> ConcurrentFuture:
        loaded = self._thread.submit(self.load, config, profile)
        self._candidate = (config.correction__model_path, loaded)
        return loaded
