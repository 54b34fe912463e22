"""Starting runs on clusters, with the standard library only: quick to start, on a login node too."""
