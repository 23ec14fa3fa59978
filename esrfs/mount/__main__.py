"""The process that serves a mount in the background; started by ``esrfs.mount.lifecycle.run``."""

import logging
import os
import sys

from esrfs.mount import lifecycle

if __name__ == "__main__":
    code = lifecycle.serve_in_background(sys.argv[1:])
    logging.shutdown()
    # libfuse's threads still have their Python thread states, which the interpreter's own end would trip over.
    os._exit(code)
