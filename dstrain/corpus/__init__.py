"""The embedded corpus, and tokenizers trained on a corpus."""
