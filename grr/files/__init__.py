"""Files: bounded reading of regular files, atomic replacement, disk errors, damaged weights, printable text."""
