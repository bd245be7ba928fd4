"""Before training: what a run needs of a GPU, by arithmetic, and the smallest change that makes it fit."""
