"""One file per experiment; `base.py` holds the paper's recipe."""
