"""Storages, one file each: a disk, and all that fsspec knows. See `dstrain.base.storage`."""
