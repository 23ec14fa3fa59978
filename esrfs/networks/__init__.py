"""Networks that enlarge pictures: what they are (``spec``), where they lie (``registry``), how they run (``loading``).

``spec`` and ``registry`` never import torch, so that the mount and the command line can name networks;
``architectures`` and ``loading`` do, and are for the engine's worker and for training.
"""
