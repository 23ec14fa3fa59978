"""The process that runs networks, and how the mount talks to it: values in, values out.

``client``, ``protocol`` and ``lanes`` are for the mount's process and import neither torch nor numpy. ``worker``,
``handler`` and ``tiles`` run in the engine's own process only.
"""
