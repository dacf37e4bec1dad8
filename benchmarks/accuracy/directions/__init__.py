"""Ask what cheap first passes point at.

Comes in: tasks. Goes out: for each way to make `eps`, how near it is to that of a whole pass and how much it raises
the loss, for docs/directions.md. Must not: look at accuracy. `make directions` runs `measure`.
"""
