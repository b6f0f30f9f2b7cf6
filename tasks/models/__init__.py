"""Talking to a model, local or paid, in one way. Knows no stage and no Prefect."""
