"""The one room that knows Accelerate and DeepSpeed: this rank, its device, its small collectives."""
