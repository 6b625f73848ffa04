"""The report of a comparison: tables, charts, the HTML page."""
