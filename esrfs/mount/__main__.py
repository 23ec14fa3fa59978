"""The process that serves a mount in the background; started by ``esrfs.mount.lifecycle.run``."""

import sys

from esrfs.mount import lifecycle, threads

if __name__ == "__main__":
    threads.leave(lifecycle.serve_in_background(sys.argv[1:]))
