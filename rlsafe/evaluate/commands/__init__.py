"""The commands of this room: evaluate, judge again, ask, estimate costs, extract persona vectors."""
