"""Training of esrfs's own networks: ``python -m esrfs.train``.

They are trained for what the store will do: its own downscale, its own codec.
"""
