"""How the command line ends: with one line where a person or a machine stopped it."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from absl import flags

from agr_jax import distributed
from agr_jax.errors import UserError


@contextmanager
def ending_with_one_line() -> Iterator[None]:
    """Turns what the user can mend into one line on standard error, and an exit status.

    2 for a mistake, 130 and 143 for Ctrl-C and SIGTERM, `distributed.LOST_PROCESS` where another
    process of the same run has ended. Of several processes each ends at once: otherwise it would
    wait at its exit for the others, which wait in a collective for it.
    """
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except (UserError, flags.Error) as error:
        _end(error, str(error), 2)
    except KeyboardInterrupt as error:
        _end(error, "interrupted; the same command resumes it", 130)
    except _Terminated as error:
        _end(error, "terminated; the same command resumes it", 143)
    except SystemExit as error:
        if distributed.current().count == 1:
            raise
        status = error.code if isinstance(error.code, int) else 1
        _end(error, f"ended with status {status}", status)
    except OSError as error:  # a full disk, a folder without permission
        _end(error, f"{type(error).__name__}: {error}", 2)
    except Exception as error:
        if distributed.current().count == 1:
            raise
        if not distributed.is_about_lost_process(error):
            traceback.print_exc()
        _end(error, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", 1)
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(BaseException):
    """SIGTERM, where no loop is there to act on it."""


def _terminated(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _end(error: BaseException, message: str, status: int) -> NoReturn:
    if distributed.current().count > 1:
        if isinstance(error, Exception) and distributed.is_about_lost_process(error):
            distributed.wait_for_watch()
            status = distributed.LOST_PROCESS
        distributed.leave(message, status)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
