"""What a person sees of a comparison: tables, charts, the page."""
