"""What the command line does with a folder of snapshots, a module each. None of them needs torch."""
