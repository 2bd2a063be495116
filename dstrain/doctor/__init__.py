"""What has to be so before a run may start, there and now: the checks of every start, and of `dstrain doctor`."""
