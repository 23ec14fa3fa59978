"""Benchmarks: each compares esrfs with the native filesystem or a peer in the same run. ``make bench`` runs them
all."""
