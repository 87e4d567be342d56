"""Disks as a crash may leave them, and readers and restarted writers on them. See docs/crash-safety.md."""
