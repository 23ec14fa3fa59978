"""Moving photographs into a mount: ``esrfs-daemon`` watches folders, ``esrfs migrate`` does it once.

It uses the mount as any program would: it writes files there, reads them back, and asks nothing of the store's inside.
Top of the package first: ``main`` (the console script), ``service`` (the rules that watch) with ``turns``, ``once``,
``undo``, ``migration`` (batches: copy, verify, journal, then the source) and its parts: ``suitable`` (which source into
which destination), ``folders``, ``copies`` (one file into the destination), ``durable`` (many small ones made durable
together), ``touching`` (the source, at the end), ``recovery`` (what a crash left), ``batch`` and ``report`` (values).
Below them ``walk``, ``settle``, ``nested`` (stores and views in a source), ``sources`` (what may happen to a source
file), ``copying`` (bytes and metadata), ``destination``, ``asking`` (what may not answer), ``journal``, ``throttle``,
``config``, ``status``.

What must hold: a file of the source is touched only after its copy was made durable, read back past the page cache,
found equal by sha256, and recorded in the journal; and only if it is still the very file that was copied. A crash at
any point leaves the source, or the verified copy, or both; the next run goes on from there.
"""
