"""Places whose channels can be scaled, the scales that suit them, and putting these in."""
