"""A fake accelerator that reorders work as a real one may; see README.md."""
