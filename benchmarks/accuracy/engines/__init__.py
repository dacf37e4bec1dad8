"""Do other engines predict what the quantized models of this benchmark predict?

`make engine-accuracy`. `models` trains and exports them, `measure` has them run on every engine and kind of CPU and
stores what each predicts, `run_graph` is what runs there (it needs no more than an engine and numpy), `page` writes
docs/engine_accuracy.md.
"""
