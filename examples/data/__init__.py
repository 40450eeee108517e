"""The commands that build data sets, and what they share."""
