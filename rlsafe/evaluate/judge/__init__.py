"""Who scores an answer: judges by name, what they are asked, how their replies are read."""
