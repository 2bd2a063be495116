"""Is it safe to start? Facts of each node, and checks that judge them."""
