"""The data sets, a file each; `SET` in it is what the catalogue finds."""
