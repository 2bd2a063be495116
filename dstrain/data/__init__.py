"""From tar shards to the rows of a step: a pure function of corpus, seed and step, on any number of ranks."""
