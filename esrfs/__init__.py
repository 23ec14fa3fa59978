"""esrfs: a filesystem that stores photographs small and shows them full size.

Layers, top to bottom; imports point down only (``tests/test_1_layers.py`` holds that):

cli → mount → vfs → upkeep → cache → store → engine → compaction → formats → blob → networks, metrics → config, faults
"""

__version__ = "0.1.0"
