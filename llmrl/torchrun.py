"""torch.distributed.run with the same arguments, but with the exit code of the first rank that failed, and a line about it, no traceback.

torchrun's own exit code is 1 whatever happened, so that a refused input (2) would look like a failed run.
"""

from __future__ import annotations

import sys
from typing import Any


def main(argv: list[str]) -> int:
    """The exit code: 0, the first failed rank's, or 128 + n after signal n."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(argv))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        code: Any = failure.exitcode
        sys.stderr.write(f"launch: rank {rank} ended first, with exit code {code}\n")
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
