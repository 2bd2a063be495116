"""Models: Transformers encoders on packed rows, predicting masked positions only."""
