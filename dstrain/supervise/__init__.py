"""Attempts of a run: started, watched, ended, begun again."""
