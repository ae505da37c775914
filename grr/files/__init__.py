"""Files: reading regular files up to a limit, disk errors, damaged weights, and printable text."""
