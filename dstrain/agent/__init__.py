"""What runs on each node: torchrun's agent, and beside it the node's status."""
