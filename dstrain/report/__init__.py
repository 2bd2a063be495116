"""The report of a run, or of several side by side: report.md and report.html, which needs nothing but a browser."""
