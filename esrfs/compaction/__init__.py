"""Compaction as a pure function: an original's bytes, a policy and networks in; a blob's parts and a verdict out.

Nothing here opens a file. Only ``outcome`` is imported by other processes than the engine: it needs no numpy and no
torch.
"""
