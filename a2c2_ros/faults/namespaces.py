"""Network namespaces: two machines on one, for root."""

import contextlib
import os
import subprocess
from collections.abc import Iterator


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread, and the threads and processes that it starts, are in the namespace.

    Raises:
        OSError: If there is no such namespace, or this is not root.
    """
    with open("/proc/thread-self/ns/net", "rb") as before, open(f"/run/netns/{name}", "rb") as namespace:
        os.setns(namespace.fileno(), os.CLONE_NEWNET)
        try:
            yield
        finally:
            os.setns(before.fileno(), os.CLONE_NEWNET)


def ip(*arguments: str) -> None:
    """Run ``ip``.

    Raises:
        OSError: If there is no such program.
        subprocess.CalledProcessError: If it fails; ``stderr`` says why.
    """
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
