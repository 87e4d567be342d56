"""A fake accelerator that reorders work as a real accelerator may; see README.md."""
