"""Trackers, one file each. See `dstrain.base.tracker`."""
