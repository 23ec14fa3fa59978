"""Blobs: the small file that takes an original's place. Bytes in, bytes out; nothing here touches a store."""
