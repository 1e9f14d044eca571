"""The command line: ``repbend-fast COMMAND …``.

Exit codes: 0 done; 1 a check failed, or a defect (with its traceback); 2 something the user can mend, one line on
stderr; 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence

from repbend_fast.cli.commands import EXIT_INTERRUPTED, train
from repbend_fast.cli.making_data import make
from repbend_fast.cli.parser import parse
from repbend_fast.console import hush
from repbend_fast.distributed.launch import launch
from repbend_fast.errors import CheckFailedError, EndedElsewhere, UserError

EXIT_CHECK_FAILED = 1
EXIT_USER_ERROR = 2
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
"""What the system says of a path that was named, and that only its user can mend."""
_NO_SPACE = ("no space left on device", "os error 28")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code. ``argv`` defaults to the process's arguments.

    With ``REPBEND_DEBUG=1`` user errors keep their traceback.
    """
    debug = os.environ.get("REPBEND_DEBUG", "") not in ("", "0")
    hush()
    _use_growing_segments()
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        own = launch()
        if own.count > 1:
            if arguments.handler not in (train, make):
                raise UserError(
                    "only train and data make run in several processes; start this command without torchrun"
                )
            arguments.json = arguments.json and own.number == 0  # the first speaks for all
        code = int(arguments.handler(arguments))
        sys.stdout.flush()
        return code
    except UserError as error:
        if debug:
            raise
        if isinstance(error, EndedElsewhere) and launch().number:
            return EXIT_USER_ERROR  # the first process and the failed one say it
        return _fail(str(error), EXIT_CHECK_FAILED if isinstance(error, CheckFailedError) else EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has what it wanted; without this, Python complains again when it flushes at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _REFUSED and error.filename and not debug:
            return _fail(f"{os.fsdecode(error.filename)}: {error.strerror}")
        if debug or not any(_is_no_space(link) for link in _chain(error)):
            raise
        return _fail(
            "no space left on the disk that is written to; what was saved before is intact: free some space, then "
            "resume"
        )


def _use_growing_segments() -> None:
    """Let torch's CUDA allocator grow its segments: every batch has other lengths, and fixed segments fragment. A
    user's settings stay.
    """
    if sys.platform == "linux" and not any(
        name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _fail(message: str, code: int = EXIT_USER_ERROR) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_no_space(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    # safetensors and torch's zip writer wrap the system's error in one of their own.
    return any(text in str(error).lower() for text in _NO_SPACE)
