"""What a crash may leave on a disk, and what readers and restarted writers make of it. See docs/crash-safety.md."""
