"""Honest comparisons: what codecs, kernels and networks give for the bytes they take, and what a store saves.

``esrfs evaluate`` tries every combination that is asked for on a folder of pictures (``grid`` plans them, ``trial``
runs one, ``run`` runs them all and goes on where an earlier run stopped), ``curves`` compares the results,
``comparison`` makes the page. ``esrfs report`` makes a page of the same kind for a store in use (``store_page``).

It needs packages that a mount does not: the extra ``report``. Modules here are imported only after
``requirements.check``.
"""

import logging

# It warns that it lists the fonts, once for each user, when that takes seconds: nobody can do anything about it.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
