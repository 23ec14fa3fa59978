"""The truth on disk: everything that reads or changes a store's directory. No numpy, no torch, no FUSE.

A store is addressed by directory descriptors and relative names only, never by an absolute path after it was opened:
a process that serves the mount would otherwise resolve a path through its own mount and wait for itself.
"""
