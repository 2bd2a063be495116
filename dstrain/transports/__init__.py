"""How agents come to the nodes of a run: each file is one transport, as is an entry point of `dstrain.transports`."""
