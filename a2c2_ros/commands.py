"""What the command lines have in common."""

import functools
import sys
from collections.abc import Callable, Sequence

from a2c2_ros.core.errors import A2C2Error


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[[Sequence[str] | None], int]:
    """Decorate a command line's ``main(argv)``: a wrong input is one line on stderr, not a traceback.

    Returns:
        The same, which returns the exit code: that of ``main``, 0 for None, 2 for an error of the package.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except A2C2Error as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run
