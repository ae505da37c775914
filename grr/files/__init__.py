"""Files: regular ones read with a limit, errors of the disk, names and captions as a terminal may show them."""
