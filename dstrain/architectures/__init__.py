"""What is known of model architectures without building one: keys, shapes, linear layers."""
