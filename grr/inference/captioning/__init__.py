"""Captions of images at any scale: files, folders and tar shards, by one process or many."""
