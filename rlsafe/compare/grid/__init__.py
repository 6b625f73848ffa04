"""From a comparison's config to its cells, and what its directory holds of them."""
