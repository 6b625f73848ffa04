"""What a run writes down: metrics, where its numbers come from, cards; and whether the record agrees with itself."""
