"""Where artifacts lie: on a disk, in a bucket."""
