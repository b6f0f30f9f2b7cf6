"""The stages, one a file. A stage imports storage and never another stage."""
