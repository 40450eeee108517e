"""The commands that measure trained models."""
