"""Do other engines predict what the quantized models of this benchmark predict?

`make engine-accuracy`. `models` trains and exports them, `measure` has them run on every engine and kind of CPU and
stores what each predicts, `elsewhere` starts what runs there (`run_graph`), `page` writes docs/engine_accuracy.md.
"""
