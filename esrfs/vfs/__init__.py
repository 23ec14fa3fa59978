"""What the mounted filesystem does, with no FUSE in it.

The mount's adapter (``esrfs.mount.adapter``) is its only user today; a WebDAV or inode-based adapter would be another.
Everything is addressed beneath the store's root descriptor; nothing here resolves an absolute path, since a path inside
the mount would come back to this very process and wait for itself.

Rooms: ``filesystem`` (the operations; those that take more than a system call in ``opening``, ``changing``, ``names``
and ``creating``), ``shared`` (what these have in common), ``directories`` (descriptors of parent directories),
``attributes`` (sizes of views), ``handles`` (open files, and whose bytes the kernel caches), ``removed`` (files deleted
while open), ``view`` (one blob read as its photograph), ``recent`` (views that were open a moment ago), ``wrap`` (user
files that are blobs), ``xattrs`` (``user.esrfs.*``), ``native`` (the few system calls that Python lacks).
"""
