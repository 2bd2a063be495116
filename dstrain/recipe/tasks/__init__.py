"""Tasks on labelled examples, a file each."""
