"""The entry point: `mm-moslora`, and `python -m mm_moslora`."""

import os
import signal


def main() -> None:
    """Import the command line and run it; Ctrl-C ends it quietly while it imports, too."""
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so under nohup, or behind a shell's `&`
    if heard:
        # Anywhere among the imports, where an exception would be a traceback, or swallowed.
        signal.signal(signal.SIGINT, _leave)
    from mm_moslora.cli import main as run

    if heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    finally:
        if heard:  # a second Ctrl-C, while the interpreter ends
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def _leave(*_: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(130)  # `ExitStatus.INTERRUPTED`


if __name__ == "__main__":
    main()
