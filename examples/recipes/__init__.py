"""What the commands in `examples/` are made of; how they import it stands in `examples/README.md`."""
